"""Whatever the order of events: the real sweep, race, study and run folder, with trials that
finish, diverge, fail, vanish or are parked, and drivers that restart.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from foldrace.run_folder.records import CandidateSummary
from tests.conftest import examples
from tests.scheduling.pretend_workers import EPOCHS, K, PretendWorkers, sweep_config

ENDS = ("train", "save", "finish", "diverge", "raise", "die", "vanish")
OFTEN = (30, 6, 12, 1, 2, 1, 1)  # of each of these


class Chaos(PretendWorkers):
    """Something happens to one trial at a time."""

    def step(self) -> None:
        """A random trial trains an epoch, saves its state, or ends in some way."""
        trial = self.live[self.rng.randrange(len(self.live))]
        (what,) = self.rng.choices(ENDS, OFTEN)
        if what == "save":
            self.save(trial)
        elif what != "train":
            self.end(trial, what)
        else:
            self.epoch(trial)
            if trial.epochs == EPOCHS:
                self.end(trial, "finish")
            elif self.rung(trial):
                # It may have ended by itself by the time that it is told to leave.
                (how,) = self.rng.choices(("leave", "finish", "diverge"), (6, 1, 1))
                if how == "leave":
                    self.leave(trial)
                else:
                    self.end(trial, how)
        self.check()

    def check(self) -> None:
        """What must hold at any moment."""
        assert max(self.trained.values(), default=0) <= 1, "an epoch is trained twice"
        assert len(self.sweep.state) <= self.config.search.candidates
        for state in self.sweep.state:
            places = [
                state.settled,
                bool(state.running),
                state.parked_epoch is not None,
                state.is_new,
                state.is_between_folds,
                state.granted and bool(state.waiting) and not state.running,
                self.config.race.rule != "gain" and bool(state.ended) and not state.settled,
                bool(state.held),
            ]
            assert any(places), f"{state.name} is nowhere: {state}"
            assert sum(places[:5]) <= 1, f"{state.name} is in several places: {state}"

    def restart(self) -> None:
        """The driver is killed; some of its trials end before they notice."""
        before = {s.candidate.candidate: s for s in self.sweep.state.summaries()}
        blend = self.sweep.race.blend_loss
        late = [trial for trial in self.live if self.rng.random() < 0.3]
        for trial in self.live:
            how = self.rng.choice(("finish", "diverge")) if trial in late else "die"
            self.write(trial, how)
        self.exporter.close()  # its thread dies with the driver
        self.begin()
        after = {s.candidate.candidate: s for s in self.sweep.state.summaries()}
        assert after.keys() == before.keys()
        changed = {trial.key[0] for trial in late}
        for name in after.keys() - changed:
            assert after[name] == before[name]
        for name in changed:
            if before[name].status == "stopped":
                assert after[name].status != "complete"
        if not changed:
            there = self.sweep.race.blend_loss
            assert there == (blend if blend is None else pytest.approx(blend, abs=2e-5))
        self.check()

    def final(self) -> list[CandidateSummary]:
        """As `SweepSession.close` ends a sweep."""
        self.exporter.close()
        return self.store.summaries()


@settings(max_examples=examples(40), deadline=None)
@given(
    rule=st.sampled_from(["gain", "gain", "gain", "forgiving", "none"]),
    sampler=st.sampled_from(["tpe", "random"]),
    candidates=st.integers(1, 14),
    fold_trials=st.none() | st.integers(1, 25),
    max_failures=st.integers(0, 2),
    parked_gb=st.sampled_from([20.0, 0.0, 1e-9]),
    eta=st.integers(1, 5),
    slots=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_in_any_order_every_candidate_ends_in_one_state(
    rule: str,
    sampler: str,
    candidates: int,
    fold_trials: int | None,
    max_failures: int,
    parked_gb: float,
    eta: int,
    slots: int,
    seed: int,
) -> None:
    rng = random.Random(seed)
    config = sweep_config(
        rule, candidates, sampler=sampler, fold_trials=fold_trials, max_failures=max_failures,
        race={"parked_gb": parked_gb, "eta": eta},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        workers = Chaos(Path(folder) / "run", config, slots, rng)
        while not workers.fill():
            if rng.random() < 0.03:
                workers.restart()
            else:
                workers.step()
        summaries = workers.final()
        _check_end(workers, summaries)
        _check_study(Path(folder) / "run" / "study.journal", len(summaries))


def _check_end(workers: Chaos, summaries: list[CandidateSummary]) -> None:
    """The run folder alone, and the state, say the same."""
    search, settled = workers.config.search, workers.settled.names
    assert len(settled) == len(set(settled))
    known = {s.candidate.candidate: s for s in workers.sweep.state.summaries()}
    assert set(settled) == {name for name, summary in known.items() if summary.settled}
    for summary in summaries:
        name, folds = summary.candidate.candidate, [t.fold for t in summary.finished]
        assert (summary.status == "complete") == (folds == list(range(K)))
        assert summary.decisions == known[name].decisions
        assert summary.status == known[name].status or not known[name].settled
        if search.fold_trials is None:
            assert summary.status in ("complete", "stopped", "diverged", "failed")
        if summary.status in ("diverged", "failed"):
            assert summary.status in {trial.status for trial in summary.trials}
        if summary.status == "stopped":
            assert any(d.action == "stop" for d in summary.decisions)
        if summary.settled:
            assert not any(workers.store.resume_state(name, fold) for fold in range(K))
    if search.fold_trials is None:
        assert len(summaries) == search.candidates
    else:
        parked = sum(s.parked_epoch is not None for s in workers.sweep.state)
        assert sum(len(s.trials) for s in summaries) + parked <= search.fold_trials
    numbers = sorted(d.number for s in summaries for d in s.decisions)
    assert len(numbers) == len(set(numbers))


def _check_study(journal: Path, candidates: int) -> None:
    """As optuna-dashboard opens it."""
    storage = JournalStorage(JournalFileBackend(str(journal)))
    studies = optuna.get_all_study_names(storage)  # none of a budget that began no candidate
    trials = [t for s in studies for t in optuna.load_study(study_name=s, storage=storage).trials]
    assert len(trials) == candidates
    assert not {TrialState.RUNNING, TrialState.WAITING} & {trial.state for trial in trials}
