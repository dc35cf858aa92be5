"""Whole sweeps without Ray: the real sweep, race, study and run folder; the workers pretend."""

from __future__ import annotations

import random
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foldrace.run_folder.records import (
    CandidateRecord,
    CandidateSummary,
    RaceDecision,
    TrialRecord,
)
from foldrace.scheduling.events import SweepListener
from foldrace.scheduling.state import FoldTask
from foldrace.scheduling.sweep import FINISHED
from tests.conftest import examples
from tests.scheduling.pretend_workers import EPOCHS, K, Live, PretendWorkers, Skill, sweep_config

MakeWorkers = Callable[..., "Workers"]
EARLY = {"slots": 6, "skill": lambda number: 1.2 - 0.05 * number}
"""Each candidate is a little worse than those before it, and three others reach their first rung
while the first one's folds run: they are parked before there is a blend."""
ALL = {"z": 10.0}
WHOLE = dict.fromkeys(range(K), EPOCHS)


class Events(SweepListener):
    """What a listener was told, in order."""

    def __init__(self) -> None:
        self.all: list[tuple[str, Any]] = []
        self.last: dict[str, CandidateSummary] = {}

    def of(self, kind: str) -> list[Any]:
        return [what for told, what in self.all if told == kind]

    def candidate_started(self, candidate: CandidateRecord) -> None:
        self.all.append(("started", candidate))

    def trial_ended(self, record: TrialRecord, summary: CandidateSummary) -> None:
        self._add("ended", record, summary)

    def decided(self, decision: RaceDecision, summary: CandidateSummary) -> None:
        self._add("decided", decision, summary)

    def settled(self, summary: CandidateSummary) -> None:
        self._add("settled", summary, summary)

    def _add(self, kind: str, what: object, summary: CandidateSummary) -> None:
        self.all.append((kind, what))
        self.last[summary.candidate.candidate] = summary


class Workers(PretendWorkers):
    """In any order, if asked; notes what has happened."""

    def more_listeners(self) -> list[SweepListener]:
        self.events = Events()
        return [self.events]

    def resume(self, fold_trials: int | None = None) -> None:
        """What runs is killed; a new session on what the run folder holds, with another limit."""
        for trial in self.live:
            self.write(trial, "die")
        self.exporter.close()
        search = self.config.search.model_copy(update={"fold_trials": fold_trials})
        self.config = self.config.model_copy(update={"search": search})
        self.begin()

    def run_in_any_order(self) -> list[CandidateSummary]:
        while not self.fill():
            self.train(self.rng.choice(self.live))
        return self.store.summaries()

    def epochs_of(self, name: str) -> dict[int, int]:
        """Fold -> epochs that were trained; an epoch is never trained twice."""
        found: dict[int, int] = defaultdict(int)
        for (candidate, fold, _), times in self.trained.items():
            assert times <= 1
            found[fold] += times * (candidate == name)
        return {fold: epochs for fold, epochs in sorted(found.items()) if epochs}


@pytest.fixture
def make(tmp_path: Path, request: pytest.FixtureRequest) -> MakeWorkers:
    """Makes workers in a run folder of their own."""

    def made(
        rule: str = "gain",
        candidates: int = 8,
        *,
        slots: int = 2,
        skill: Skill = lambda number: (0.2, 0.5, 1.0, 2.0)[number % 4],
        race: Mapping[str, object] | None = None,
        **others: object,
    ) -> Workers:
        config = sweep_config(rule, candidates, race=race, **others)  # type: ignore[arg-type]
        name = f"run{len(list(tmp_path.iterdir()))}"
        workers = Workers(tmp_path / name, config, slots, skill=skill)
        request.addfinalizer(lambda: workers.exporter.close())
        return workers

    return made


def losses(summaries: list[CandidateSummary]) -> dict[str, float]:
    """Complete candidate -> its loss."""
    done = [s for s in summaries if s.status == "complete"]
    return {s.candidate.candidate: s.pooled_calibrated("raw") for s in done}


# -- the end


@pytest.mark.parametrize("slots", [1, 6])
def test_a_race_that_takes_every_gain_for_plausible_ends_where_no_race_ends(
    make: MakeWorkers, slots: int
) -> None:
    """Only the candidates limit it: the order is another one, the end is the same."""
    early = EARLY | {"slots": slots}
    without, raced = make("none", **early), make(**early, race=ALL)
    expected, found = losses(without.run()), losses(raced.run())
    assert len(expected) == 8 and found == expected
    assert raced.sweep.race.blend_loss == pytest.approx(without.sweep.race.blend_loss, abs=2e-5)
    assert sum(without.trained.values()) == sum(raced.trained.values()) == 8 * K * EPOCHS
    parked = [d for d in raced.events.of("decided") if d.action == "park"]
    assert any(d.epoch for d in parked)
    assert raced.sweep.limit is None
    for number in range(8):
        assert raced.epochs_of(f"c{number:04d}") == WHOLE


def test_what_promises_no_gain_is_stopped_at_the_end_alone(make: MakeWorkers) -> None:
    workers = make(candidates=12, race={"z": 0.0})
    summaries = workers.run()
    kinds = [what.action for what in workers.events.of("decided")]
    first = kinds.index("stop")
    assert set(kinds[first:]) == {"stop"} and 1 < len(kinds[first:]) < 12
    stopped = [s for s in summaries if s.status == "stopped"]
    assert len(stopped) == len(kinds[first:]) and len(losses(summaries)) == 12 - len(stopped)
    for summary in stopped:
        last = summary.decisions[-1]
        assert last.reason == "nothing promises a gain any more"
        assert last.gain is not None and last.gain <= 0
    assert workers.fill()  # nothing is given out any more
    trained = sum(workers.trained.values())
    assert trained < 12 * K * EPOCHS and workers.sweep.limit is None


def test_a_stopped_sweep_gives_and_books_nothing(make: MakeWorkers) -> None:
    workers = make()
    workers.fill()
    trial = workers.live[0]
    workers.sweep.stopped = True
    told = len(workers.events.all)
    workers.end(trial, "finish")
    assert workers.sweep.suggest("late") == FINISHED and len(workers.events.all) == told


# -- limits


@settings(max_examples=examples(30), deadline=None)
@given(
    limit=st.integers(1, 20), slots=st.integers(1, 4), eta=st.integers(1, 4),
    z=st.sampled_from([0.0, 1.0, 10.0]), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_whoever_is_granted_all_folds_gets_them_within_the_limit(
    limit: int, slots: int, eta: int, z: float, seed: int
) -> None:
    config = sweep_config(fold_trials=limit, candidates=9, race={"eta": eta, "z": z})
    with tempfile.TemporaryDirectory() as folder:
        workers = Workers(Path(folder) / "run", config, slots, random.Random(seed))
        workers.run_in_any_order()
        workers.exporter.close()
        begun = len(set(workers.started))
        assert begun <= limit and begun == workers.sweep.state.trials_started
        assert workers.sweep.spending.usage.fold_trials == begun
        for state in workers.sweep.state:
            if state.granted:
                assert workers.epochs_of(state.name) == WHOLE
        assert (workers.sweep.state.complete > 0) == (limit >= K)


def test_a_limit_leaves_parked_trials_and_a_larger_one_goes_on_with_them(
    make: MakeWorkers,
) -> None:
    """Each from the epoch at which it was parked."""
    workers = make(fold_trials=9, **EARLY, race=ALL)
    workers.run()
    assert workers.sweep.limit == "search.fold_trials: 9 of 9 started"
    before = {s.name: s.parked_epoch for s in workers.sweep.state if s.parked_epoch is not None}
    assert before
    assert not [d for d in workers.events.of("decided") if d.action == "stop"]
    for name, epoch in before.items():
        assert workers.store.resume_state(name, 0) == str(epoch).encode()
        assert workers.epochs_of(name) == {0: epoch}
    workers.resume()
    assert {s.name: s.parked_epoch for s in workers.sweep.state if s.name in before} == before
    workers.run()
    assert len(losses(workers.store.summaries())) == 8
    for name in before:
        assert workers.epochs_of(name) == WHOLE


def test_a_limit_that_all_folds_fit_in_exactly_leaves_none_out(make: MakeWorkers) -> None:
    """A parked trial has been counted once, and is not counted again when it returns."""
    workers = make(candidates=5, fold_trials=5 * K, **EARLY, race=ALL)
    workers.run()
    assert any(d.action == "park" and d.epoch for d in workers.events.of("decided"))
    assert len(losses(workers.store.summaries())) == 5
    assert workers.sweep.spending.usage.fold_trials == 5 * K


def test_the_seconds_of_parked_trials_are_counted(make: MakeWorkers) -> None:
    """A second an epoch."""
    workers = make(fold_trials=9, **EARLY, race=ALL)
    workers.run()
    trained = sum(workers.trained.values())
    assert any(s.parked_epoch for s in workers.sweep.state)
    assert workers.sweep.spending.usage.device_seconds == pytest.approx(trained)


# -- parked trials


class Returns(Workers):
    """Notes the epoch that each returning trial goes on from, and the one that it was parked at."""

    def begin(self) -> None:
        super().begin()
        self.returned: list[tuple[int, int | None]] = []

    def _start(self, trial_id: str, task: FoldTask) -> None:
        super()._start(trial_id, task)
        latest = self.sweep.state[task.candidate.candidate].latest
        if latest is not None and latest.epoch is not None and latest.fold == task.fold:
            assert latest.action == "continue"
            self.returned.append((self.live[-1].epochs, latest.epoch))


@pytest.mark.parametrize("z", [1.0, 10.0])
def test_a_parked_trial_goes_on_from_its_epoch(tmp_path: Path, z: float) -> None:
    config = sweep_config(candidates=16, race={"z": z})
    workers = Returns(tmp_path / "run", config, **EARLY)  # type: ignore[arg-type]
    workers.run()
    workers.exporter.close()
    assert workers.returned
    assert all(epochs == parked for epochs, parked in workers.returned)
    assert max(workers.trained.values()) == 1


def test_beyond_the_room_for_parked_states_the_least_promising_are_stopped(
    make: MakeWorkers,
) -> None:
    """A state takes a byte here; the blend is that of the first candidate all the time."""
    race = {"z": 0.0, "eta": 100, "parked_gb": 2e-9}
    workers = make(candidates=14, slots=1, skill=lambda number: 1.5 - 0.1 * number, race=race)
    stops = 0
    while not workers.fill():
        [trial] = workers.live
        before = parked_gains(workers)
        done = len(workers.events.all)
        workers.train(trial)
        room = parked_gains(workers)
        assert len(room) <= 2
        new = [what for kind, what in workers.events.all[done:] if kind == "decided"]
        for decision in new:
            if decision.action == "park" and decision.epoch is not None:
                before[decision.candidate] = (decision.epoch, decision.gain)
            elif decision.action == "stop":
                stops += 1
                assert decision.reason == "parked states take over 2e-09 GB"
                epoch, gain = before[decision.candidate]
                alike = [other for at, other in before.values() if at == epoch]
                assert gain == min(alike)
                gone = workers.store.trial(decision.candidate, 0)
                assert gone is not None and gone.status == "stopped" and gone.seconds == epoch
                assert workers.store.resume_state(decision.candidate, 0) is None
                assert decision.candidate in workers.settled.names
    assert stops > 2


def parked_gains(workers: Workers) -> dict[str, tuple[int, float]]:
    """Parked candidate -> its epoch and the gain by which it was parked, from the files alone."""
    found = {}
    for summary in workers.store.summaries(running=True):
        name, last = summary.candidate.candidate, summary.decisions and summary.decisions[-1]
        if not last or last.action != "park" or last.epoch is None or summary.trials:
            continue
        if workers.store.resume_state(name, 0) and last.gain is not None:
            found[name] = (last.epoch, last.gain)
    return found


@pytest.mark.parametrize("how", ["finish", "diverge"])
def test_who_ends_before_it_hears_that_it_is_parked_has_ended(make: MakeWorkers, how: str) -> None:
    workers = make(candidates=6, **EARLY)
    trial = until_parked(workers)
    workers.end(trial, how)
    state = workers.sweep.state[trial.key[0]]
    assert state.ended[0].status == {"finish": "finished", "diverge": "diverged"}[how]
    assert state.parked_epoch is None
    assert not [d for d in state.decisions.values() if d.epoch is not None]


def until_parked(workers: Workers) -> Live:
    """Trials go on until one of them is told to leave."""
    while not workers.fill():
        for trial in list(workers.live):
            workers.epoch(trial)
            if trial.epochs == EPOCHS:
                workers.end(trial, "finish")
            elif workers.rung(trial):
                return trial
    raise AssertionError("none was parked")


# -- attempts


def test_the_last_of_several_attempts_begins_anew(make: MakeWorkers) -> None:
    workers = make(candidates=1, slots=1, max_failures=2)
    left = []
    for _ in range(3):
        workers.fill()
        [trial] = workers.live
        workers.epoch(trial)
        workers.save(trial)
        workers.end(trial, "raise")
        left.append(workers.store.resume_state("c0000", 0))
    assert left == [b"1", None, None]
    assert workers.fill() and workers.sweep.state["c0000"].ended[0].status == "failed"
    assert workers.sweep.state["c0000"].ended[0].error == "boom"


def test_a_trial_that_vanishes_is_not_to_blame(make: MakeWorkers) -> None:
    workers = make(candidates=1, slots=1)
    for _ in range(5):
        workers.fill()
        workers.end(workers.live[0], "vanish")
    assert losses(workers.run()).keys() == {"c0000"}


# -- listeners


@pytest.mark.parametrize("rule", ["gain", "forgiving", "none"])
def test_listeners_hear_of_everything_in_order(make: MakeWorkers, rule: str) -> None:
    workers = make(rule, candidates=10, slots=3)
    workers.run()
    began, over, seen = set(), set(), set()
    numbers = [d.number for d in workers.events.of("decided")]
    assert numbers == sorted(set(numbers))
    for kind, what in workers.events.all:
        name = what.candidate if kind != "settled" else what.candidate.candidate
        assert name not in over
        if kind == "started":
            assert name not in began
            began.add(name)
        assert name in began
        if kind == "ended":
            seen.add((name, what.fold))
        elif kind == "decided" and what.folds_done:
            assert (name, what.fold) in seen
        elif kind == "settled":
            over.add(name)
    assert over == {f"c{number:04d}" for number in range(10)}
    stored = {s.candidate.candidate: s for s in workers.store.summaries(running=True)}
    assert workers.events.last == stored


@pytest.mark.parametrize("rule", ["gain", "forgiving", "none"])
@pytest.mark.parametrize("fold_trials", [None, 14])
def test_a_later_session_tells_the_same_events_to_a_new_listener(
    make: MakeWorkers, rule: str, fold_trials: int | None
) -> None:
    """A fold's latest decision alone is kept; by the rule none there is one of each."""
    workers = make(rule, candidates=10, slots=3, fold_trials=fold_trials)
    workers.run()
    first = workers.events
    workers.resume(fold_trials)
    again = workers.events
    assert again.of("started") == first.of("started")
    latest = {(d.candidate, d.fold): d for d in first.of("decided")}
    assert again.of("decided") == sorted(latest.values(), key=lambda d: d.number)
    ended = [{(t.candidate, t.fold): t for t in told.of("ended")} for told in (first, again)]
    assert ended[0] == ended[1] and len(ended[1]) == len(again.of("ended"))
    order = [what for kind, what in again.all if kind in ("ended", "decided")]
    if rule == "none":
        assert order == [what for kind, what in first.all if kind in ("ended", "decided")]
    assert again.last == first.last
    settled = [{s.candidate.candidate: s for s in told.of("settled")} for told in (first, again)]
    assert settled[0] == settled[1] and len(settled[1]) == len(again.of("settled"))


# -- kills


def test_a_kill_between_a_record_and_its_decision_is_made_up_for(make: MakeWorkers) -> None:
    """As if nothing had happened: the same decisions, but the numbers."""
    undisturbed, killed = (make(candidates=6, **EARLY | {"slots": 1}, race=ALL) for _ in range(2))
    undisturbed.run()
    while not killed.fill():
        [trial] = killed.live
        killed.epoch(trial)
        if trial.epochs == EPOCHS:
            killed.write(trial, "finish")
            killed.live.clear()
            killed.resume()
            assert not killed.live and all(
                len(s.finished) == max((d.folds_done for d in s.decisions), default=0)
                for s in killed.store.summaries()
            )
        elif killed.rung(trial):
            killed.leave(trial)
    expected, found = (
        {s.candidate.candidate: [d.action for d in s.decisions] for s in w.store.summaries()}
        for w in (undisturbed, killed)
    )
    assert found == expected and losses(killed.store.summaries()).keys() == expected.keys()


def test_a_kill_between_a_stop_and_its_record_is_made_up_for(make: MakeWorkers) -> None:
    workers = make(candidates=6, **EARLY)
    trial = until_parked(workers)
    workers.leave(trial)
    name, fold = trial.key
    parked = workers.store.decisions()[name][-1]
    stop = parked.model_copy(update={"action": "stop", "number": 1000, "reason": "killed"})
    workers.store.save_decision(stop)
    workers.resume()
    record = workers.store.trial(name, fold)
    assert record is not None and record.status == "stopped"
    assert (record.epochs_trained, record.seconds) == (parked.epoch, parked.epoch)
    assert workers.store.resume_state(name, fold) is None
    assert ("ended", record) in workers.events.all and name in workers.settled.names
    workers.run()
    assert workers.sweep.state[name].summary.status == "stopped"
    assert set(workers.epochs_of(name)) == {0}


def test_a_torn_decision_of_a_parked_trial_lets_it_go_on_where_it_was(make: MakeWorkers) -> None:
    workers = make(candidates=6, **EARLY, race=ALL)
    trial = until_parked(workers)
    workers.leave(trial)
    name, fold = trial.key
    file = f"{workers.store.trial_folder(name, fold)}/decision.json"
    workers.store.files.write(file, workers.store.files.read(file)[:40])
    workers.resume()
    workers.fill()
    [again] = [live for live in workers.live if live.key == trial.key]
    assert again.epochs == trial.epochs
    workers.run()
    assert workers.epochs_of(name) == WHOLE
