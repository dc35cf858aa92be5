"""Run folders whose candidates have made-up OOF rows, races over them, and the race's blend by its
definition.

The reference shares no code with the race: temperatures and weights are scipy's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax

from foldrace.config.schema import (
    DataConfig,
    FoldsConfig,
    RaceConfig,
    SearchConfig,
    SweepConfig,
)
from foldrace.run_folder.records import (
    CandidateRecord,
    CandidateSummary,
    Oof,
    RaceDecision,
    TrialRecord,
    VariantScore,
)
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.race import Race
from foldrace.scheduling.state import CandidateState, FoldTask, SweepState
from tests.ensemble.temperature_reference import smoothed_temperature

Floats = NDArray[np.float64]
CLASSES = ("a", "b", "c")
EPOCHS = 8


def race_config(**settings: Any) -> RaceConfig:
    """Rungs at a quarter and a half of the schedule, whose better half goes on; grants are rare."""
    return RaceConfig.model_validate({"grace": 0.25, "reduction": 2, "eta": 4} | settings)


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
        seconds: float = 0.0,
        log: str | None = None,
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
            seconds=seconds,
        )  # fmt: skip
        if not self.store.files.exists(f"trials/{candidate}/candidate.json"):
            made = CandidateRecord(candidate=candidate, backbone="timm/x", params={})
            self.store.save_candidate(made)
        self.store.save_trial(record, oof, rows, log=log)
        return record

    def summary(self, candidate: str) -> CandidateSummary:
        (found,) = [s for s in self.store.summaries(True) if s.candidate.candidate == candidate]
        return found

    # -- the reference

    def rows(self, *folds: int) -> NDArray[np.bool_]:
        return np.isin(self.fold, folds)

    def calibrated(self, log_prob: Floats, *folds: int) -> Floats:
        """(n,) true-class probabilities on the rows of the folds, as stored in float16."""
        mine = self.rows(*folds)
        stored = log_prob[mine].astype(np.float16).astype(np.float64)
        scaled = log_softmax(stored / smoothed_temperature(stored, self.labels[mine]), axis=1)
        return np.asarray(np.exp(scaled[np.arange(len(scaled)), self.labels[mine]]))


def log_of(losses: Sequence[float], ema: Sequence[float] | None = None) -> str:
    """The text of a train_log.csv with these calibrated losses by epoch, two seconds an epoch."""
    lines = ["epoch,val_calibrated_logloss,ema_val_calibrated_logloss,seconds"]
    pairs = zip(losses, ema or [math.nan] * len(losses), strict=True)
    return "\n".join([*lines, *(f"{i},{raw},{other},2.0" for i, (raw, other) in enumerate(pairs))])


class Raced:
    """A race over a run folder, told of each event as a sweep tells it."""

    def __init__(self, run: RacedRun, config: RaceConfig, epochs: int = EPOCHS) -> None:
        self.run, self.config, self.epochs = run, config, epochs
        self.state = SweepState(run.store.fold_count, 0)
        self.race = Race(run.store, config, self.state)

    def again(self) -> Raced:
        """The next session, on what is in the run folder."""
        other = Raced(self.run, self.config, self.epochs)
        for summary in self.run.store.summaries(True):
            other.state.add(summary.candidate)
            for trial in summary.trials:
                other.state.end(trial)
            for decision in summary.decisions:
                other.state.decide(decision)
        other.race.replay()
        return other

    def __getitem__(self, number: int) -> CandidateState:
        return self.state[f"c{number:04d}"]

    def add(self, number: int, *folds: int) -> CandidateState:
        """A candidate, and these folds of it start."""
        name = f"c{number:04d}"
        params = {"epochs": self.epochs}
        record = CandidateRecord(candidate=name, backbone="timm/x", params=params)
        self.run.store.save_candidate(record)
        state = self.state.add(record)
        first = self.race.grant_first(state)
        if first is not None:
            self.book(first)
        self.start(number, *folds)
        return state

    def start(self, number: int, *folds: int) -> None:
        for fold in folds:
            self.state.start(FoldTask(self[number].record, fold))

    def book(self, decision: RaceDecision) -> RaceDecision:
        self.run.store.save_decision(decision)
        self.state.decide(decision)
        return decision

    def finish(
        self,
        number: int,
        fold: int,
        models: Mapping[str, Floats],
        *,
        seconds: float = 10.0,
        log: str | None = None,
        soups: tuple[str, ...] = (),
    ) -> RaceDecision:
        """A fold that runs ends well and is judged."""
        name = f"c{number:04d}"
        self.state.end(self.run.finish(name, fold, models, soups, seconds, log))
        self.race.fold_ended(name)
        return self.book(self.race.judge(name, fold))

    def first_fold(self, number: int, model: Floats, seconds: float = 10.0) -> RaceDecision:
        """A candidate with one variant whose first fold has ended well."""
        self.add(number, 0)
        return self.finish(number, 0, {"raw": model}, seconds=seconds)

    def complete(self, number: int, seed: int, skill: float = 1.0) -> RaceDecision:
        """A candidate with two variants, `seed` and `seed` + 100, whose folds end in turn."""
        self.add(number, *range(self.state.folds))
        models = {"raw": self.run.model(seed, skill), "ema": self.run.model(seed + 100, skill)}
        decisions = [self.finish(number, fold, models) for fold in range(self.state.folds)]
        return decisions[-1]

    def reach(
        self,
        number: int,
        losses: Sequence[float],
        models: Mapping[str, Floats] | None = None,
        more: bool = True,
    ) -> RaceDecision | None:
        """A first fold that runs has trained as many epochs as there are losses."""
        name, mine = f"c{number:04d}", np.flatnonzero(self.run.fold == 0)
        columns = {
            variant: np.exp(log_prob[mine, self.run.labels[mine]]).astype(np.float32)
            for variant, log_prob in (models or {}).items()
        }
        self.run.store.save_rung(name, 0, len(losses), log_of(losses), columns)
        return self.race.reach(name, 0, len(losses), more)

    def park(self, number: int, decision: RaceDecision | None) -> RaceDecision:
        """It has left, as the race wanted."""
        assert decision is not None
        self.state.release(f"c{number:04d}", decision.fold)
        return self.book(decision)

    def moves(self, more: bool = True) -> list[tuple[str, int | None]]:
        """What could run now, each at its first place: its kind and the candidate's number."""
        found = self.race.moves(more)
        kinds = ((m.kind, None if m.state is None else m.state.number) for m in found)
        return list(dict.fromkeys(kinds))


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
