"""The sweep's state against a list of what happened, whatever the order of events."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from foldrace.run_folder.records import (
    CandidateRecord,
    RaceAction,
    RaceDecision,
    TrialRecord,
    TrialStatus,
    VariantScore,
)
from foldrace.scheduling.state import CandidateState, FoldTask, SweepState
from tests.conftest import examples

BACKBONES = ("timm/x", "timm/y")
LOST = ("stopped", "diverged", "failed")


def candidate(number: int) -> CandidateRecord:
    backbone = BACKBONES[number % 2]
    return CandidateRecord(candidate=f"c{number:04d}", backbone=backbone, params={"epochs": 4})


def ended(
    number: int, fold: int, status: TrialStatus = "finished", seconds: float = 1.0
) -> TrialRecord:
    score = VariantScore(rows=10, val_logloss=1.0, calibrated_logloss=1.0, val_acc=0.5, epoch=0)
    return TrialRecord(
        candidate=f"c{number:04d}", fold=fold, status=status, backbone=BACKBONES[number % 2],
        params={}, folds_hash="h", seed=0, seconds=seconds, epochs_trained=fold + 1,
        variants={"raw": score} if status == "finished" else {},
    )  # fmt: skip


def decided(
    order: int,
    number: int,
    fold: int,
    action: RaceAction,
    epoch: int | None = None,
    seconds: float = 0.0,
    gain: float | None = None,
) -> RaceDecision:
    return RaceDecision(
        number=order, candidate=f"c{number:04d}", fold=fold, epoch=epoch, rule="gain",
        action=action, folds_done=0 if epoch else 1, rows=10, seconds=seconds, gain=gain,
        gain_se=None if gain is None else 0.1, complete=0, epochs_trained=0, reason="",
    )  # fmt: skip


def sweep(folds: int = 3, max_failures: int = 0, candidates: int = 1) -> SweepState:
    state = SweepState(folds, max_failures)
    for number in range(candidates):
        state.add(candidate(number))
    return state


def start(state: SweepState, number: int, *folds: int) -> None:
    for fold in folds:
        state.start(FoldTask(state[f"c{number:04d}"].record, fold))


def places(state: CandidateState) -> list[str]:
    """Where a candidate is; exactly one of these."""
    found = {
        "settled": state.settled,
        "running": bool(state.running),
        "parked": state.parked_epoch is not None,
        "new": state.is_new,
        "between folds": state.is_between_folds,
        "granted": state.granted and bool(state.waiting) and not state.running,
    }
    return [place for place, there in found.items() if there]


# -- one transition after the other


def test_a_candidate_goes_from_new_to_complete() -> None:
    state = sweep(folds=2)
    one = state["c0000"]
    assert places(one) == ["new"] and one.waiting == (0, 1)
    start(state, 0, 0)
    assert places(one) == ["running"] and one.waiting == (1,) and one.summary.status == "running"
    state.end(ended(0, 0))
    assert places(one) == ["between folds"]
    state.decide(decided(0, 0, 0, "park"))
    assert places(one) == ["between folds"] and one.summary.status == "parked"
    state.decide(decided(1, 0, 0, "continue"))
    assert places(one) == ["granted"] and one.summary.status == "running"
    start(state, 0, 1)
    state.end(ended(0, 1))
    assert places(one) == ["settled"] and one.summary.status == "complete" and state.complete == 1


def test_a_candidate_is_parked_in_mid_training_and_returns() -> None:
    state = sweep()
    one = state["c0000"]
    start(state, 0, 0)
    state.expect_stop("c0000", 0)
    assert one.leaving == {0}
    state.release("c0000", 0)
    state.decide(decided(0, 0, 0, "park", epoch=2, seconds=5.0))
    assert not one.leaving and places(one) == ["parked"] and one.parked_epoch == 2
    assert (state.trials_started, state.trials_open, state.device_seconds) == (1, 3, 5.0)
    state.decide(decided(1, 0, 0, "continue", epoch=2, seconds=5.0))
    assert places(one) == ["new"] and not one.granted  # it may be parked at the next rung, too
    start(state, 0, 0)
    state.end(ended(0, 0, seconds=9.0))
    assert places(one) == ["between folds"] and state.device_seconds == 9.0


def test_a_parked_candidate_runs_without_a_decision_where_the_rule_has_changed() -> None:
    state = sweep()
    start(state, 0, 0)
    state.release("c0000", 0)
    state.decide(decided(0, 0, 0, "park", epoch=2, seconds=5.0))
    start(state, 0, 0)
    assert places(state["c0000"]) == ["running"] and state.trials_started == 1
    state.release("c0000", 0)
    assert places(state["c0000"]) == ["parked"]


def test_a_parked_candidate_is_stopped_for_good() -> None:
    state = sweep()
    start(state, 0, 0)
    state.release("c0000", 0)
    state.decide(decided(0, 0, 0, "park", epoch=1, seconds=2.0))
    state.end(ended(0, 0, "stopped", seconds=2.0))
    state.decide(decided(1, 0, 0, "stop", epoch=1, seconds=2.0))
    one = state["c0000"]
    assert places(one) == ["settled"] and one.summary.status == "stopped" and one.waiting == ()
    assert (state.trials_started, state.trials_open, state.device_seconds) == (1, 0, 2.0)


@pytest.mark.parametrize("by_decision", [True, False])
def test_what_is_stopped_never_comes_back(by_decision: bool) -> None:
    state = sweep()
    start(state, 0, 0)
    state.end(ended(0, 0, "finished" if by_decision else "stopped"))
    if by_decision:
        state.decide(decided(0, 0, 0, "stop"))
    assert state["c0000"].stopped and places(state["c0000"]) == ["settled"]
    with pytest.raises(AssertionError, match="c0000 fold1 does not wait"):
        start(state, 0, 1)


def test_a_fold_is_started_once() -> None:
    state = sweep()
    start(state, 0, 0, 1)
    with pytest.raises(AssertionError, match="c0000 fold0 does not wait"):
        start(state, 0, 0)
    state.end(ended(0, 1))
    with pytest.raises(AssertionError, match="c0000 fold1 does not wait"):
        start(state, 0, 1)


def test_a_grant_that_was_taken_back_is_remembered() -> None:
    state = sweep()
    state.decide(decided(0, 0, 0, "continue"))
    start(state, 0, 0, 1)
    state.end(ended(0, 0))
    state.decide(decided(1, 0, 1, "continue"))
    state.decide(decided(2, 0, 0, "park"))
    one = state["c0000"]
    assert not one.granted and one.was_granted
    assert places(one) == ["running"] and state.trials_promised == 0


@pytest.mark.parametrize("status", ["diverged", "failed"])
def test_a_lost_fold_settles_its_candidate_once_the_others_have_ended(status: TrialStatus) -> None:
    state = sweep()
    start(state, 0, 0, 1)
    state.end(ended(0, 1, status))
    one = state["c0000"]
    assert places(one) == ["running"] and one.waiting == () and state.trials_open == 1
    state.end(ended(0, 0))
    assert places(one) == ["settled"] and one.summary.status == status


def test_ids_are_never_used_twice() -> None:
    state = SweepState(2, 0)
    assert state.next_number == 0
    for number in (7, 3):
        state.add(candidate(number))
    assert state.next_number == 8 and [one.number for one in state] == [7, 3]


def test_the_gain_of_a_backbone_is_that_of_the_latest_decision_that_has_one() -> None:
    state = sweep(candidates=4)
    for number, gains in enumerate([(0.1, 0.2), (None, None), (-0.3, None)]):
        start(state, number, 0, 1)
        for fold, gain in enumerate(gains):
            state.decide(decided(10 * number + fold, number, fold, "park", gain=gain))
    assert state.gains() == {"timm/x": [0.2, -0.3]}


# -- attempts


def outcomes(state: SweepState, blameless: Sequence[bool]) -> list[bool]:
    """Whether the fold waits again after each failed attempt; until it does not."""
    again = []
    for silent in blameless:
        start(state, 0, 0)
        again.append(state.lose("c0000", 0, 0) if silent else state.fail("c0000", 0))
        if not again[-1]:
            break
    return again


@pytest.mark.parametrize("max_failures", [0, 1, 2])
def test_a_fold_is_tried_once_more_than_it_may_fail(max_failures: int) -> None:
    state = sweep(max_failures=max_failures)
    assert outcomes(state, [False] * 9) == [True] * max_failures + [False]
    assert state["c0000"].running == {0}  # until it is booked as failed
    state.end(ended(0, 0, "failed"))
    assert places(state["c0000"]) == ["settled"]


@pytest.mark.parametrize("max_failures", [0, 1])
def test_a_fold_may_vanish_ten_times_through_no_fault_of_its_own(max_failures: int) -> None:
    assert outcomes(sweep(max_failures=max_failures), [True] * 99) == [True] * 10 + [False]
    mixed = [True] * 4 + [False] * max_failures + [True] * 99
    assert outcomes(sweep(max_failures=max_failures), mixed) == [True] * (10 + max_failures) + [
        False
    ]


def test_each_fold_has_attempts_of_its_own() -> None:
    state = sweep(max_failures=1)
    for fold in range(3):
        start(state, 0, fold)
        assert state.fail("c0000", fold)
    start(state, 0, 1)
    assert not state.fail("c0000", 1)


def test_a_lost_fold_goes_on_for_ever_while_it_gets_further() -> None:
    """Ten attempts without progress and no more, but the one that got further is the first."""
    state = sweep(max_failures=0)
    for epochs in (*range(1, 50), *[49] * 9):
        start(state, 0, 0)
        assert state.lose("c0000", 0, epochs)
    start(state, 0, 0)
    assert not state.lose("c0000", 0, 48)


def test_a_held_fold_waits_for_another_one() -> None:
    """Nothing more of its candidate starts, it is not settled, and one more attempt is free."""
    state = sweep(max_failures=0)
    start(state, 0, 0)
    assert not state.fail("c0000", 0)
    state.hold("c0000", 0, None)
    held = state["c0000"]
    assert held.waiting == () and not held.settled and not held.hopeless
    assert state.trials_open > 0
    state.release("c0000", 0)
    assert 0 in held.waiting
    start(state, 0, 0)
    state.hold("c0000", 0, None)
    state.end(ended(0, 0, "failed"))
    assert held.settled and held.hopeless and not held.held


@pytest.mark.parametrize("blameless", [True, False])
def test_a_fold_of_a_lost_candidate_is_not_tried_again(blameless: bool) -> None:
    state = sweep(max_failures=5)
    start(state, 0, 0, 1)
    state.end(ended(0, 0, "diverged"))
    assert not (state.lose("c0000", 1, 9) if blameless else state.fail("c0000", 1))


@pytest.mark.parametrize(
    ("max_failures", "expected"), [(0, []), (1, [True]), (3, [False, False, True])]
)
def test_the_last_of_several_attempts(max_failures: int, expected: list[bool]) -> None:
    state = sweep(max_failures=max_failures)
    assert not state.last_of_several("c0000", 0)
    found = []
    start(state, 0, 0)
    while state.fail("c0000", 0):
        found.append(state.last_of_several("c0000", 0))
        start(state, 0, 0)
    assert found == expected


# -- any order


@dataclass
class Noted:
    """What has happened to a candidate, by fold: where it is, its seconds, its epochs."""

    folds: dict[int, str]
    seconds: dict[int, float] = field(default_factory=dict)
    decisions: list[RaceDecision] = field(default_factory=list)
    failures: Counter[int] = field(default_factory=Counter)
    lost: Counter[int] = field(default_factory=Counter)

    def those(self, *where: str) -> list[int]:
        return [fold for fold, place in self.folds.items() if place in where]

    @property
    def last(self) -> RaceDecision | None:
        return self.decisions[-1] if self.decisions else None

    @property
    def is_lost(self) -> bool:
        return bool(self.those(*LOST)) or any(d.action == "stop" for d in self.decisions)

    @property
    def parked(self) -> RaceDecision | None:
        begun = self.those("running", "finished", *LOST)
        last = self.last
        if last is None or begun or self.is_lost:
            return None
        return last if last.action == "park" and last.epoch is not None else None

    @property
    def status(self) -> str:
        if self.those("stopped") or any(d.action == "stop" for d in self.decisions):
            return "stopped"
        for status in ("diverged", "failed"):
            if self.those(status):
                return status
        if len(self.those("finished")) == len(self.folds):
            return "complete"
        return "parked" if self.last is not None and self.last.action == "park" else "running"


class AnyOrder(RuleBasedStateMachine):
    """Events in any order that a sweep can have, and a note of each."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: dict[int, Noted] = {}
        self.order = 0

    @rule(folds=st.integers(1, 4), max_failures=st.integers(0, 2))
    @precondition(lambda self: not hasattr(self, "state"))
    def begin(self, folds: int, max_failures: int) -> None:
        self.folds, self.max_failures = folds, max_failures
        self.state = SweepState(folds, max_failures)

    def pick(self, data: st.DataObject, found: list[tuple[int, int]]) -> tuple[int, int] | None:
        return data.draw(st.sampled_from(found)) if found else None

    def running(self) -> list[tuple[int, int]]:
        return [(n, f) for n, note in self.notes.items() for f in note.those("running")]

    @rule()
    @precondition(lambda self: hasattr(self, "state") and len(self.notes) < 5)
    def add(self) -> None:
        number = len(self.notes)
        self.state.add(candidate(number))
        self.notes[number] = Noted(dict.fromkeys(range(self.folds), "waiting"))

    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        open_ = [(n, note) for n, note in self.notes.items() if not note.is_lost]
        found = self.pick(data, [(n, f) for n, note in open_ for f in note.those("waiting")])
        if found is not None:
            start(self.state, *found)
            self.notes[found[0]].folds[found[1]] = "running"

    @rule(
        data=st.data(),
        status=st.sampled_from(["finished"] * 5 + list(LOST)),
        seconds=st.floats(0, 1e6),
    )
    def end(self, data: st.DataObject, status: TrialStatus, seconds: float) -> None:
        found = self.pick(data, self.running())
        if found is not None:
            self.state.end(ended(*found, status, seconds))
            note = self.notes[found[0]]
            note.folds[found[1]], note.seconds[found[1]] = status, seconds

    @rule(data=st.data(), epoch=st.integers(1, 3), seconds=st.floats(0, 1e6))
    def park(self, data: st.DataObject, epoch: int, seconds: float) -> None:
        """A first fold leaves in mid-training."""
        alone = [(n, f) for n, f in self.running() if self.is_alone(n) and not self.is_lost(n)]
        found = self.pick(data, alone)
        if found is not None:
            self.state.expect_stop(f"c{found[0]:04d}", found[1])
            self.state.release(f"c{found[0]:04d}", found[1])
            self.notes[found[0]].folds[found[1]] = "waiting"
            self.book(*found, "park", epoch, seconds)

    def is_alone(self, number: int) -> bool:
        note = self.notes[number]
        return len(note.those("running")) == 1 and not note.those("finished")

    def is_lost(self, number: int) -> bool:
        return self.notes[number].is_lost

    @rule(data=st.data(), action=st.sampled_from(["park", "continue", "continue", "stop"]))
    def decide(self, data: st.DataObject, action: RaceAction) -> None:
        """About a finished fold, or of a parked one that it goes on or never does."""
        open_ = [(n, note) for n, note in self.notes.items() if not note.is_lost]
        parked = {n: note.parked for n, note in open_ if note.parked is not None}
        finished = [(n, f) for n, note in open_ for f in note.those("finished")]
        found = self.pick(data, finished + [(n, d.fold) for n, d in parked.items()])
        if found is not None:
            decision = parked.get(found[0])
            epoch, seconds = (decision.epoch, decision.seconds) if decision else (None, 0.0)
            self.book(*found, action, epoch, seconds)

    def book(
        self, number: int, fold: int, action: RaceAction, epoch: int | None, seconds: float
    ) -> None:
        decision = decided(self.order, number, fold, action, epoch, seconds)
        self.order += 1
        self.state.decide(decision)
        note = self.notes[number]
        note.decisions = [d for d in note.decisions if d.fold != fold] + [decision]

    @rule(data=st.data(), blameless=st.booleans())
    def fail(self, data: st.DataObject, blameless: bool) -> None:
        found = self.pick(data, self.running())
        if found is None:
            return
        number, fold = found
        note = self.notes[number]
        counts, most = (note.lost, 10) if blameless else (note.failures, self.max_failures)
        counts[fold] += 1
        again = counts[fold] <= most and not note.is_lost
        name = f"c{number:04d}"
        assert (
            self.state.lose(name, fold, 0) if blameless else self.state.fail(name, fold)
        ) == again
        if again:
            note.folds[fold] = "waiting"
        else:
            self.state.end(ended(number, fold, "failed", 0.5))
            note.folds[fold], note.seconds[fold] = "failed", 0.5

    @rule()
    @precondition(lambda self: hasattr(self, "state"))
    def restart(self) -> None:
        """What ran is lost, attempts are forgotten, the rest comes back from the records."""
        before = list(self.state)
        self.state = SweepState(self.folds, self.max_failures)
        for old in before:
            self.state.add(old.record)
            for trial in old.ended.values():
                self.state.end(trial)
            for decision in old.decisions.values():
                self.state.decide(decision)
        for note in self.notes.values():
            note.failures, note.lost = Counter(), Counter()
            for fold in note.those("running"):
                note.folds[fold] = "waiting"

    @invariant()
    def every_candidate_is_where_the_notes_say(self) -> None:
        for number, note in self.notes.items():
            state = self.state[f"c{number:04d}"]
            assert len(places(state)) == 1, f"{places(state)}: {state}"
            assert state.summary.status == note.status
            assert state.running == set(note.those("running"))
            assert state.waiting == (() if note.is_lost else tuple(note.those("waiting")))
            assert set(state.ended) == set(note.those("finished", *LOST))
            parked = note.parked
            assert state.parked_epoch == (None if parked is None else parked.epoch)
            over = not note.those("running") and (note.is_lost or not note.those("waiting"))
            assert state.settled == over == (places(state) == ["settled"])
            assert list(state.summary.decisions) == note.decisions

    @invariant()
    def counts_are_those_of_the_notes(self) -> None:
        if not hasattr(self, "state"):
            return
        state, notes = self.state, list(self.notes.values())
        parked = [note.parked for note in notes if note.parked is not None]
        whole = [note for note in notes if len(note.those("finished")) == self.folds]
        assert state.complete == sum(not note.is_lost for note in whole)
        assert state.trials_open == sum(
            len(note.those("running")) + len(note.those("waiting")) * (not note.is_lost)
            for note in notes
        )
        begun = sum(len(note.those("running", "finished", *LOST)) for note in notes)
        assert state.trials_started == begun + len(parked)
        seconds = [s for note in notes for s in note.seconds.values()]
        expected = sum(seconds) + sum(decision.seconds for decision in parked)
        assert math.isclose(state.device_seconds, expected, abs_tol=1e-6)
        assert state.epochs_trained == sum(f + 1 for note in notes for f in note.seconds)
        assert len(state) == state.next_number == len(notes)
        granted = [n for n in notes if n.last and n.last.grants and not n.is_lost]
        assert state.trials_promised == sum(len(note.those("waiting")) for note in granted)
        assert state.started == Counter(BACKBONES[number % 2] for number in self.notes)
        of_backbone: dict[str, list[float]] = {}
        for number, note in self.notes.items():
            for fold in note.those("finished"):
                of_backbone.setdefault(BACKBONES[number % 2], []).append(note.seconds[fold])
        assert state.fold_seconds() == pytest.approx({b: mean(s) for b, s in of_backbone.items()})


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=examples(100), stateful_step_count=40, deadline=None)
