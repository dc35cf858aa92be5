"""Every hyperparameter is wired to the training: another value gives another result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
from safetensors.torch import save_file

from foldrace.config.hyperparameters import KNOBS
from foldrace.config.ranges import Value
from foldrace.trainables import spec as spec_module
from foldrace.trainables.losses import CLASS_WEIGHTS, LOSSES
from foldrace.trainables.models.heads import HEADS
from foldrace.trainables.schedules import SCHEDULES
from foldrace.trainables.trial import run_trial
from tests.trainables.test_trial import Watcher, result_files, spec_for

pytestmark = pytest.mark.slow

PLAIN: dict[str, Value] = {
    "epochs": 3, "dropout": 0.1, "drop_path": 0.0, "mixup_prob": 0.0, "label_smoothing": 0.0,
    "image_size": 32, "batch_size": 20, "lr": 2e-3, "ema_epochs": 0.0,
}  # fmt: skip
# knob -> (another value, what must be on for it to matter)
CHANGES: dict[str, tuple[Value, dict[str, Value]]] = {
    "lr": (1e-3, {}),
    "weight_decay": (0.5, {}),
    "warmup": (0.5, {}),
    "head_lr": (10.0, {}),
    "lr_batch": (40, {}),
    "batch_size": (10, {}),
    "dropout": (0.5, {}),
    "drop_path": (0.5, {}),
    "mixup_alpha": (3.0, {"mixup_prob": 1.0}),
    "mixup_prob": (1.0, {}),
    "cutmix_alpha": (0.3, {"cutmix_prob": 1.0}),
    "cutmix_prob": (1.0, {}),
    "mix_off": (0.5, {"mixup_prob": 1.0}),
    "label_smoothing": (0.2, {}),
    "ema_epochs": (2.0, {}),
    "optimizer": ("sgd", {}),
    "momentum": (0.5, {}),
    "layer_decay": (0.5, {}),
    "schedule": ("one_cycle", {}),
    "cycles": (2, {}),
    "lr_factor": (0.5, {"schedule": "step", "lr_patience": 1}),
    "lr_patience": (1, {"schedule": "step"}),
    "sam_rho": (0.1, {}),
    "rdrop_alpha": (2.0, {}),
    "loss": ("focal", {}),
    "focal_gamma": (4.0, {"loss": "focal"}),
    "focal_alpha": (0.01, {"loss": "focal", "optimizer": "sgd"}),  # 0.5 is undone by the clipping
    "class_weights": ("balanced", {}),
    "class_weight_beta": (0.5, {"class_weights": "effective"}),
    "head": ("mlp", {}),
    "image_size": (48, {}),
    "epochs": (2, {}),
    "freeze_epochs": (2, {}),
    "unfreeze_epochs": (2, {"freeze_epochs": 1}),
    "frozen_layers": (0.5, {}),
    "l2_sp": (0.5, {}),
    "stoch_norm": (0.5, {}),
    "policy": ("heavy", {}),
    "flip": (0.5, {}),
    "resize": ("crop", {}),
    "random_erasing": (0.9, {}),
    "size_start": (0.5, {}),
    "snapshots": (2, {}),
    "precision": ("bf16", {}),
    "pretrained": ("weights.safetensors", {}),
    "clip_grad": (0.01, {"optimizer": "sgd"}),
}
# knob -> the predictions of the weights that are kept beside the raw ones
FURTHER: dict[str, tuple[str, ...]] = {
    "ema_epochs": ("oof_ema.npy",),
    "snapshots": ("oof_snap1.npy", "oof_snap2.npy"),
}


_known: dict[str, dict[str, bytes]] = {}


@pytest.fixture
def train(
    make_tiny_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., dict[str, bytes]]:
    """The result files of a trial with these hyperparameters; the same are trained only once. All
    have one seed: else another hyperparameter would change a result by its seed alone."""
    monkeypatch.setattr(spec_module, "candidate_seed", lambda *_: 0)
    monkeypatch.chdir(tmp_path)

    def result(backbone: str = "timm/test_convnext", **knobs: Value) -> dict[str, bytes]:
        key = repr((backbone, sorted(knobs.items())))
        if key not in _known:
            if "pretrained" in knobs:
                weights = timm.create_model("test_convnext").state_dict()
                save_file(weights, str(knobs["pretrained"]))
            run = make_tiny_run(f"run{len(_known)}")
            spec = spec_for(run, backbone=backbone, **PLAIN | knobs)
            assert run_trial(spec, Watcher()).status == "finished"
            _known[key] = result_files(run, spec)
        return _known[key]

    return result


def test_every_hyperparameter_is_here() -> None:
    """Those that only change how a trial is computed have tests of their own."""
    taught = {"distill_alpha", "distill_temperature"}  # they need a teacher: test_distillation.py
    changing = {knob.name for knob in KNOBS.values() if knob.changes_result} - taught
    assert CHANGES.keys() == changing


@pytest.mark.parametrize("knob", [knob for knob in CHANGES if knob not in FURTHER])
def test_another_value_gives_other_predictions(
    train: Callable[..., dict[str, bytes]], knob: str
) -> None:
    value, needed = CHANGES[knob]
    backbone = "timm/test_resnet" if knob in ("size_start", "stoch_norm") else "timm/test_convnext"
    changed, plain = train(backbone, **needed | {knob: value}), train(backbone, **needed)
    assert changed["oof.npy"] != plain["oof.npy"]


@pytest.mark.parametrize("knob", FURTHER)
def test_further_weights_predict_otherwise_and_leave_the_raw_ones_alone(
    train: Callable[..., dict[str, bytes]], knob: str
) -> None:
    files, plain = train(**{knob: CHANGES[knob][0]}), train()
    assert files["oof.npy"] == plain["oof.npy"]
    assert len({files[name] for name in ("oof.npy", *FURTHER[knob])}) == 1 + len(FURTHER[knob])


ROWS = [
    *(("loss", name) for name in LOSSES),
    *(("head", name) for name in HEADS),
    *(("schedule", name) for name in SCHEDULES),
    *(("class_weights", name) for name in CLASS_WEIGHTS),
    ("optimizer", "timm/lamb"),
    ("optimizer", "pytorch_optimizer/lion"),
]


@pytest.mark.parametrize(("knob", "name"), ROWS)
def test_every_row_trains(train: Callable[..., dict[str, bytes]], knob: str, name: str) -> None:
    assert "oof.npy" in train(**{knob: name})


@pytest.mark.parametrize(
    "knobs",
    [
        {"sam_rho": 0.05, "rdrop_alpha": 1.0, "mixup_prob": 0.5, "cutmix_prob": 0.5},
        {"loss": "bce", "rdrop_alpha": 1.0, "label_smoothing": 0.1, "ema_epochs": 0.9},
        {"freeze_epochs": 1, "unfreeze_epochs": 2, "layer_decay": 0.7, "sam_rho": 0.1},
        {"cycles": 3, "snapshots": 2, "ema_epochs": 0.9, "random_erasing": 1.0},
        {"frozen_layers": 0.4, "l2_sp": 0.01, "stoch_norm": 0.5, "sam_rho": 0.1, "head_lr": 5.0},
    ],
    ids=["used cars", "one-hot", "frozen", "snapshots", "fine-tuning"],
)
def test_techniques_together(
    train: Callable[..., dict[str, bytes]], knobs: dict[str, Value]
) -> None:
    files = train("stack(timm/test_convnext,timm/test_resnet@48)", **knobs)
    assert ("oof_ema.npy" in files) == ("ema_epochs" in knobs)
    assert ("oof_snap2.npy" in files) == ("snapshots" in knobs)
