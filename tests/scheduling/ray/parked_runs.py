"""A sweep of four candidates in which one is parked and goes on; its fold trained undisturbed."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from foldrace.config.schema import SweepConfig
from foldrace.dataset.folds import folds_csv, make_folds
from foldrace.dataset.manifest import read_manifest
from foldrace.run_folder.records import CandidateRecord, TrialRecord
from foldrace.run_folder.store import RunStore
from foldrace.trainables.spec import EpochReport, TrialSpec
from foldrace.trainables.trial import run_trial

K, EPOCHS, RUNG_EPOCHS = 2, 8, 4
FIRST, PARKED, UNSAVED, LAST = "c0000", "c0001", "c0002", "c0003"
"""The second is parked, and is among the best half when all four have reached the rung: it goes on.
The third one's optimiser keeps objects: its state cannot be saved, so it is never parked. The
fourth is parked for good."""
_GOOD, _FAIR, _HOPELESS = 3e-3, 5e-4, 1e-7


def sweep_config(images: Path) -> dict[str, Any]:
    """The config of such a sweep, with everything in training that has a state."""
    rates = (_GOOD, _FAIR, _HOPELESS, _HOPELESS)
    params: list[dict[str, Any]] = [
        {"lr": lr, "weight_decay": 0.01 + i / 1e3} for i, lr in enumerate(rates)
    ]
    params[0]["batch_size"] = 3  # so many steps that it is the best by far
    params[2]["optimizer"] = "pytorch_optimizer/conda"
    return {
        "name": "parked",
        "data": {"train": str(images)},
        "folds": {"k": K},
        "search": {
            "backbones": ["timm/test_resnet"], "candidates": len(params), "sampler": "list",
            "points": [{"backbone": "timm/test_resnet", "params": values} for values in params],
            "space": {"batch_size": 10, "optimizer": "adamw"},
        },
        "race": {"z": 0.0, "grace": RUNG_EPOCHS / EPOCHS, "reduction": 2},
        "training": {
            "epochs": EPOCHS, "image_size": 32, "pretrained": False,
            "dropout": 0.2, "ema_epochs": 0.9,
        },
        "augment": {"policy": "light"},
        "resources": {"cpus_per_trial": 1, "max_concurrent": 1, "max_failures": 0},
    }  # fmt: skip


def new_store(root: Path, config: SweepConfig) -> RunStore:
    """A run folder without candidates."""
    manifest, store = read_manifest(config.data), RunStore(root)
    folds = folds_csv(manifest, make_folds(manifest, config.folds))
    store.create(config, folds, manifest.classes)
    return store


class _Silent:
    """Listens to no report, and never asks for the end."""

    def report(self, epoch: EpochReport) -> None: ...

    def stop_requested(self) -> bool:
        return False


def train_alone(root: Path, config: SweepConfig, candidate: CandidateRecord) -> RunStore:
    """The candidate's first fold in a run folder of its own, without a sweep."""
    store = new_store(root, config)
    store.save_candidate(candidate)
    spec = TrialSpec(
        run=store.root, image_root=config.data.train, candidate=candidate.candidate, fold=0,
        use_gpu=False,
    )  # fmt: skip
    run_trial(spec, _Silent())
    return store


def assert_same_first_fold(one: RunStore, other: RunStore, candidate: str) -> None:
    """Bit for bit, but for times."""
    folders = [Path(store.root) / store.trial_folder(candidate, 0) for store in (one, other)]
    names = {p.name for p in folders[1].iterdir()} - {"trial.json", "train_log.csv"}
    assert {"oof.npy", "oof_ema.npy", "best.safetensors", "best_ema.safetensors"} <= names
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    logs = [[line | {"seconds": ""} for line in read_log(folder)] for folder in folders]
    assert logs[0] == logs[1]
    records = [record_of(store, candidate) for store in (one, other)]
    assert records[0].variants == records[1].variants and records[0].seed == records[1].seed


def read_log(folder: Path) -> list[dict[str, str]]:
    """The lines of a train_log.csv."""
    return list(csv.DictReader(io.StringIO((folder / "train_log.csv").read_text())))


def record_of(store: RunStore, candidate: str, fold: int = 0) -> TrialRecord:
    """The record of a fold trial that has one."""
    record = store.trial(candidate, fold)
    assert record is not None
    return record
