"""Run folders with repeated folds and made-up models, one a fold trial; and their OOF means by
reading the trials' files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foldrace.config.schema import DataConfig, FoldsConfig, SearchConfig, SweepConfig
from foldrace.run_folder.records import CandidateRecord, Oof, TrialRecord, VariantScore
from foldrace.run_folder.store import RunStore

ROWS, K, REPEATS, CLASSES = 120, 3, 2, ("a", "b", "c")
_RNG = np.random.default_rng(4)
LABELS = _RNG.integers(0, 3, ROWS)
SPLITS = np.stack([_RNG.permutation(ROWS) % K + r * K for r in range(REPEATS)])
ALL = tuple(range(K * REPEATS))
Floats = NDArray[np.float64]


def repeated_run(root: Path) -> RunStore:
    """Two repeats of three folds, no candidates."""
    config = SweepConfig(
        name="repeated",
        data=DataConfig(train="/nowhere/train.csv"),
        folds=FoldsConfig(k=K, repeats=REPEATS),
        search=SearchConfig(backbones=("timm/x",)),
    )
    lines = [
        f"{i}.png,{CLASSES[label]},,{first},{second}"
        for i, (label, first, second) in enumerate(zip(LABELS, *SPLITS, strict=True))
    ]
    store = RunStore(root)
    text = "\n".join(["image_path,target,group,fold,fold_r1", *lines, ""])
    store.create(config, text, CLASSES)
    return store


def fold_prob(seed: int, fold: int, skill: float = 1.0) -> Floats:
    """(ROWS, 3) of one fold's model."""
    noise = np.random.default_rng((seed, fold)).normal(size=(ROWS, 3))
    odds = np.exp(2.0 * (skill * np.eye(3)[LABELS] + noise))
    return np.asarray(odds / odds.sum(axis=1, keepdims=True))


def finish(
    store: RunStore, number: int, fold: int, skill: float = 1.0, seed: int | None = None
) -> TrialRecord:
    """A fold trial that ended well."""
    name = f"c{number:04d}"
    prob = fold_prob(number if seed is None else seed, fold, skill)
    rows = np.flatnonzero(SPLITS[fold // K] == fold)
    true = prob[rows, LABELS[rows]]
    score = VariantScore(
        rows=len(rows), val_logloss=float(-np.log(true).mean()),
        calibrated_logloss=float(-np.log(true).mean()), val_acc=float((true > 0.5).mean()), epoch=0,
    )  # fmt: skip
    record = TrialRecord(
        candidate=name, fold=fold, status="finished", backbone="timm/x", params={"lr": 0.1},
        folds_hash=store.folds().hash, seed=1, variants={"raw": score},
    )  # fmt: skip
    if not store.files.exists(f"trials/{name}/candidate.json"):
        made = CandidateRecord(candidate=name, backbone="timm/x", params={"lr": 0.1})
        store.save_candidate(made)
    oof = Oof(np.log(prob[rows]).astype(np.float16), true.astype(np.float32))
    return store.save_trial(record, {"raw": oof}, rows, {"raw": b"weights"})


def add(store: RunStore, number: int, folds: Iterable[int] = ALL, skill: float = 1.0) -> None:
    """A candidate with these finished folds."""
    for fold in folds:
        finish(store, number, fold, skill)


def mean_of_files(store: RunStore, number: int, repeats: Iterable[int] = (0, 1)) -> Floats:
    """(ROWS, 3) the mean over the repeats, from the trials' own files."""
    each = []
    for repeat in repeats:
        prob = np.full((ROWS, 3), np.nan)
        for fold in range(repeat * K, (repeat + 1) * K):
            folder = Path(store.root) / f"trials/c{number:04d}/fold{fold}"
            rows = np.load(folder / "rows.npy")
            assert np.isnan(prob[rows]).all()
            prob[rows] = np.exp(np.load(folder / "oof.npy").astype(np.float64))
        each.append(prob)
    return np.asarray(np.mean(each, axis=0))
