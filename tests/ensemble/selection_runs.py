"""Run folders with several variants a candidate, for tests of the blend of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foldrace.config.schema import (
    DataConfig,
    EnsembleConfig,
    FoldsConfig,
    SearchConfig,
    SweepConfig,
)
from foldrace.ensemble.selection.eligible import Prices
from foldrace.ensemble.selection.select import Request, blend_run
from foldrace.run_folder.blend_records import EnsembleRecord
from foldrace.run_folder.records import CandidateRecord, Oof, TrialRecord, VariantScore
from foldrace.run_folder.store import RunStore

ROWS, CLASSES, K = 90, ("a", "b", "c"), 3
FOLD = np.random.default_rng(1).permutation(ROWS) % K
SUFFIX = {"raw": "", "ema": "_ema"}
PLAIN = EnsembleConfig(calibrate=False)
LABELS = np.random.default_rng(2).integers(0, 3, ROWS)


def blend(store: RunStore, config: EnsembleConfig) -> EnsembleRecord:
    """Without prices and further members."""
    return blend_run(store, config, Request(lambda members: Prices({}, {})))


def make_store(root: Path, k: int = K, groups: NDArray[np.int64] | None = None) -> RunStore:
    """An empty run. With k: 1 a third of the rows are scored; `groups` (ROWS,) may be divided."""
    fold = FOLD if k > 1 else np.where(FOLD == 0, 0, -1)
    config = SweepConfig(
        name="synthetic",
        data=DataConfig(train="/nowhere/train.csv"),
        folds=FoldsConfig(k=k),
        search=SearchConfig(backbones=("timm/x",)),
    )
    lines = [
        f"{i}.png,{CLASSES[c]},{'' if groups is None else groups[i]},{f}"
        for i, (c, f) in enumerate(zip(LABELS, fold, strict=True))
    ]
    store = RunStore(root)
    store.create(config, "image_path,target,group,fold\n" + "\n".join(lines) + "\n", CLASSES)
    return store


def add(
    store: RunStore,
    number: int,
    noise: float = 1.0,
    folds: tuple[int, ...] = (0, 1, 2),
    variants: tuple[str, ...] = ("raw",),
    lost: str | None = None,
    backbone: str = "timm/x",
    sharpness: float = 1.0,
    seed: int | None = None,
) -> dict[str, NDArray[np.float64]]:
    """A candidate with these finished folds; `lost` is the status of one more. `sharpness` above 1
    makes it overconfident; two of one `seed` (default: the number) are alike. Gives variant ->
    (ROWS, C)."""
    name = f"c{number:04d}"
    store.save_candidate(CandidateRecord(candidate=name, backbone=backbone, params={"lr": 0.1}))
    rng = np.random.default_rng((7, number if seed is None else seed))
    prob: dict[str, NDArray[np.float64]] = {}
    for variant in variants:
        logits = sharpness * (1.5 * np.eye(3)[LABELS] + noise * rng.normal(size=(ROWS, 3)))
        prob[variant] = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for fold in folds:
        rows = np.flatnonzero(store.folds().fold == fold)
        oof = {}
        for v in variants:
            true = prob[v][rows, LABELS[rows]]
            oof[v] = Oof(np.log(prob[v][rows]).astype(np.float16), true.astype(np.float32))
        scores = {
            v: VariantScore(rows=len(rows), val_logloss=1, calibrated_logloss=1, val_acc=0, epoch=0)
            for v in oof
        }
        weights = dict.fromkeys(variants, b"weights")
        store.save_trial(_record(store, name, fold, "finished", scores), oof, rows, weights)
    if lost is not None:
        store.save_trial(_record(store, name, len(folds), lost, {}))
    return prob


def _record(
    store: RunStore, name: str, fold: int, status: str, scores: dict[str, VariantScore]
) -> TrialRecord:
    return TrialRecord(
        candidate=name, fold=fold, status=status, backbone="timm/x", params={"lr": 0.1},  # type: ignore[arg-type]
        folds_hash=store.folds().hash, seed=1, variants=scores,
    )  # fmt: skip


def stored(prob: NDArray[np.float64]) -> NDArray[np.float64]:
    """(ROWS, C) as oof.npy keeps it: float16 logarithms, here with rows that sum to 1."""
    kept = np.exp(np.log(prob).astype(np.float16).astype(np.float64))
    return np.asarray(kept / kept.sum(axis=1, keepdims=True))


def true_column(prob: NDArray[np.float64]) -> NDArray[np.float64]:
    """(ROWS,) as true_prob.npy keeps it."""
    return prob[np.arange(ROWS), LABELS].astype(np.float32).astype(np.float64)


def loss_of(prob: NDArray[np.float64], rows: NDArray[np.bool_] | None = None) -> float:
    true = prob[np.arange(ROWS), LABELS]
    return float(-np.log(true if rows is None else true[rows]).mean())
