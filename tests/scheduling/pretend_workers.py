"""Workers of a sweep that train nothing: the real `Sweep`, race, study and run folder, and trials
that write what real ones write, epoch by epoch, and end in every way that a trial can end.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
from scipy.special import log_softmax

from foldrace.config.hyperparameters import TrialParams
from foldrace.config.schema import (
    DataConfig,
    FoldsConfig,
    RaceConfig,
    ResourcesConfig,
    SearchConfig,
    SweepConfig,
)
from foldrace.run_folder.records import CandidateSummary, Oof, TrialRecord, VariantScore
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.events import SweepListener
from foldrace.scheduling.room import Room
from foldrace.scheduling.rungs import rungs_of
from foldrace.scheduling.search.export import StudyExporter, open_exporter
from foldrace.scheduling.search.study import open_study
from foldrace.scheduling.state import FoldTask
from foldrace.scheduling.sweep import FINISHED, Sweep
from foldrace.search_spaces.space import build_space

K, ROWS, EPOCHS = 3, 45, 4
CLASSES = ("a", "b", "c")
LABELS = np.arange(ROWS) % 3
FOLDS = np.arange(ROWS) // 3 % K
Skill = Callable[[int], float]
"""Number of a candidate -> how good it is after all its epochs."""


def sweep_config(
    rule: str = "gain",
    candidates: int = 8,
    *,
    sampler: str = "random",
    fold_trials: int | None = None,
    max_failures: int = 0,
    race: Mapping[str, object] | None = None,
) -> SweepConfig:
    """Two backbones, three folds; nothing of it is trained."""
    return SweepConfig(
        name="any-order",
        data=DataConfig(train="/nowhere/train.csv"),
        folds=FoldsConfig(k=K),
        search=SearchConfig(
            backbones=("timm/test_vit", "timm/test_resnet"),
            candidates=candidates,
            fold_trials=fold_trials,
            sampler=sampler,  # type: ignore[arg-type]
            space={"epochs": EPOCHS},
        ),
        race=RaceConfig.model_validate(
            {"rule": rule, "grace": 0.25, "reduction": 2} | dict(race or {})
        ),
        resources=ResourcesConfig(max_failures=max_failures),
    )


@dataclass
class Live:
    """A fold trial that runs."""

    trial_id: str
    task: FoldTask
    judged: bool
    epochs: int
    """Epochs trained, in all its attempts."""
    saved: int
    """Epochs of the state that is saved."""

    @property
    def key(self) -> tuple[str, int]:
        """Candidate and fold."""
        return self.task.candidate.candidate, self.task.fold


@dataclass
class SettledNames(SweepListener):
    """The candidates that it was told are settled."""

    names: list[str] = field(default_factory=list)

    def settled(self, summary: CandidateSummary) -> None:
        """Keep the name."""
        self.names.append(summary.candidate.candidate)


class PretendWorkers:
    """Workers, session after session, with the rules that must never be broken."""

    def __init__(
        self,
        root: Path,
        config: SweepConfig,
        slots: int = 2,
        rng: random.Random | None = None,
        skill: Skill = lambda number: (0.2, 0.5, 1.0, 2.0)[number % 4],
        room: Room | None = None,
    ) -> None:
        """`room`: that of other trials than all alike, of which `slots` fit at most."""
        self.config, self.slots, self._skill = config, slots, skill
        self.room = room or Room(lambda: self.slots)
        self.rng = rng or random.Random(0)
        self.store = RunStore(root)
        lines = [f"{i}.png,{CLASSES[LABELS[i]]},,{FOLDS[i]}" for i in range(ROWS)]
        folds = "\n".join(["image_path,target,group,fold", *lines, ""])
        self.store.create(config, folds, CLASSES)
        self.trained: Counter[tuple[str, int, int]] = Counter()  # epochs whose result was not lost
        self.started: list[tuple[str, int]] = []
        self.failed: set[tuple[str, int]] = set()
        self.sessions = 0
        self.clock: Iterator[float] = count(step=30.0)  # seconds: each look at it takes that long
        self.begin()

    def begin(self) -> None:
        """A driver starts on what the run folder holds."""
        self.sessions += 1
        space, problems = build_space(self.config, "")
        assert not problems
        study = open_study(self.store, self.config, space)
        self.sweep = Sweep(
            self.store, self.config, study, self.room, clock=lambda: next(self.clock)
        )
        self.settled = SettledNames()
        exporter = open_exporter(self.store, self.config, space)
        assert isinstance(exporter, StudyExporter)
        self.exporter = exporter
        self.sweep.listeners += [self.settled, exporter, *self.more_listeners()]
        self.sweep.replay(self.store.summaries(running=True))
        self.live: list[Live] = []
        self._asked = 0

    def more_listeners(self) -> list[SweepListener]:
        """Further listeners of a session, which hear of earlier ones too."""
        return []

    def fill(self) -> bool:
        """Ask until there is nothing; True at the end of the sweep."""
        while True:
            task = self.ask()
            if task is None and not self.live and self.sweep.failures.outage is not None:
                continue  # until it is time to look again
            if not isinstance(task, FoldTask):
                assert (task == FINISHED) == (not self.live)
                return not self.live

    def ask(self) -> FoldTask | str | None:
        """The sweep's next suggestion; a fold trial has started then."""
        trial_id = f"{self.sessions}-{self._asked}"
        self._asked += 1
        task = self.sweep.suggest(trial_id)
        if isinstance(task, FoldTask):
            self._start(trial_id, task)
        return task

    def run(self) -> list[CandidateSummary]:
        """Every trial goes on epoch by epoch, in turn, and ends well."""
        while not self.fill():
            for trial in list(self.live):
                self.train(trial)
        return self.store.summaries()

    def train(self, trial: Live) -> None:
        """One epoch, and what comes with it: a rung, a parked trial, or the end."""
        self.epoch(trial)
        if trial.epochs == EPOCHS:
            self.end(trial, "finish")
        elif self.rung(trial):
            self.leave(trial)

    def epoch(self, trial: Live) -> None:
        """One epoch is trained and reported."""
        trial.epochs += 1
        self.trained[(*trial.key, trial.epochs)] += 1
        self.sweep.epoch_ended(trial.trial_id, trial.epochs, self.loss(trial, trial.epochs))

    def rung(self, trial: Live) -> bool:
        """At a rung: everything is written first, then the race says whether it is to leave."""
        params = TrialParams.from_dict(trial.task.candidate.params)
        epochs = {rung.epoch for rung in rungs_of(self.config.race, params)}
        if not trial.judged or trial.epochs not in epochs:
            return False
        column = np.exp(self.true_log_prob(trial, trial.epochs)).astype(np.float32)
        self.store.save_rung(*trial.key, trial.epochs, self.log(trial), {"raw": column})
        self.save(trial)
        return self.sweep.rung_reached(trial.trial_id, trial.epochs)

    def save(self, trial: Live) -> None:
        """The state after an epoch, from which an interrupted trial goes on."""
        self.store.save_resume_state(*trial.key, str(trial.epochs).encode())
        trial.saved = trial.epochs

    def leave(self, trial: Live) -> None:
        """It has left where it was parked."""
        self.live.remove(trial)
        self.sweep.trial_over(trial.trial_id)

    def end(self, trial: Live, how: str) -> None:
        """finish, diverge, raise, die, or vanish without a word."""
        self.live.remove(trial)
        self.write(trial, how)
        self.sweep.trial_over(trial.trial_id, silent=how == "vanish")

    def write(self, trial: Live, how: str) -> None:
        """What the worker leaves."""
        if how == "finish":
            while trial.epochs < EPOCHS:
                trial.epochs += 1
                self.trained[(*trial.key, trial.epochs)] += 1
            rows, log_prob = np.flatnonzero(trial.task.fold == FOLDS), self.log_prob(trial, EPOCHS)
            true = self.true_log_prob(trial, EPOCHS)
            oof = Oof(log_prob.astype(np.float16), np.exp(true).astype(np.float32))
            loss = -float(true.mean())
            score = VariantScore(
                rows=len(rows),
                val_logloss=loss,
                calibrated_logloss=loss,
                val_acc=0.5,
                epoch=0,
            )
            record = self.record(trial, "finished", score)
            self.store.save_trial(record, {"raw": oof}, rows, log=self.log(trial))
            return
        self.failed.add(trial.key)
        for epoch in range(trial.saved + 1, trial.epochs + 1):  # the next attempt trains them
            self.trained[(*trial.key, epoch)] -= 1
        if how in ("diverge", "raise"):
            status = "diverged" if how == "diverge" else "failed"
            self.store.save_trial(self.record(trial, status))

    def record(self, trial: Live, status: str, score: VariantScore | None = None) -> TrialRecord:
        """The record of a trial that ended."""
        return TrialRecord(
            candidate=trial.key[0],
            fold=trial.key[1],
            status=status,  # type: ignore[arg-type]
            backbone=trial.task.candidate.backbone,
            params=trial.task.candidate.params,
            folds_hash=self.store.folds().hash,
            seed=0,
            variants={} if score is None else {"raw": score},
            epochs_trained=trial.epochs,
            seconds=float(trial.epochs),
            error="boom" if status == "failed" else None,
        )

    # -- what a trial gives

    def log_prob(self, trial: Live, epochs: int) -> np.ndarray:
        """(n, 3) of the fold's rows; it gets better with each epoch."""
        number = int(trial.key[0][1:])
        rng = np.random.default_rng((number, trial.task.fold))
        skill = self._skill(number) * epochs / EPOCHS
        logits = skill * np.eye(3)[LABELS] + 0.3 * rng.normal(size=(ROWS, 3))
        return np.asarray(log_softmax(2 * logits, axis=1))[trial.task.fold == FOLDS]

    def true_log_prob(self, trial: Live, epochs: int) -> np.ndarray:
        """(n,) of the true classes."""
        rows = self.log_prob(trial, epochs)
        return np.asarray(rows[np.arange(len(rows)), LABELS[trial.task.fold == FOLDS]])

    def loss(self, trial: Live, epochs: int) -> float:
        """Log loss after so many epochs."""
        return -float(self.true_log_prob(trial, epochs).mean())

    def log(self, trial: Live) -> str:
        """The text of train_log.csv so far."""
        lines = [f"{self.loss(trial, e + 1)},nan,1.0" for e in range(trial.epochs)]
        head = "val_calibrated_logloss,ema_val_calibrated_logloss,seconds"
        return "\n".join([head, *lines, ""])

    # -- the rules

    def _start(self, trial_id: str, task: FoldTask) -> None:
        key = task.candidate.candidate, task.fold
        assert self.store.trial(*key) is None, f"{key} has ended"
        assert key not in {trial.key for trial in self.live}
        assert len(self.live) < self.slots
        saved = self.store.resume_state(*key)
        epochs = 0 if saved is None else int(saved)
        if saved is None and key in self.failed:  # the last of several attempts begins anew
            for epoch in range(1, EPOCHS + 1):
                self.trained[(*key, epoch)] = 0
        self.store.clear_trial(*key)
        judged = self.sweep.running[trial_id].judged
        self.live.append(Live(trial_id, task, judged, epochs, epochs))
        self.started.append(key)
