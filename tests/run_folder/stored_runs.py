"""Small run folders for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foldrace.config.schema import DataConfig, FoldsConfig, SearchConfig, SweepConfig
from foldrace.run_folder.blend_records import EnsembleRecord, MemberRecord
from foldrace.run_folder.records import (
    Oof,
    TrialRecord,
    VariantScore,
)
from foldrace.run_folder.store import RunStore

CLASSES = ("가", "b", "c")
PARAMS: dict[str, int | float] = {"lr": 1e-3, "batch_size": 32}


def config(k: int = 3) -> SweepConfig:
    return SweepConfig(
        name="test",
        data=DataConfig(train="/data/train.csv"),
        folds=FoldsConfig(k=k),
        search=SearchConfig(backbones=("timm/resnet18",)),
    )


def folds_text(fold: NDArray[np.int64]) -> str:
    lines = [f"{i}.png,{CLASSES[i % 3]},,{f}" for i, f in enumerate(fold)]
    return "\n".join(["image_path,target,group,fold", *lines]) + "\n"


def new_store(root: Path | str, fold: NDArray[np.int64]) -> RunStore:
    store = RunStore(root)
    store.create(config(int(fold.max()) + 1), folds_text(fold), CLASSES)
    return store


def trial_record(store: RunStore, fold: int, **changes: object) -> TrialRecord:
    values: dict[str, object] = {
        "candidate": "c0000",
        "fold": fold,
        "status": "finished",
        "backbone": "timm/resnet18",
        "params": PARAMS,
        "folds_hash": store.folds().hash,
        "seed": 1,
    }
    return TrialRecord.model_validate(values | changes)


def save_fold(
    store: RunStore,
    fold: int,
    prob: NDArray[np.float32],
    candidate: str = "c0000",
    attempt: str = "",
) -> TrialRecord:
    """A finished trial with the same probabilities as raw and, sharpened, as EMA."""
    rows = np.flatnonzero(store.folds().fold == fold)
    labels = store.labels()[rows]
    oof, scores = {}, {}
    for variant, p in (("raw", prob[rows]), ("ema", sharpened(prob)[rows])):
        true = p[np.arange(len(rows)), labels]
        oof[variant] = Oof(np.log(p).astype(np.float16), true)
        loss = float(-np.log(true.astype(np.float64)).mean())
        scores[variant] = VariantScore(
            rows=len(rows),
            val_logloss=loss,
            calibrated_logloss=loss,
            val_acc=float((p.argmax(1) == labels).mean()),
            epoch=fold,
        )
    record = trial_record(
        store, fold, candidate=candidate, variants=scores, epochs_trained=4, seconds=1.5,
        attempt=attempt,
    )  # fmt: skip
    weights = {"raw": b"raw weights", "ema": b"ema weights"}
    return store.save_trial(record, oof, rows, weights, "epoch,train_loss\n0,1\n")


def sharpened(prob: NDArray[np.float32]) -> NDArray[np.float32]:
    squared = prob**2
    return np.asarray(squared / squared.sum(1, keepdims=True), dtype=np.float32)


def exact(prob: NDArray[np.float32]) -> NDArray[np.float64]:
    """Rows that sum to 1 in float64."""
    wide = prob.astype(np.float64)
    return np.asarray(wide / wide.sum(1, keepdims=True))


def ensemble_record(store: RunStore) -> EnsembleRecord:
    return EnsembleRecord(
        method="greedy",
        members=(MemberRecord(candidate="c0000", variant="raw", weight=1.0),),
        oof_logloss=0.5,
        crossfit_logloss=0.6,
        crossfit_se=0.01,
        certificate=0.001,
        best_single_oof_logloss=0.5,
        best_single="c0000 raw",
        oof_accuracy=0.9,
        single_crossfit_logloss=0.7,
        members_considered=1,
        candidates_considered=1,
        folds_hash=store.folds().hash,
    )
