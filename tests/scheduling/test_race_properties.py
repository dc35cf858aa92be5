"""Whatever the order of events: the real searcher, scheduler, ledger, race, study and run folder,
driven as Ray Tune does: trials finish, diverge, fail, vanish or are stopped; drivers restart.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from scipy.special import log_softmax

from foldrace.config.schema import (
    DataConfig,
    FoldsConfig,
    RaceConfig,
    ResourcesConfig,
    SearchConfig,
    SweepConfig,
    TrainingConfig,
)
from foldrace.run_folder.records import (
    CandidateRecord,
    CandidateSummary,
    Oof,
    TrialRecord,
    VariantScore,
)
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.budget import Budget
from foldrace.scheduling.ledger import Ledger
from foldrace.scheduling.race import Race
from foldrace.scheduling.ray.fold_asha import FoldASHA
from foldrace.scheduling.ray.fold_searcher import CANDIDATE, FOLD, FoldSearcher
from foldrace.scheduling.ray.fold_trial import RUNG
from foldrace.scheduling.rungs import RungReport
from foldrace.scheduling.search.backbone_allocation import BackboneAllocation
from foldrace.scheduling.search.study import open_study
from foldrace.search_spaces.space import build_space
from tests.conftest import examples

K, ROWS, EPOCHS = 3, 45, 4
CLASSES = ("a", "b", "c")
LABELS = np.arange(ROWS) % 3
FOLDS = np.arange(ROWS) // 3 % K
ENDS = ("finish", "finish silently", "diverge", "raise", "die", "vanish")
OFTEN = (12, 2, 1, 2, 1, 1)  # of each of these


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk() -> Iterator[None]:
    """No power fails here, and thousands of small files are written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@dataclass
class Live:
    """A trial that Tune has."""

    trial_id: str
    candidate: CandidateRecord
    fold: int
    status: str = "RUNNING"
    error_file: str | None = None

    def log_prob(self) -> np.ndarray:
        """(n, 3) of the fold's rows: some candidates are good, most add nothing to them."""
        rng = np.random.default_rng((int(self.candidate.candidate[1:]), self.fold))
        skill = (0.2, 0.5, 1.0, 2.0)[int(self.candidate.candidate[1:]) % 4]
        logits = skill * np.eye(3)[LABELS] + rng.normal(size=(ROWS, 3))
        return np.asarray(log_softmax(2 * logits, axis=1))[self.fold == FOLDS]

    def true_log_prob(self) -> np.ndarray:
        rows = self.log_prob()
        return np.asarray(rows[np.arange(len(rows)), LABELS[self.fold == FOLDS]])


class Tune:
    """Ray Tune's part, session after session, with the rules that must never be broken."""

    def __init__(self, root: Path, config: SweepConfig, slots: int, rng: random.Random) -> None:
        self.config, self.slots, self.rng = config, slots, rng
        self.store = RunStore(root)
        lines = [f"{i}.png,{CLASSES[LABELS[i]]},,{FOLDS[i]}" for i in range(ROWS)]
        folds = "\n".join(["image_path,target,group,fold", *lines, ""])
        self.store.create(config, folds, CLASSES)
        self.ended: set[tuple[str, int]] = set()
        self.never_again: set[str] = set()  # candidates
        self.sessions = 0
        self.begin()

    def begin(self) -> None:
        """A driver starts on what the run folder holds."""
        self.sessions += 1
        config, store = self.config, self.store
        space, problems = build_space(config, "")
        assert not problems
        needed = None if config.race.rule == "none" else config.race.min_complete
        self.race = Race(store, config.race)
        self.study = open_study(store, config, space, self.race.gains)
        self.settled: list[str] = []
        self.searcher = FoldSearcher(
            store,
            self.study,
            Ledger(K, config.resources.max_failures, needed),
            self.race,
            Budget(config.search, config.resources),
            BackboneAllocation(space.backbones, config.search.candidates, 0.5, 0),
            lambda: self.slots,
            on_settled=lambda summary: self.settled.append(summary.candidate.candidate),
        )
        self.searcher.replay(store.summaries(running=True))
        self.scheduler = FoldASHA(store, self.race, config.race, self.searcher)
        self.scheduler.replay(self.searcher.ledger.summaries())
        self.all: list[Live] = []  # as Tune's list: it only grows
        self.live: list[Live] = []

    def fill(self) -> bool:
        """Ask until there is nothing; True at the end of the sweep."""
        while isinstance(given := self.searcher.suggest(self.next_id), dict):
            record = self.store.candidate(given[CANDIDATE])
            trial = Live(self.next_id, record, given[FOLD])
            self.check_start(trial)
            self.all.append(trial)
            self.live.append(trial)
        assert (given == FoldSearcher.FINISHED) == (not self.live)
        self.check_idle()
        return not self.live

    @property
    def next_id(self) -> str:
        return f"{self.sessions}-{len(self.all)}"

    def check_start(self, trial: Live) -> None:
        name, fold = trial.candidate.candidate, trial.fold
        assert (name, fold) not in self.ended
        assert name not in self.never_again
        assert (name, fold) not in {(t.candidate.candidate, t.fold) for t in self.live}
        assert len(self.live) < self.slots
        limit, ledger = self.config.search.fold_trials, self.searcher.ledger
        assert limit is None or ledger.trials_started <= limit
        assert len(ledger) <= self.config.search.candidates

    def check_idle(self) -> None:
        """A slot is idle only where no fold could run."""
        ledger = self.searcher.ledger
        if len(self.live) < self.slots and self.config.search.fold_trials is None:
            assert ledger.trials_open == len(self.live)
            assert len(ledger) == self.config.search.candidates

    def step(self) -> None:
        """One trial ends in some way, or is stopped at a rung on the way there."""
        trial = self.live[self.rng.randrange(len(self.live))]
        (end,) = self.rng.choices(ENDS, OFTEN)
        if self.rng.random() < 0.8 and self.is_stopped_at_a_rung(trial):
            # It may have ended by itself by the time that Tune tells it.
            (end,) = self.rng.choices(("die", "finish", "diverge"), (4, 1, 1))
        self.live.remove(trial)
        self.write(trial, end)
        self.tell(trial, end)
        self.note()

    def is_stopped_at_a_rung(self, trial: Live) -> bool:
        columns = {"raw": np.exp(trial.true_log_prob()).astype(np.float32)}
        loss = -float(trial.true_log_prob().mean())
        for epoch in range(1, EPOCHS):
            lines = [f"{loss + 1 / (1 + e)},nan" for e in range(epoch)]
            log = "\n".join(["val_logloss,ema_val_logloss", *lines, ""])
            result = {"epoch": epoch - 1, "val_logloss": loss, RUNG: RungReport(log, columns)}
            action = self.scheduler.on_trial_result(None, trial, result)  # type: ignore[arg-type]
            self.searcher.on_trial_result(trial.trial_id, result)
            if action == FoldASHA.STOP:
                return True
        return False

    def write(self, trial: Live, end: str) -> None:
        """What the worker leaves."""
        if end.startswith("finish"):
            rows, log_prob = np.flatnonzero(trial.fold == FOLDS), trial.log_prob()
            true = trial.true_log_prob()
            oof = Oof(log_prob.astype(np.float16), np.exp(true).astype(np.float32))
            loss = -float(true.mean())
            score = VariantScore(rows=len(rows), val_logloss=loss, val_acc=0.5, best_epoch=0)
            self.store.save_trial(self.record(trial, "finished", score), {"raw": oof}, rows)
        elif end in ("diverge", "raise"):
            status = "diverged" if end == "diverge" else "failed"
            self.store.save_trial(self.record(trial, status))

    def record(self, trial: Live, status: str, score: VariantScore | None = None) -> TrialRecord:
        return TrialRecord(
            candidate=trial.candidate.candidate,
            fold=trial.fold,
            status=status,  # type: ignore[arg-type]
            backbone=trial.candidate.backbone,
            params=trial.candidate.params,
            folds_hash=self.store.folds().hash,
            seed=0,
            variants={} if score is None else {"raw": score},
            epochs_trained=EPOCHS,
            error="boom" if status == "failed" else None,
        )

    def tell(self, trial: Live, end: str) -> None:
        """Tune's word, or its list alone."""
        trial.status = "ERROR" if end in ("raise", "die", "vanish") else "TERMINATED"
        if end in ("vanish", "finish silently"):
            self.searcher.watch(self.all)
        else:
            self.searcher.on_trial_complete(trial.trial_id, {}, trial.status == "ERROR")

    def note(self) -> None:
        for summary in self.searcher.ledger.summaries():
            name = summary.candidate.candidate
            self.ended |= {(name, trial.fold) for trial in summary.trials}
            if summary.status not in ("running", "complete"):
                self.never_again.add(name)

    def restart(self) -> None:
        """The driver is killed; some of its trials end before they notice."""
        before = {s.candidate.candidate: s for s in self.searcher.ledger.summaries()}
        late = [trial for trial in self.live if self.rng.random() < 0.3]
        self.same_blend()
        for trial in late:
            self.write(trial, self.rng.choice(("finish", "diverge")))
        self.begin()
        self.note()
        after = {s.candidate.candidate: s for s in self.searcher.ledger.summaries()}
        assert after.keys() == before.keys()
        for name in after.keys() - {trial.candidate.candidate for trial in late}:
            assert after[name] == before[name]
        for name, summary in before.items():
            if summary.status == "stopped":
                assert after[name].status != "complete"

    def same_blend(self) -> None:
        """Both within the blend's tolerance of the least loss that there is."""
        replayed = Race(self.store, self.config.race)
        replayed.replay(self.store.summaries(running=True))
        decided = [d for s in self.store.summaries() for d in s.decisions]
        if decided:
            there = replayed.numbered(decided[0])
            here = self.race.numbered(decided[0])
            assert (there.complete, there.number) == (here.complete, here.number)
            assert there.epochs_trained == here.epochs_trained
            assert there.blend_logloss == pytest.approx(here.blend_logloss, abs=2e-5)
            assert replayed.open == self.race.open

    def final(self) -> list[CandidateSummary]:
        """As `SweepSession.close` ends a sweep."""
        summaries = self.store.summaries()
        for summary in summaries:
            if summary.status == "unfinished":
                self.study.tell(summary)
        self.study.close()
        return summaries


def sweep_config(
    rule: str, sampler: str, candidates: int, fold_trials: int | None, max_failures: int
) -> SweepConfig:
    return SweepConfig(
        name="any-order",
        data=DataConfig(train="/nowhere/train.csv"),
        folds=FoldsConfig(k=K),
        search=SearchConfig(
            backbones=("timm/test_vit", "timm/test_resnet"),
            candidates=candidates,
            fold_trials=fold_trials,
            sampler=sampler,  # type: ignore[arg-type]
        ),
        race=RaceConfig(rule=rule, min_complete=2),  # type: ignore[arg-type]
        training=TrainingConfig(epochs=EPOCHS, pretrained=False),
        resources=ResourcesConfig(max_failures=max_failures),
    )


@settings(max_examples=examples(20), deadline=None)
@given(
    rule=st.sampled_from(["gain", "gain", "forgiving", "none"]),
    sampler=st.sampled_from(["tpe", "random"]),
    candidates=st.integers(1, 14),
    fold_trials=st.none() | st.integers(1, 25),
    max_failures=st.integers(0, 2),
    slots=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_in_any_order_every_candidate_ends_in_one_state(
    rule: str,
    sampler: str,
    candidates: int,
    fold_trials: int | None,
    max_failures: int,
    slots: int,
    seed: int,
) -> None:
    rng = random.Random(seed)
    config = sweep_config(rule, sampler, candidates, fold_trials, max_failures)
    with tempfile.TemporaryDirectory() as folder:
        tune = Tune(Path(folder) / "run", config, slots, rng)
        while not tune.fill():
            if rng.random() < 0.04:
                tune.restart()
            else:
                tune.step()
        summaries = tune.final()
        _check_end(tune, summaries)
        _check_study(Path(folder) / "run" / "study.journal", len(summaries))


def _check_end(tune: Tune, summaries: list[CandidateSummary]) -> None:
    """The run folder alone, and the searcher, say the same."""
    search = tune.config.search
    assert len(tune.settled) == len(set(tune.settled))
    known = {s.candidate.candidate: s for s in tune.searcher.ledger.summaries()}
    for summary in summaries:
        name, folds = summary.candidate.candidate, [t.fold for t in summary.finished]
        assert (summary.status == "complete") == (folds == list(range(K)))
        assert summary.decisions == known[name].decisions
        if search.fold_trials is None:
            assert summary.status == known[name].status
            assert summary.status in ("complete", "stopped", "diverged", "failed")
        if summary.status in ("diverged", "failed"):
            assert summary.status in {trial.status for trial in summary.trials}
        stops = [d for d in summary.decisions if d.action == "stop"]
        if summary.status == "stopped":
            assert stops or "stopped" in {trial.status for trial in summary.trials}
    if search.fold_trials is None:
        assert len(summaries) == search.candidates
    else:
        assert sum(len(s.trials) for s in summaries) <= search.fold_trials
    numbers = sorted(d.number for s in summaries for d in s.decisions)
    assert len(numbers) == len(set(numbers))


def _check_study(journal: Path, candidates: int) -> None:
    """As optuna-dashboard opens it."""
    storage = JournalStorage(JournalFileBackend(str(journal)))
    studies = optuna.get_all_study_names(storage)  # none of a budget that began no candidate
    trials = [t for s in studies for t in optuna.load_study(study_name=s, storage=storage).trials]
    assert len(trials) == candidates
    assert not {TrialState.RUNNING, TrialState.WAITING} & {trial.state for trial in trials}
