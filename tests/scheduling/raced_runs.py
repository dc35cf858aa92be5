"""Run folders whose candidates have made-up OOF rows, and the race's blend by its definition.

The reference shares no code with the race: temperatures and weights are scipy's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax

from foldrace.config.schema import DataConfig, FoldsConfig, SearchConfig, SweepConfig
from foldrace.run_folder.records import (
    CandidateRecord,
    CandidateSummary,
    Oof,
    RaceDecision,
    TrialRecord,
    VariantScore,
    summarise,
)
from foldrace.run_folder.store import RunStore
from tests.ensemble.temperature_reference import smoothed_temperature

Floats = NDArray[np.float64]
CLASSES = ("a", "b", "c")


@dataclass
class RacedRun:
    """A run folder; candidates are given as log-probabilities (N, 3)."""

    store: RunStore
    labels: NDArray[np.int64]
    fold: NDArray[np.int64]

    @classmethod
    def make(cls, root: Path, rows: int = 240, k: int = 3) -> RacedRun:
        rng = np.random.default_rng(0)
        fold = rng.permutation(rows) % k if k > 1 else np.where(rng.random(rows) < 0.5, 0, -1)
        labels = rng.integers(0, 3, rows)
        config = SweepConfig(
            name="raced",
            data=DataConfig(train="/nowhere/train.csv"),
            folds=FoldsConfig(k=k),
            search=SearchConfig(backbones=("timm/x",)),
        )
        lines = [
            f"{i}.png,{CLASSES[y]},,{f}" for i, (y, f) in enumerate(zip(labels, fold, strict=True))
        ]
        store = RunStore(root)
        store.create(config, "\n".join(["image_path,target,group,fold", *lines, ""]), CLASSES)
        return cls(store, labels, fold)

    def model(self, seed: int, skill: float, sharpness: float = 2.0) -> Floats:
        """(N, 3) log-probabilities of an overconfident model."""
        noise = np.random.default_rng(seed).normal(size=(len(self.labels), 3))
        return log_softmax(sharpness * (skill * np.eye(3)[self.labels] + noise), axis=1)

    def finish(
        self,
        candidate: str,
        fold: int,
        variants: Mapping[str, Floats],
        soups: tuple[str, ...] = (),
    ) -> TrialRecord:
        """A fold trial ends well, with these variants."""
        rows = np.flatnonzero(self.fold == fold)
        oof, scores = {}, {}
        for name, log_prob in variants.items():
            true = log_prob[rows, self.labels[rows]]
            oof[name] = Oof(log_prob[rows].astype(np.float16), np.exp(true).astype(np.float32))
            scores[name] = VariantScore(
                rows=len(rows), val_logloss=float(-true.mean()),
                calibrated_logloss=float(-true.mean()), val_acc=0.5, epoch=0,
                ingredients=("c0000 raw",) if name in soups else (),
            )  # fmt: skip
        record = TrialRecord(
            candidate=candidate, fold=fold, status="finished", backbone="timm/x", params={},
            folds_hash=self.store.folds().hash, seed=0, variants=scores, epochs_trained=10,
        )  # fmt: skip
        if not self.store.files.exists(f"trials/{candidate}/candidate.json"):
            made = CandidateRecord(candidate=candidate, backbone="timm/x", params={})
            self.store.save_candidate(made)
        self.store.save_trial(record, oof, rows)
        return record

    def summary(self, candidate: str) -> CandidateSummary:
        (found,) = [s for s in self.store.summaries(True) if s.candidate.candidate == candidate]
        return found

    def judged(self, summary: CandidateSummary, *decisions: RaceDecision) -> CandidateSummary:
        """With further decisions."""
        return summarise(
            summary.candidate, summary.trials, summary.folds, True,
            (*summary.decisions, *decisions),
        )  # fmt: skip

    # -- the reference

    def rows(self, *folds: int) -> NDArray[np.bool_]:
        return np.isin(self.fold, folds)

    def calibrated(self, log_prob: Floats, *folds: int) -> Floats:
        """(n,) true-class probabilities on the rows of the folds, as stored in float16."""
        mine = self.rows(*folds)
        stored = log_prob[mine].astype(np.float16).astype(np.float64)
        scaled = log_softmax(stored / smoothed_temperature(stored, self.labels[mine]), axis=1)
        return np.asarray(np.exp(scaled[np.arange(len(scaled)), self.labels[mine]]))


def optimal_mix(columns: Floats) -> Floats:
    """(N,) the mixture of the columns (M, N) and the constant 1/3 that has the least log loss."""
    members = np.vstack([columns, np.full(columns.shape[1], 1 / 3)])

    def loss(logits: Floats) -> float:
        weights = np.exp(log_softmax(logits))
        return -float(np.log(weights @ members).mean())

    found = minimize(loss, np.zeros(len(members)), method="BFGS", options={"gtol": 1e-8})
    return np.asarray(np.exp(log_softmax(found.x)) @ members)


def gain_by_definition(t: Floats, q: Floats) -> tuple[float, float]:
    """Mean and standard error."""
    x = (np.log(0.9 * q + 0.1 * t) - np.log(q)) / 0.1
    return float(x.mean()), float(x.std(ddof=1) / np.sqrt(len(x)))
