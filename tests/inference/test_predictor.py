"""The blend's probabilities, against a recomputation by hand from the weights files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save

from foldrace.commands.predict import Asked, predict
from foldrace.console.terminal import Terminal
from foldrace.core.consent import allow_run
from foldrace.core.errors import RunFolderError
from foldrace.core.files import record_json
from foldrace.dataset.submission_form import SubmissionForm
from foldrace.dataset.test_set import ImageSet
from foldrace.ensemble.selection.external import AddSpec, add_sources, save_added
from foldrace.inference.predictor import Predictor
from foldrace.inference.run_models import RunModels
from foldrace.run_folder.blend_records import (
    DecisionRule,
    EnsembleRecord,
    MemberRecord,
    MetricChoice,
    UnvalidatedRecord,
)
from foldrace.run_folder.records import CandidateRecord, TrialRecord
from foldrace.run_folder.store import RunStore
from foldrace.trainables.models.classifier import ModelConfig, build_classifier
from foldrace.trainables.predict import pack_weights, resolve_precision

K = 2
MEMBERS = (("c0000", "raw", 0.7), ("c0001", "ema", 0.3))
BACKBONES = {"c0000": ("test_resnet", 32), "c0001": ("test_efficientnet", 48)}
KEPT = 3e-4
"""Absolute: a prediction of the test set is kept as float16 log-probabilities, whose steps below 2
are 2**-10, so that a probability is off by at most half of that of itself."""
SUFFIX = {"raw": "", "ema": "_ema"}


@pytest.fixture
def blend(make_tiny_run: Callable[..., Any]) -> RunStore:
    """Untrained models of two candidates; only the members' weights exist."""
    store: RunStore = make_tiny_run("run", k=K).store
    for name, variant, _ in MEMBERS:
        backbone, size = BACKBONES[name]
        record = CandidateRecord(candidate=name, backbone=f"timm/{backbone}", params={})
        store.save_candidate(record)
        for fold in range(K):
            torch.manual_seed(100 * fold + size)
            config = ModelConfig(f"timm/{backbone}", 3, size)
            model = build_classifier(config, dropout=0.3)
            for parameter in model.head.parameters():  # a fresh head is nearly indifferent
                parameter.data.mul_(4)
            store.save_trial(
                TrialRecord(
                    candidate=name, fold=fold, status="finished", backbone=f"timm/{backbone}",
                    params={"image_size": size}, folds_hash=store.folds().hash, seed=0,
                ),
                weights={variant: pack_weights(model.state_dict(), config)},
            )  # fmt: skip
    store.blend.update(
        EnsembleRecord(
            method="greedy",
            members=tuple(MemberRecord(candidate=c, variant=v, weight=w) for c, v, w in MEMBERS),
            oof_logloss=1, crossfit_logloss=1, crossfit_se=0, certificate=0,
            best_single_oof_logloss=1, best_single="c0000 raw", oof_accuracy=0.5,
            single_crossfit_logloss=1, members_considered=2, candidates_considered=2,
            folds_hash=store.folds().hash,
        )
    )  # fmt: skip
    return store


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Three images of 32 x 32 pixels."""
    rng = np.random.default_rng(3)
    files = [tmp_path / f"사진 {i}.png" for i in range(3)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
    return files


def of_models(store: RunStore, files: list[Path]) -> NDArray[np.float64]:
    """(K, M, n, C): softmax of each fold's model."""
    found = np.empty((K, len(MEMBERS), len(files), 3))
    for number, (name, variant, _) in enumerate(MEMBERS):
        backbone, size = BACKBONES[name]
        for fold in range(K):
            path = Path(store.root) / f"trials/{name}/fold{fold}/best{SUFFIX[variant]}.safetensors"
            state = {k: torch.from_numpy(v.copy()) for k, v in load_file(path).items()}
            body = timm.create_model(backbone, num_classes=0)
            body.load_state_dict(
                {k.removeprefix("body."): v for k, v in state.items() if k.startswith("body.")}
            )
            [weights] = [v for k, v in state.items() if k.startswith("head") and v.ndim == 2]
            [bias] = [v for k, v in state.items() if k.startswith("head") and v.ndim == 1]
            mean, std = (np.array(body.pretrained_cfg[key]) for key in ("mean", "std"))
            pixels = [np.asarray(Image.open(file)) for file in files]
            batch = np.stack([cv2.resize(p, (size, size)) for p in pixels]) / 255.0
            tensor = torch.from_numpy(((batch - mean) / std).transpose(0, 3, 1, 2)).float()
            with torch.no_grad():
                logits = (body.eval()(tensor) @ weights.T + bias).double().numpy()
            found[fold, number] = rows_to_one(np.exp(logits))
    return found


def rows_to_one(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values / values.sum(axis=-1, keepdims=True)


def by_hand(
    store: RunStore, files: list[Path], temperatures: tuple[float, ...] = (1, 1), final: float = 1
) -> NDArray[np.float64]:
    """Per fold the weighted mean over the members, then the geometric mean over the folds."""
    prob = of_models(store, files)  # (K, M, n, C)
    cooled = rows_to_one(prob ** (1 / np.array(temperatures)[:, None, None]))
    mixed = np.tensordot([weight for _, _, weight in MEMBERS], cooled, axes=(0, 1))  # (K, n, C)
    return over_folds(rows_to_one(mixed ** (1 / final)))


def over_folds(prob: NDArray[np.float64]) -> NDArray[np.float64]:
    return rows_to_one(np.prod(prob, axis=0) ** (1 / len(prob)))


def change(store: RunStore, *members: MemberRecord, **fields: Any) -> None:
    """Of the blend's record."""
    record = store.blend.record()
    assert record is not None
    store.blend.update(record.model_copy(update={"members": members or record.members, **fields}))


def member(number: int, **fields: Any) -> MemberRecord:
    candidate, variant, weight = MEMBERS[number]
    return MemberRecord(**{"candidate": candidate, "variant": variant, "weight": weight} | fields)


def test_mean_over_folds_then_blend(blend: RunStore, images: list[Path]) -> None:
    done: list[int] = []
    predictor = Predictor(blend)
    prob = predictor.probabilities(images, done.append)
    np.testing.assert_allclose(prob, by_hand(blend, images), atol=2e-6)
    np.testing.assert_allclose(prob.sum(axis=1), 1, atol=1e-12)
    assert np.ptp(prob, axis=0).max() > 1e-4  # the images do differ
    assert done == [1, 2, 3, 4] and predictor.models == 4
    assert predictor.classes == ("blue", "green", "red")


def test_temperatures_of_members_and_of_the_blend(blend: RunStore, images: list[Path]) -> None:
    temperatures = (0.4, 2.5)
    members = [member(i, temperature=t) for i, t in enumerate(temperatures)]
    change(blend, *members, blend_temperature=0.6)
    prob = Predictor(blend).probabilities(images)
    np.testing.assert_allclose(prob, by_hand(blend, images, temperatures, 0.6), atol=2e-6)
    assert np.abs(prob - by_hand(blend, images)).max() > 0.02


def test_each_members_probabilities_by_name(blend: RunStore, images: list[Path]) -> None:
    temperatures = (0.4, 2.5)
    change(blend, *(member(i, temperature=t) for i, t in enumerate(temperatures)))
    found = Predictor(blend).member_probabilities(images)
    assert list(found) == ["c0000 raw", "c0001 ema"]
    for number, prob in enumerate(found.values()):
        alone = of_models(blend, images)[:, number] ** (1 / temperatures[number])
        np.testing.assert_allclose(prob, over_folds(rows_to_one(alone)), atol=2e-6)


def test_other_poolings(blend: RunStore, images: list[Path]) -> None:
    prob = of_models(blend, images)
    change(blend, member(0, weight=0.9), member(1, weight=0.5), pooling="geometric")
    log_linear = rows_to_one(np.exp(0.9 * np.log(prob[:, 0]) + 0.5 * np.log(prob[:, 1])))
    found = Predictor(blend).probabilities(images)
    np.testing.assert_allclose(found, over_folds(log_linear), atol=2e-6)
    arrays = save({"constant": np.array([0.1])})
    blend.files.write("ensemble/combiner.safetensors", arrays)  # as before the record named it
    change(blend, member(0), member(1), pooling="votes")
    votes = np.eye(3)[prob.argmax(axis=-1)]  # (K, M, n, C)
    shares = 0.9 * (0.7 * votes[:, 0] + 0.3 * votes[:, 1]) + 0.1 / 3
    found = Predictor(blend).probabilities(images)
    np.testing.assert_allclose(found, over_folds(shares), atol=2e-6)


def test_classes_are_those_of_the_decision_rule(blend: RunStore, images: list[Path]) -> None:
    """Probabilities stay; `predict` writes the classes."""
    before = Predictor(blend).probabilities(images)
    change(blend, choice=_choice(DecisionRule(log_weights=(0.0, 50.0, 0.0))))
    predictor = Predictor(blend)
    prob = predictor.probabilities(images)
    np.testing.assert_array_equal(prob, before)
    assert predictor.decide(prob).tolist() == [1, 1, 1] != prob.argmax(axis=1).tolist()
    out = Path(blend.root) / "classes.csv"
    predict(blend.root, Asked(images), out, Terminal(quiet=True))
    rows = [line.split(",") for line in out.read_text().splitlines()[1:]]
    assert [row[1] for row in rows] == ["green"] * 3
    assert [float(row[2]) for row in rows] == pytest.approx(before[:, 1], rel=1e-5)


def _choice(rule: DecisionRule) -> MetricChoice:
    return MetricChoice(
        metric="macro_f1", greater_is_better=True, value=0.9, se=0.01, tried=(), kept=0, rule=rule
    )


def test_a_decision_rule_of_other_classes_is_refused(blend: RunStore) -> None:
    change(blend, choice=_choice(DecisionRule(thresholds=(0.5,))))
    with pytest.raises(RunFolderError, match="the decision rule is of 2 classes, should be 3"):
        Predictor(blend)


def test_a_pooling_of_another_version(blend: RunStore) -> None:
    change(blend, pooling="harmonic")
    with pytest.raises(
        RunFolderError, match=r"by 'harmonic', which .*knows arithmetic, .*blend again"
    ):
        Predictor(blend)


def test_a_member_without_weight_runs_no_model(blend: RunStore, images: list[Path]) -> None:
    gone = MemberRecord(candidate="c0009", variant="raw", weight=0.0)
    change(blend, member(0), gone, member(1))
    predictor = Predictor(blend)
    np.testing.assert_allclose(predictor.probabilities(images), by_hand(blend, images), atol=2e-6)
    assert predictor.models == 4


def test_members_of_another_run(
    blend: RunStore, images: list[Path], make_tiny_run: Callable[..., Any]
) -> None:
    other: RunStore = make_tiny_run("other", k=K).store
    expected = by_hand(blend, images)
    moved = Path(other.root) / "trials"
    moved.mkdir()
    (Path(blend.root) / "trials/c0001").rename(moved / "c0001")
    change(blend, member(0), member(1, run=other.root))
    prob = Predictor(blend.root, runs=[other.root]).probabilities(images)
    np.testing.assert_allclose(prob, expected, atol=2e-6)


def test_another_run_with_other_folds_or_none(
    blend: RunStore, make_tiny_run: Callable[..., Any]
) -> None:
    other: RunStore = make_tiny_run("other", k=K + 1).store
    allow_run(blend.root, other.root)
    allow_run(blend.root, f"{other.root}-gone")
    change(blend, member(0), member(1, run=other.root))
    with pytest.raises(RunFolderError, match=r"other: has other folds than the blend of .*again"):
        Predictor(blend)
    change(blend, member(0), member(1, run=f"{other.root}-gone"))
    with pytest.raises(RunFolderError, match="other-gone: is no run folder"):
        Predictor(blend)


@pytest.fixture
def photos(images: list[Path]) -> ImageSet:
    return ImageSet(
        image_root=images[0].parent, image_paths=tuple(file.name for file in images),
        ids=tuple(file.name for file in images), id_column="ID",
        form=SubmissionForm(
            header=("ID", "blue", "green", "red"), class_columns=("blue", "green", "red")
        ),
    )  # fmt: skip


def elsewhere(store: RunStore, test: ImageSet, folder: Path) -> dict[str, NDArray[np.float64]]:
    """Two files of predictions made elsewhere: `resnet` with OOF rows, `lonely` without."""
    rng = np.random.default_rng(8)
    found = {name: rng.dirichlet(np.ones(3), size=len(test)) for name in ("resnet", "lonely")}
    for name, prob in found.items():
        np.save(folder / f"{name}.npy", prob)
    np.save(folder / "oof.npy", rng.dirichlet(np.ones(3), size=len(store.scored_rows())))
    specs = (
        AddSpec("resnet", folder / "oof.npy", folder / "resnet.npy"),
        AddSpec("lonely", None, folder / "lonely.npy"),
    )
    save_added(store, add_sources(store, specs, test), {spec.name for spec in specs})
    return found


def test_predictions_made_elsewhere_take_part_in_a_submission(
    blend: RunStore, images: list[Path], photos: ImageSet, tmp_path: Path
) -> None:
    files = elsewhere(blend, photos, tmp_path)
    foreign = MemberRecord(
        candidate="resnet", variant="added", weight=0.2, temperature=1.7, added=True
    )
    members = [member(0, weight=0.5), foreign, member(1, weight=0.3)]
    change(
        blend, *members, blend_temperature=0.8,
        unvalidated=(UnvalidatedRecord(name="lonely", weight=0.25),),
    )  # fmt: skip
    prob = of_models(blend, images)
    cooled = rows_to_one(files["resnet"] ** (1 / 1.7))
    mixed = 0.5 * prob[:, 0] + 0.2 * cooled + 0.3 * prob[:, 1]
    expected = over_folds(mixed ** (1 / 0.8))
    done: list[int] = []
    predictor = Predictor(blend)
    found = predictor.test_probabilities(photos, done.append).prob
    np.testing.assert_allclose(found, 0.25 * files["lonely"] + 0.75 * expected, atol=KEPT)
    assert done == [1, 2, 3, 4] and predictor.models == 4
    with pytest.raises(RunFolderError, match=r"elsewhere \(resnet\).*without them.*without --add"):
        predictor.probabilities(images)


def test_what_no_score_backs_is_never_in_a_prediction(
    blend: RunStore, images: list[Path], photos: ImageSet, tmp_path: Path
) -> None:
    files = elsewhere(blend, photos, tmp_path)
    change(blend, unvalidated=(UnvalidatedRecord(name="lonely", weight=0.25),))
    predictor, alone = Predictor(blend), by_hand(blend, images)
    np.testing.assert_allclose(predictor.probabilities(images), alone, atol=2e-6)
    both = predictor.test_probabilities(photos).prob
    np.testing.assert_allclose(both, 0.25 * files["lonely"] + 0.75 * alone, atol=KEPT)


def test_another_photos_is_told_before_a_model_runs(
    blend: RunStore, photos: ImageSet, tmp_path: Path
) -> None:
    elsewhere(blend, photos, tmp_path)
    change(
        blend,
        member(0),
        MemberRecord(candidate="resnet", variant="added", weight=0.3, added=True),
    )
    done: list[int] = []
    with pytest.raises(RunFolderError, match="resnet are of other images"):
        Predictor(blend).test_probabilities(replace(photos, ids=("a", "b", "c")), done.append)
    assert done == []


def test_a_row_does_not_depend_on_its_neighbours(blend: RunStore, images: list[Path]) -> None:
    together = Predictor(blend).probabilities([*images, images[0]])
    alone = Predictor(blend).probabilities([images[2]])
    np.testing.assert_allclose(together[2], alone[0], atol=1e-6)
    np.testing.assert_allclose(together[3], together[0], atol=1e-6)


def test_a_run_without_a_blend(make_tiny_run: Callable[..., Any]) -> None:
    with pytest.raises(RunFolderError, match="no blend yet"):
        Predictor(make_tiny_run("empty").store)


@pytest.mark.parametrize("damage", ["missing", "torn", "no header"])
def test_unusable_weights_are_named(blend: RunStore, images: list[Path], damage: str) -> None:
    path = Path(blend.root) / "trials/c0001/fold1/best_ema.safetensors"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100] if damage == "torn" else b"")
    with pytest.raises(RunFolderError, match=r"trials/c0001/fold1/best_ema\.safetensors"):
        Predictor(blend).probabilities(images)


def test_a_model_is_predicted_as_it_was_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU without bf16 `auto` means fp16, but fp32 for what SAM has trained."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    gpu = torch.device("cuda")
    assert resolve_precision(gpu, "auto", sam_rho=0.0) == "fp16"
    assert resolve_precision(gpu, "auto", sam_rho=0.05) == "fp32"
    assert resolve_precision(gpu, "bf16", sam_rho=0.05) == "bf16"


@pytest.mark.parametrize(("sam_rho", "half"), [(0.0, True), (0.05, False)])
def test_the_precision_follows_the_members_own_trial(
    blend: RunStore, sam_rho: float, half: bool
) -> None:
    trial = blend.trial("c0001", 1)
    assert trial is not None
    params = trial.params | {"sam_rho": sam_rho}
    blend.save_trial(trial.model_copy(update={"params": params}))
    config = blend.config()
    training = config.training.model_copy(update={"precision": "fp16"})
    blend.save_config(config.model_copy(update={"training": training}))
    found = RunModels(blend, torch.device("cpu")).autocast("c0001", 1)
    assert found._enabled is half


def test_predictions_made_elsewhere_that_were_not_blended(
    blend: RunStore, photos: ImageSet, tmp_path: Path
) -> None:
    elsewhere(blend, photos, tmp_path)
    foreign = MemberRecord(candidate="resnet", variant="added", weight=0.5, added=True)
    record = blend.blend.record()
    assert record is not None
    update = {
        "members": (member(0, weight=0.5), foreign),
        "digests": {"added/resnet/added.json": "0" * 32},
    }
    blend.files.write("ensemble/ensemble.json", record_json(record.model_copy(update=update)))
    with pytest.raises(RunFolderError, match=r"added\.json: does not belong to the blend.*--add"):
        Predictor(blend).test_probabilities(photos)


def test_what_the_mean_of_the_folds_gains_is_known_without_labels(
    blend: RunStore, images: list[Path], photos: ImageSet
) -> None:
    """The product's own predictor, with any labels: its loss is the folds' mean loss plus log Z."""
    change(blend, member(0), member(1), blend_temperature=0.6)
    found = Predictor(blend).test_probabilities(photos)
    mixed = 0.7 * of_models(blend, images)[:, 0] + 0.3 * of_models(blend, images)[:, 1]
    tempered = mixed ** (1 / 0.6)
    tempered /= tempered.sum(axis=2, keepdims=True)  # (K, n, C)
    assert len(tempered) == K > 1 and found.log_z.max() < 0
    for labels in np.random.default_rng(0).integers(0, 3, (4, len(images))):
        rows = np.arange(len(images))
        of_folds = -np.log(tempered[:, rows, labels]).mean(axis=0)
        of_mean = -np.log(found.prob[rows, labels])
        # What is kept of the test set is float16.
        np.testing.assert_allclose(of_mean, of_folds + found.log_z, atol=5e-3)
