"""The training loop on a tiny image set: what it writes, and that the same gives the same."""

from __future__ import annotations

import csv
import io
import math
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score, log_loss
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from foldrace.config.hyperparameters import KNOBS, TrialParams, fold_trial_seed
from foldrace.config.ranges import Float
from foldrace.core.errors import RunFolderError
from foldrace.core.metrics import normalise
from foldrace.core.plugin_files import PluginFile
from foldrace.run_folder.records import CandidateRecord
from foldrace.run_folder.variants import EMA
from foldrace.trainables import spec as spec_module
from foldrace.trainables import trial as trial_module
from foldrace.trainables.data.loader import loader_settings
from foldrace.trainables.data.pixel_cache import open_images
from foldrace.trainables.data.trial_data import open_data
from foldrace.trainables.devices import fresh_accelerator, seed_trial
from foldrace.trainables.predict import (
    autocast_for,
    log_probabilities,
    read_model_config,
    scoring_loader,
    unpack_classifier,
)
from foldrace.trainables.spec import EpochReport, Pace, TrialSpec, TrialStopped
from foldrace.trainables.state import TrainState, build_train_state
from foldrace.trainables.trial import run_trial
from tests.ensemble.temperature_reference import smoothed_temperature
from tests.trainables.written_trials import another, read, written_trial

CPU = torch.device("cpu")
IN_PROCESS = loader_settings(1, "cpu")


class Watcher:
    """Keeps the reports; asks for the end after so many batches."""

    def __init__(self, batches: float = math.inf) -> None:
        self.epochs: list[EpochReport] = []
        self._left = batches

    def report(self, epoch: EpochReport) -> None:
        self.epochs.append(epoch)

    def stop_requested(self) -> bool:
        self._left -= 1
        return self._left < 0


def spec_for(run: Any, **changes: Any) -> TrialSpec:
    """test_vit at 32 px for 2 epochs on the tiny run; `changes` of the spec, of what the run folder
    has for all trials and of the hyperparameters alike."""
    params: dict[str, Any] = {
        "precision": "fp32", "pretrained": False, "epochs": 2, "image_size": 32, "batch_size": 14,
        "lr": 2e-3, "policy": "light",
    }  # fmt: skip
    params |= {key: changes.pop(key) for key in set(changes) & set(KNOBS)}
    candidate = changes.pop("candidate", "c0000")
    backbone = changes.pop("backbone", "timm/test_vit")
    return written_trial(run, candidate, backbone, params, **changes)


def result_files(run: Any, spec: TrialSpec) -> dict[str, bytes]:
    """What a trial computed: all but its times."""
    folder = Path(run.store.root) / "trials" / spec.candidate / f"fold{spec.fold}"
    kept = [p for p in folder.iterdir() if p.suffix in (".npy", ".safetensors")]
    return {p.name: p.read_bytes() for p in kept}


def log_rows(run: Any, spec: TrialSpec) -> list[dict[str, str]]:
    text = run.store.train_log(spec.candidate, spec.fold)
    assert text is not None
    return list(csv.DictReader(io.StringIO(text)))


def test_what_a_trial_writes(tiny_run: Any) -> None:
    spec, watcher, began = spec_for(tiny_run, accelerators=("0",)), Watcher(), time.time()
    record = run_trial(spec, watcher)
    assert tiny_run.store.trial("c0000", 0) == record
    assert (record.status, record.epochs_trained, record.error) == ("finished", 2, None)
    trial = read(spec)
    assert record.params == trial.params.as_dict() == trial.candidate.params
    assert (record.seed, record.accelerators) == (trial.seed, ("0",))
    assert 0 < began < record.started_at < record.ended_at < time.time()
    assert record.seconds == pytest.approx(record.ended_at - record.started_at, abs=0.1)
    assert (record.device, record.micro_batch) == (("cuda" if cuda() else "cpu"), 14)
    assert set(record.variants) == {"raw", "ema"} and record.seconds > 0 and record.notes == ()
    assert set(result_files(tiny_run, spec)) == {
        "rows.npy", "oof.npy", "oof_ema.npy", "true_prob.npy", "true_prob_ema.npy",
        "best.safetensors", "best_ema.safetensors",
    }  # fmt: skip
    rows = log_rows(tiny_run, spec)
    assert list(rows[0]) == [
        "epoch", "train_loss", "train_acc", "val_loss", "val_acc", "val_logloss",
        "val_calibrated_logloss", "ema_val_acc", "ema_val_logloss", "ema_val_calibrated_logloss",
        "lr", "seconds",
    ]  # fmt: skip
    assert [r["epoch"] for r in rows] == ["0", "1"] == [str(e.epoch) for e in watcher.epochs]
    assert [float(r["val_logloss"]) for r in rows] == [e.val_logloss for e in watcher.epochs]
    for variant, prefix in (("raw", ""), ("ema", "ema_")):
        score, column = record.variants[variant], f"{prefix}val_calibrated_logloss"
        assert score.epoch == 1
        assert score.calibrated_logloss == float(rows[-1][column])
        assert score.val_logloss == float(rows[-1][f"{prefix}val_logloss"])
    assert float(rows[-1]["lr"]) == pytest.approx(0.01 * trial.params.lr)


class PaceWatcher(Watcher):
    """Keeps the paces too; each batch is waited for a moment."""

    def __init__(self, moment: float) -> None:
        super().__init__()
        self.paces: list[Pace] = []
        self._moment = moment

    def pace(self, pace: Pace) -> None:
        assert len(self.paces) == len(self.epochs)  # before the epoch's report
        self.paces.append(pace)

    def stop_requested(self) -> bool:
        time.sleep(self._moment)
        return super().stop_requested()


def test_a_monitor_hears_how_fast_each_epoch_was_trained(tiny_run: Any) -> None:
    """Two whole batches of 14 images, each of which is waited for a tenth of a second."""
    waits, watcher = 2 * 0.1, PaceWatcher(0.1)
    run_trial(spec_for(tiny_run), watcher)
    assert len(watcher.paces) == len(watcher.epochs) == 2
    for pace, epoch in zip(watcher.paces, watcher.epochs, strict=True):
        seconds = 28 / pace.images_per_second
        assert waits < seconds < epoch.seconds  # which has the scoring too
        assert waits / seconds <= pace.waiting < 1
        assert (1 - pace.waiting) * seconds > 0.001  # the steps themselves


def cuda() -> bool:
    return torch.cuda.is_available()


def test_scores_are_scikit_learns_on_the_stored_rows(tiny_run: Any) -> None:
    record = run_trial(spec_for(tiny_run, fold=1), Watcher())
    files = tiny_run.store.files
    folder = "trials/c0000/fold1"
    rows, oof, true = (
        np.load(io.BytesIO(files.read(f"{folder}/{n}.npy")), allow_pickle=False)
        for n in ("rows", "oof", "true_prob")
    )
    assert rows.tolist() == np.flatnonzero(tiny_run.store.folds().fold == 1).tolist()
    assert (oof.dtype, true.dtype, oof.shape) == (np.float16, np.float32, (len(rows), 3))
    assert true.max() <= 1.0
    labels = tiny_run.store.labels()[rows]
    prob = normalise(np.exp(oof.astype(np.float64)))
    score = record.variants["raw"]
    assert score.rows == len(rows)
    assert score.val_logloss == pytest.approx(-np.log(true.astype(np.float64)).mean(), rel=1e-12)
    assert score.val_logloss == pytest.approx(log_loss(labels, prob, labels=[0, 1, 2]), abs=1e-3)
    fitted = log_softmax(np.log(prob) / smoothed_temperature(np.log(prob), labels), axis=1)
    calibrated = min(score.val_logloss, log_loss(labels, np.exp(fitted), labels=[0, 1, 2]))
    assert score.calibrated_logloss == pytest.approx(calibrated, abs=1e-3)  # float16 files
    assert score.val_acc == pytest.approx(accuracy_score(labels, prob.argmax(1)))


@pytest.mark.slow
def test_the_same_trial_gives_the_same_bits_after_any_others(
    make_tiny_run: Callable[..., Any],
) -> None:
    run = make_tiny_run()
    spec = spec_for(run, dropout=0.3, drop_path=0.1)
    run_trial(spec, Watcher())
    first = result_files(run, spec)
    torch.manual_seed(99)
    np.random.seed(99)
    run_trial(spec_for(run, candidate="c0001", precision="bf16", cpus=2, seed=5), Watcher())
    run_trial(spec_for(run, candidate="c0002", backbone="timm/test_resnet", fold=2), Watcher())
    with pytest.raises(TrialStopped):
        run_trial(spec_for(run, candidate="c0003"), Watcher(1))
    again = another(spec, "c0004")  # the id is no part of the seed
    run_trial(again, Watcher())
    assert result_files(run, again) == first
    other = spec_for(run, candidate="c0005", dropout=0.3, drop_path=0.1, seed=1)
    run_trial(other, Watcher())
    assert result_files(run, other)["oof.npy"] != first["oof.npy"]


def test_the_stored_weights_give_the_stored_rows(tiny_run: Any) -> None:
    spec = spec_for(tiny_run, backbone="timm/test_resnet", epochs=3)
    run_trial(spec, Watcher())
    store = tiny_run.store
    files = [tiny_run.images / p for p in store.folds().image_paths]
    rows = np.flatnonzero(store.folds().fold == 0)
    for variant, name in (("raw", "oof"), ("ema", "oof_ema")):
        data = store.weights("c0000", 0, variant)
        config = read_model_config(data)
        assert (config.backbone, config.classes, config.image_size) == ("timm/test_resnet", 3, 32)
        loader = scoring_loader(open_images(files, 32, 1), rows, config, 5, IN_PROCESS)
        model = unpack_classifier(data, config)
        autocast = autocast_for(CPU, "fp32")
        log_prob, scored = log_probabilities(model, loader, CPU, autocast, "softmax")
        stored = np.load(io.BytesIO(store.files.read(f"trials/c0000/fold0/{name}.npy")))
        assert scored.tolist() == rows.tolist()
        np.testing.assert_allclose(log_prob, stored.astype(np.float32), atol=5e-3, rtol=2e-3)


def test_gradient_accumulation_changes_nothing(make_tiny_run: Callable[..., Any]) -> None:
    run = make_tiny_run()
    whole = spec_for(run, candidate="c0001", backbone="timm/test_convnext", dropout=0.0, epochs=1)
    parts = replace(another(whole, "c0002"), micro_batch=7)
    run_trial(whole, Watcher())
    assert run_trial(parts, Watcher()).micro_batch == 7
    one, two = (load(run.store.weights(c, 0, "raw")) for c in ("c0001", "c0002"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-4, rtol=1e-3)
    losses = [float(log_rows(run, s)[0]["train_loss"]) for s in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_the_last_epochs_weights_are_those_of_a_plain_loop(tiny_run: Any) -> None:
    """torch's own SGD and timm's own average, on the images that the trial sees."""
    spec = spec_for(
        tiny_run, backbone="timm/test_resnet", optimizer="sgd", lr=0.05, momentum=0.9, epochs=3,
        weight_decay=0.0, schedule="constant", warmup=0.0, dropout=0.0, mixup_prob=0.0,
        clip_grad=0.0, ema_epochs=0.9, use_gpu=False,
    )  # fmt: skip
    record = run_trial(spec, Watcher())
    assert {score.epoch for score in record.variants.values()} == {2}
    store, trial = tiny_run.store, read(spec)
    accelerator = fresh_accelerator(trial)
    seed_trial(trial)
    data = open_data(trial, store, accelerator)
    model = build_train_state(trial, data, accelerator).bare
    decay = math.exp(-1 / (0.9 * len(data.batches)))
    average = ModelEmaV3(model, decay=decay, use_warmup=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    updates = 0
    for epoch in range(3):
        data.batches.epoch = epoch
        model.train()
        for batch in data.training:
            images = batch.images.permute(0, 3, 1, 2).float() / 255
            targets = torch.from_numpy(store.labels())[batch.rows]
            nn.functional.cross_entropy(model(images, batch.meta), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            updates += 1
            average.update(model, updates)
    assert updates > 3
    for variant, module in (("raw", model), ("ema", average.module)):
        for name, tensor in load(store.weights("c0000", 0, variant)).items():
            torch.testing.assert_close(tensor, module.state_dict()[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"snapshots": 2}, {"snap1": 3, "snap2": 4, "raw": 5, "ema": 5}),
        ({"snapshots": 1, "cycles": 3}, {"snap1": 3, "raw": 5, "ema": 5}),
    ],
)
def test_all_folds_of_a_candidate_keep_the_same_epochs(
    tiny_run: Any,
    monkeypatch: pytest.MonkeyPatch,
    params: dict[str, Any],
    expected: dict[str, int],
) -> None:
    """Fold 0 gets better with each epoch, and fold 1 worse."""
    score = trial_module.score_fold

    def scripted(*arguments: Any) -> Any:
        epoch, fold = arguments[1].batches.epoch, arguments[2].fold
        better = 0.5 + (2 * fold - 1) * epoch / 100
        return {n: replace(s, calibrated=better) for n, s in score(*arguments).items()}

    monkeypatch.setattr(trial_module, "score_fold", scripted)
    for fold in (0, 1):
        record = run_trial(spec_for(tiny_run, fold=fold, epochs=6, **params), Watcher())
        assert {name: kept.epoch for name, kept in record.variants.items()} == expected
        assert tiny_run.store.trial("c0000", fold) == record


def test_plateau_waits_for_the_calibrated_loss(
    tiny_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stalls from the second epoch on, while the uncalibrated one falls."""
    calls, score = iter(range(9)), trial_module.score_fold

    def scripted(*arguments: Any) -> Any:
        said = {"calibrated": 0.5, "logloss": 1.0 - next(calls) / 10}
        return {name: replace(scored, **said) for name, scored in score(*arguments).items()}

    monkeypatch.setattr(trial_module, "score_fold", scripted)
    spec = spec_for(
        tiny_run, epochs=4, ema_epochs=0.0, schedule="plateau", lr=0.01, lr_factor=0.5,
        lr_patience=1, warmup=0.0,
    )  # fmt: skip
    run_trial(spec, Watcher())
    rates = [float(row["lr"]) for row in log_rows(tiny_run, spec)]
    assert rates[0] == rates[1] > rates[-1]


def test_divergence_is_recorded_without_scores(
    tiny_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = replace(KNOBS["lr"], limits=Float(1e-7, 1e30))
    monkeypatch.setitem(KNOBS, "lr", limits)  # no lr that may be asked for is as sure to diverge
    spec = spec_for(tiny_run, lr=1e30, warmup=0.0, epochs=4, weight_decay=0.0, clip_grad=None)
    watcher = Watcher()
    record = run_trial(spec, watcher)
    assert record.status == "diverged" and record.variants == {}
    assert record.error == f"the loss is not finite at epoch {record.epochs_trained - 1}"
    assert tiny_run.store.trial("c0000", 0) == record
    folder = Path(tiny_run.store.root) / "trials/c0000/fold0"
    assert sorted(p.name for p in folder.iterdir()) == ["train_log.csv", "trial.json"]
    assert len(watcher.epochs) == record.epochs_trained - 1


@pytest.mark.parametrize("loss", ["logloss", "calibrated"])
def test_an_average_that_is_not_finite_is_divergence_too(
    tiny_run: Any, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    score = trial_module.score_fold

    def scripted(*arguments: Any) -> Any:
        scored = score(*arguments)
        return scored | {EMA: replace(scored[EMA], **{loss: math.nan})}

    monkeypatch.setattr(trial_module, "score_fold", scripted)
    assert run_trial(spec_for(tiny_run), Watcher()).status == "diverged"


class Judge(Watcher):
    """Has rungs; keeps the log as it lies in the run folder at each."""

    def __init__(self, rungs: Collection[int], log: Callable[[], str | None]) -> None:
        super().__init__()
        self.rungs = rungs
        self.logs: dict[int, str | None] = {}
        self._log = log

    def at_rung(self) -> None:
        self.logs[len(self.epochs)] = self._log()


def test_a_rung_writes_its_own_epoch(tiny_run: Any) -> None:
    """Not the best one so far; and it changes nothing."""
    store, spec = tiny_run.store, spec_for(tiny_run, epochs=3, lr=0.05, ema_epochs=0.9)
    judge = Judge({1, 3}, lambda: store.train_log("c0000", 0))
    judged = run_trial(spec, judge)
    assert judged.variants == run_trial(another(spec, "c0001"), Watcher()).variants
    rows = int((store.folds().fold == 0).sum())
    assert judge.logs.keys() == {0, 2}  # before the epoch's own report
    for before, log in judge.logs.items():
        assert log is not None and len(log.splitlines()) == 1 + before + 1
        assert store.train_log("c0000", 0).startswith(log)
        columns = store.rung_columns("c0000", 0, before + 1, rows)
        report = judge.epochs[before]
        whole = {"raw": report.val_logloss, "ema": report.ema_val_logloss}
        found = {
            name: min(whole[name], -np.log(column, dtype=np.float64).mean())
            for name, column in columns.items()
        }
        expected = {
            "raw": report.val_calibrated_logloss,
            "ema": report.ema_val_calibrated_logloss,
        }
        assert found == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("batches", [0, 2, 3, 5])  # in training (2 batches), scoring, later
def test_a_stopped_trial_writes_nothing(tiny_run: Any, batches: int) -> None:
    watcher = Watcher(batches)
    spec = spec_for(tiny_run)
    with pytest.raises(TrialStopped):
        run_trial(spec, watcher)
    written = (Path(tiny_run.store.root) / "trials").rglob("*.*")
    assert [path.name for path in written] == ["candidate.json"]
    assert len(watcher.epochs) == (1 if batches >= 3 else 0)


def test_without_an_average_there_is_the_raw_variant_alone(tiny_run: Any) -> None:
    spec = spec_for(tiny_run, ema_epochs=0.0, epochs=1)
    record = run_trial(spec, Watcher())
    assert set(record.variants) == {"raw"}
    assert set(result_files(tiny_run, spec)) == {
        "rows.npy", "oof.npy", "true_prob.npy", "best.safetensors",
    }  # fmt: skip
    assert log_rows(tiny_run, spec)[0]["ema_val_logloss"] == "nan"


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[TrainState]:
    """Those that trials build."""
    built: list[TrainState] = []
    build = trial_module.build_train_state

    def noted(*arguments: Any) -> TrainState:
        built.append(build(*arguments))
        return built[-1]

    monkeypatch.setattr(trial_module, "build_train_state", noted)
    return built


Convolved = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""Input, weight and output of each call of a convolution."""


@pytest.fixture
def convolved() -> Iterator[Convolved]:
    found: Convolved = []

    def note(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            found.append((inputs[0].detach(), module.weight.detach(), output.detach()))

    with nn.modules.module.register_module_forward_hook(note):
        yield found


def test_half_precision_on_a_cpu(
    tiny_run: Any, convolved: Convolved, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers compute in it, in training and in scoring; weights and what is scored stay whole."""
    monkeypatch.setattr(spec_module, "candidate_seed", lambda *_: 140961780)  # one for both
    losses, seen = {}, {}
    for precision in ("fp32", "bf16"):
        spec = spec_for(tiny_run, candidate=f"c{len(losses):04d}", precision=precision, epochs=1)
        convolved.clear()
        assert run_trial(spec, Watcher()).status == "finished"
        seen[precision] = {output.dtype for _, _, output in convolved}
        losses[precision] = [
            float(log_rows(tiny_run, spec)[0][column]) for column in ("train_loss", "val_loss")
        ]
    assert seen == {"fp32": {torch.float32}, "bf16": {torch.bfloat16}}
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    for half, whole in zip(losses["bf16"], losses["fp32"], strict=True):
        assert half != whole
    weights = load(tiny_run.store.weights("c0001", 0, "raw"))
    assert {tensor.dtype for tensor in weights.values()} <= {torch.float32, torch.int64}


@pytest.mark.parametrize("channels_last", [True, False])
def test_images_and_weights_lie_alike_in_memory(
    tiny_run: Any, convolved: Convolved, channels_last: bool
) -> None:
    """In training and in scoring, of the model and of its average: nothing is reordered."""
    spec = spec_for(
        tiny_run, backbone="timm/test_resnet", channels_last=channels_last, epochs=1,
        mixup_alpha=0.4, cutmix_prob=0.5, random_erasing=0.3,
    )  # fmt: skip
    run_trial(spec, Watcher())
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    assert convolved
    for image, weight, output in convolved:
        assert image.is_contiguous(memory_format=wanted)
        assert weight.is_contiguous(memory_format=wanted)
        assert output.is_contiguous(memory_format=wanted)


@pytest.mark.parametrize(
    "key",
    [
        "channels_last",
        pytest.param(
            "compile",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(shutil.which("g++") is None, reason="compiles with g++"),
            ],
        ),
    ],
)
def test_compiled_and_contiguous_models_train_alike(
    make_tiny_run: Callable[..., Any],
    example_plugin: str,
    states: list[TrainState],
    key: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only rounding may differ (and the masks of dropout, which a compiled model draws itself). A
    backbone of few layers, each of which costs seconds to compile."""
    monkeypatch.setattr(spec_module, "candidate_seed", lambda *_: 3)  # else each has its own
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # processes would import torch first
    run = make_tiny_run(plugins=(PluginFile("my_parts", example_plugin.encode(), "my_parts.py"),))
    losses, effects = [], []
    effect = {"channels_last": _lies_channels_last, "compile": _runs_compiled}[key]
    for value in (False, True):
        spec = spec_for(
            run, candidate=f"c{value:04d}", backbone="mine/tiny", dropout=0.0, lr=0.05,
            optimizer="sgd",  # AdamW makes steps of a bias whose gradient is rounding alone
            **{key: value},
        )  # fmt: skip
        run_trial(spec, Watcher())
        losses.append([float(row["val_logloss"]) for row in log_rows(run, spec)])
        effects.append(effect(states[-1]))
    assert effects == [False, True]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def _lies_channels_last(state: TrainState) -> bool:
    """See also `test_images_and_weights_lie_alike_in_memory`."""
    kernels = [p for p in state.bare.parameters() if p.dim() == 4 and p[0, 0].numel() > 1]
    return all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)


def _runs_compiled(state: TrainState) -> bool:
    from torch._dynamo import OptimizedModule
    from torch._dynamo.utils import counters

    return isinstance(state.model, OptimizedModule) and counters["frames"]["ok"] > 0


def test_training_learns_the_colours(tiny_run: Any) -> None:
    spec = spec_for(tiny_run, backbone="timm/test_resnet", epochs=12, lr=5e-3, mixup_alpha=0.0)
    record = run_trial(spec, Watcher())
    assert min(v.val_logloss for v in record.variants.values()) < 0.7  # chance is log 3 = 1.10


def test_the_seed_depends_on_what_is_trained_alone(
    tiny_run: Any, make_tiny_run: Callable[..., Any]
) -> None:
    seed = read(spec_for(tiny_run)).seed
    elsewhere = spec_for(make_tiny_run("elsewhere"), candidate="c0009", cpus=7, accelerators=("3",))
    assert read(elsewhere).seed == seed
    changes = ({"fold": 1}, {"seed": 1}, {"backbone": "timm/test_resnet"}, {"lr": 1e-5})
    others = [read(spec_for(tiny_run, **change)).seed for change in changes]
    assert len({seed, *others}) == 5
    assert all(0 <= other < 2**31 for other in others)


def test_a_trial_reads_what_lies_in_its_run_folder(make_tiny_run: Callable[..., Any]) -> None:
    """A candidate of an earlier version has what the config fixes; the spec has no copies."""
    run = make_tiny_run()
    spec = spec_for(run, seed=5, transforms=({"torchvision.RandomInvert": {"p": 1}},), fold=2)
    config = run.store.config()
    sections = {
        "training": config.training.model_copy(
            update={"lr_patience": 4, "lr": 0.5, "meta_features": ("aspect_ratio",)}
        ),
        "cache": config.cache.model_copy(update={"format": "jpeg"}),
    }
    run.store.save_config(config.model_copy(update=sections))
    old = CandidateRecord(candidate="c0000", backbone="timm/test_vit", params={"lr": 0.25})
    run.store.save_candidate(old)
    trial = read(spec)
    assert trial.params == TrialParams(lr=0.25, lr_patience=4) and trial.candidate == old
    assert trial.seed == fold_trial_seed(5, "timm/test_vit", trial.params, 2)
    assert trial.transforms == ({"torchvision.RandomInvert": {"p": 1}},)
    assert (trial.meta_features, trial.cache.format) == (("aspect_ratio",), "jpeg")
    assert {f.name for f in fields(TrialSpec)} == {
        "run", "image_root", "candidate", "fold", "session", "cpus", "use_gpu", "accelerators",
        "notes", "micro_batch", "devices",
    }  # fmt: skip
    with pytest.raises(RunFolderError, match="c0001"):
        read(replace(spec, candidate="c0001"))
