"""Run folders with made-up OOF rows, for tests of what reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foldrace.config.schema import DataConfig, FoldsConfig, SearchConfig, SweepConfig
from foldrace.run_folder.oof import npy
from foldrace.run_folder.records import CandidateRecord, Oof, TrialRecord, VariantScore
from foldrace.run_folder.store import RunStore

ROWS, CLASSES, K = 90, ("a", "b", "c"), 3
FOLD = np.random.default_rng(1).permutation(ROWS) % K
LABELS = np.random.default_rng(2).integers(0, 3, ROWS)


@dataclass(frozen=True)
class Table:
    """What folds.csv and classes.json say."""

    fold: NDArray[np.int64]
    labels: NDArray[np.int64]
    paths: tuple[str, ...]
    classes: tuple[str, ...] = CLASSES
    groups: tuple[str, ...] = ("",) * ROWS

    @property
    def text(self) -> str:
        names = [CLASSES[label] for label in self.labels]
        columns = (self.paths, names, self.groups, self.fold.tolist())
        lines = [",".join(map(str, row)) for row in zip(*columns, strict=True)]
        return "\n".join(["image_path,target,group,fold", *lines]) + "\n"


TABLE = Table(FOLD, LABELS, tuple(f"{i}.png" for i in range(ROWS)))


def make_run(root: Path | str, table: Table = TABLE) -> RunStore:
    """A run without candidates."""
    config = SweepConfig(
        name="synthetic",
        data=DataConfig(train="/nowhere/train.csv"),
        folds=FoldsConfig(k=int(table.fold.max()) + 1),
        search=SearchConfig(backbones=("timm/x",)),
    )
    store = RunStore(root)
    store.create(config, table.text, table.classes)
    return store


def random_prob(seed: int, noise: float = 1.0) -> NDArray[np.float64]:
    """(ROWS, 3) of a model that is somewhat right and overconfident."""
    logits = 1.5 * np.eye(3)[LABELS] + noise * np.random.default_rng(seed).normal(size=(ROWS, 3))
    odds = np.exp(2 * logits)
    return np.asarray(odds / odds.sum(axis=1, keepdims=True))


def add_candidate(
    store: RunStore,
    name: str,
    prob: NDArray[np.float64],
    folds: Sequence[int] = (0, 1, 2),
    variant: str = "raw",
) -> None:
    """A candidate with these finished folds of `prob` (ROWS, 3)."""
    store.save_candidate(CandidateRecord(candidate=name, backbone="timm/x", params={"lr": 0.1}))
    for fold in folds:
        rows = np.flatnonzero(store.folds().fold == fold)
        true = prob[rows, LABELS[rows]].astype(np.float32)
        score = VariantScore(
            rows=len(rows), val_logloss=1, calibrated_logloss=1, val_acc=0, epoch=0
        )
        record = TrialRecord(
            candidate=name, fold=fold, status="finished", backbone="timm/x", params={"lr": 0.1},
            folds_hash=store.folds().hash, seed=1, variants={variant: score},
        )  # fmt: skip
        oof = Oof(np.log(prob[rows]).astype(np.float16), true)
        store.save_trial(record, {variant: oof}, rows, {variant: b"weights"})


def rewrite(
    store: RunStore, candidate: str, fold: int, name: str, array: NDArray[np.generic]
) -> None:
    """An array in place of another one, as if its trial had written it."""
    data = npy(array)
    store.files.write(f"{store.trial_folder(candidate, fold)}/{name}", data)
    record = store.trial(candidate, fold)
    assert record is not None
    digests = record.digests | {name: hashlib.sha256(data).hexdigest()}
    store.save_trial(record.model_copy(update={"digests": digests}))
