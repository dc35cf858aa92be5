"""The state of a sweep: every candidate, its fold trials and the decisions about it.

Takes candidates, outcomes of fold trials and decisions as they come; answers what is where. Pure
bookkeeping: no Ray, no Optuna, no files, so that any order of events can be tested. Counts and sums
are plain loops over the candidates, some milliseconds at 1,000 of them.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import fmean

from foldrace.run_folder.records import (
    CandidateRecord,
    CandidateSummary,
    RaceDecision,
    TrialRecord,
    summarise,
)

_MAX_LOST = 10  # times a fold trial may be lost without getting further before it fails


@dataclass(frozen=True)
class FoldTask:
    """One fold trial to run."""

    candidate: CandidateRecord
    fold: int


@dataclass(eq=False)
class CandidateState:
    """One candidate: its folds wait, run or have ended, and the race has decided about it."""

    record: CandidateRecord
    folds: int
    """Folds of a complete candidate, of all repeats."""
    repeats: int = 1
    running: set[int] = field(default_factory=set)
    ended: dict[int, TrialRecord] = field(default_factory=dict)
    decisions: dict[int, RaceDecision] = field(default_factory=dict)
    """Fold -> the latest decision about it."""
    failures: Counter[int] = field(default_factory=Counter)
    lost: Counter[int] = field(default_factory=Counter)
    """Fold -> attempts lost through no fault of its own since it last got further."""
    furthest: Counter[int] = field(default_factory=Counter)
    """Fold -> epochs that the furthest of its lost attempts had trained."""
    held: dict[int, TrialRecord | None] = field(default_factory=dict)
    """Folds whose last attempt failed, with its record: another trial's end decides about them."""
    leaving: set[int] = field(default_factory=set)
    """Running folds that were asked to stop, and may yet end well."""
    told_settled: bool = False
    """True once the listeners know that it is settled."""
    # Kept until something changes: they are asked for a million times in a large sweep.
    _summary: CandidateSummary | None = None
    _latest: RaceDecision | None = None
    _hopeless: bool | None = None

    @property
    def name(self) -> str:
        """Id of the candidate."""
        return self.record.candidate

    @property
    def number(self) -> int:
        """Its place in the order of suggestions."""
        return int(self.name[1:])

    @property
    def waiting(self) -> tuple[int, ...]:
        """Folds that have neither ended nor run, ascending; none of a hopeless candidate.

        None either while one is held.
        """
        if self.hopeless or self.held:
            return ()
        return tuple(k for k in range(self.folds) if k not in self.running and k not in self.ended)

    @property
    def stopped(self) -> bool:
        """True where the race has stopped it for good."""
        return any(d.action == "stop" for d in self.decisions.values()) or any(
            t.status == "stopped" for t in self.ended.values()
        )

    @property
    def hopeless(self) -> bool:
        """True where it is stopped or a fold failed or diverged: it can never be complete."""
        if self._hopeless is None:
            lost = any(trial.status != "finished" for trial in self.ended.values())
            self._hopeless = lost or self.stopped
        return self._hopeless

    @property
    def settled(self) -> bool:
        """True where no fold of it runs or will run."""
        return not self.running and not self.waiting and not self.held

    @property
    def latest(self) -> RaceDecision | None:
        """The decision that was made last."""
        if self._latest is None:
            self._latest = max(self.decisions.values(), key=lambda d: d.number, default=None)
        return self._latest

    @property
    def parked_epoch(self) -> int | None:
        """Epochs trained of its first fold where it is parked in mid-training, else None."""
        latest = self.latest
        if latest is None or latest.action != "park" or self.running or self.ended:
            return None
        return None if self.hopeless else latest.epoch

    @property
    def granted(self) -> bool:
        """True where the race lets all its folds run, by its latest decision."""
        return self.latest is not None and self.latest.grants

    @property
    def was_granted(self) -> bool:
        """True where it ever was, also if it has been parked since."""
        return any(d.grants for d in self.decisions.values())

    @property
    def is_new(self) -> bool:
        """True where its first fold is yet to run, or was interrupted, and nothing holds it up."""
        begun = self.ended or self.running or self.parked_epoch is not None
        return not begun and bool(self.waiting) and not self.granted

    @property
    def is_between_folds(self) -> bool:
        """True where folds have ended well and it waits for its turn."""
        return bool(self.ended and self.waiting) and not self.running and not self.granted

    @property
    def summary(self) -> CandidateSummary:
        """The candidate as it is now."""
        if self._summary is None:
            trials = [self.ended[fold] for fold in sorted(self.ended)]
            decisions = sorted(self.decisions.values(), key=lambda d: d.number)
            self._summary = summarise(
                self.record, trials, self.folds, not self.settled, decisions, self.repeats
            )
        return self._summary

    def changed(self) -> None:
        """Note that something of it is another."""
        self._summary = self._latest = self._hopeless = None


class SweepState:
    """Every candidate of a sweep.

    A candidate is settled when none of its folds waits or runs; a fold never runs twice at once,
    nor after it ended.
    """

    def __init__(
        self,
        folds: int,
        max_failures: int,
        devices: Callable[[str], float] = lambda backbone: 1.0,
        repeats: int = 1,
    ) -> None:
        """`devices(backbone)`: those of a fold trial, shares of a GPU included."""
        self.folds, self.devices, self._repeats = folds, devices, repeats
        self._max_failures = max_failures
        self._candidates: dict[str, CandidateState] = {}

    def __len__(self) -> int:
        return len(self._candidates)

    def __iter__(self) -> Iterator[CandidateState]:
        """The candidates in the order in which they were added."""
        return iter(self._candidates.values())

    def __getitem__(self, candidate: str) -> CandidateState:
        return self._candidates[candidate]

    # -- events

    def add(self, record: CandidateRecord) -> CandidateState:
        """Add a candidate, new or of an earlier session."""
        state = self._candidates[record.candidate] = CandidateState(
            record, self.folds, self._repeats
        )
        return state

    def start(self, task: FoldTask) -> None:
        """Move a waiting fold to the running ones."""
        state = self._changed(task.candidate.candidate)
        assert task.fold in state.waiting, f"{state.name} fold{task.fold} does not wait"
        state.running.add(task.fold)

    def end(self, record: TrialRecord) -> None:
        """Book a fold trial that ended: finished, stopped, diverged, or failed for good."""
        state = self._changed(record.candidate)
        self._leave(state, record.fold)
        state.ended[record.fold] = record

    def decide(self, decision: RaceDecision) -> None:
        """Book a decision of the race, in place of an earlier one about the same fold."""
        self._changed(decision.candidate).decisions[decision.fold] = decision

    def expect_stop(self, candidate: str, fold: int) -> None:
        """Note that a running fold was asked to leave."""
        self._changed(candidate).leaving.add(fold)

    def release(self, candidate: str, fold: int) -> None:
        """Take a fold out of the running ones: it was parked, or its attempt came to nothing."""
        self._leave(self._changed(candidate), fold)

    def fail(self, candidate: str, fold: int) -> bool:
        """Count a failed attempt; True where the fold waits again, and will be tried once more.

        False: the caller holds it or ends it as failed, also where another fold has lost the
        candidate already.
        """
        state = self._candidates[candidate]
        state.failures[fold] += 1
        if state.failures[fold] > self._max_failures or state.hopeless:
            return False
        self.release(candidate, fold)
        return True

    def lose(self, candidate: str, fold: int, epochs: int) -> bool:
        """Count an attempt that was lost, after so many epochs, through no fault of its own.

        True where the fold waits again. One that got further than all before counts as the first.
        """
        state = self._candidates[candidate]
        further = epochs > state.furthest[fold]
        state.lost[fold] = 1 if further else state.lost[fold] + 1
        state.furthest[fold] = max(state.furthest[fold], epochs)
        if state.lost[fold] > _MAX_LOST or state.hopeless:
            return False
        self.release(candidate, fold)
        return True

    def hold(self, candidate: str, fold: int, record: TrialRecord | None) -> None:
        """Put a running fold aside whose last attempt failed."""
        state = self._changed(candidate)
        self._leave(state, fold)
        state.held[fold] = record

    def forgive(self, candidate: str, fold: int) -> None:
        """Let a fold have one more attempt than failed ones."""
        failures = self._candidates[candidate].failures
        failures[fold] = min(failures[fold], self._max_failures)

    def last_of_several(self, candidate: str, fold: int) -> bool:
        """True where a fold trial has failed, and may be tried once more but not twice."""
        return 0 < self._candidates[candidate].failures[fold] == self._max_failures

    # -- counts

    @property
    def next_number(self) -> int:
        """Number of the next candidate: ids are never used twice."""
        return max((state.number for state in self), default=-1) + 1

    @property
    def trials(self) -> Iterator[TrialRecord]:
        """Every fold trial that ended."""
        return (trial for state in self for trial in state.ended.values())

    @property
    def complete(self) -> int:
        """Number of complete candidates."""
        return sum(len(s.ended) == s.folds and not s.hopeless for s in self)

    @property
    def trials_open(self) -> int:
        """Number of fold trials that wait, run or are held."""
        return sum(len(s.waiting) + len(s.running) + len(s.held) for s in self)

    @property
    def trials_started(self) -> int:
        """Number of fold trials that run, are parked or have ended."""
        return sum(len(s.ended) + len(s.running) + (s.parked_epoch is not None) for s in self)

    @property
    def trials_promised(self) -> int:
        """Number of folds that wait and that the race has granted."""
        return sum(len(state.waiting) for state in self if state.granted)

    @property
    def device_seconds(self) -> float:
        """Seconds × devices of all fold trials that ended, and of the parked ones."""
        ended = (
            t.seconds * (self.devices(t.backbone) if t.devices is None else t.devices)
            for t in self.trials
        )
        parked = (
            s.latest.seconds * self.devices(s.record.backbone)
            for s in self
            if s.parked_epoch is not None and s.latest is not None
        )
        return math.fsum((*ended, *parked))

    @property
    def epochs_trained(self) -> int:
        """Epochs of all fold trials that ended."""
        return sum(trial.epochs_trained for trial in self.trials)

    @property
    def started(self) -> Mapping[str, int]:
        """Backbone -> number of its candidates."""
        return Counter(state.record.backbone for state in self)

    def gains(self) -> dict[str, list[float]]:
        """Backbone -> the latest gain of each of its candidates that has one."""
        found: defaultdict[str, list[float]] = defaultdict(list)
        for state in self:
            if state.summary.gain is not None:
                found[state.record.backbone].append(state.summary.gain)
        return dict(found)

    def fold_seconds(self) -> dict[str, float]:
        """Backbone -> mean seconds of its finished fold trials."""
        found: defaultdict[str, list[float]] = defaultdict(list)
        for trial in self.trials:
            if trial.status == "finished":
                found[trial.backbone].append(trial.seconds)
        return {backbone: fmean(seconds) for backbone, seconds in found.items()}

    def summaries(self) -> list[CandidateSummary]:
        """All candidates as they are now, in the order in which they were added."""
        return [state.summary for state in self]

    def _changed(self, candidate: str) -> CandidateState:
        state = self._candidates[candidate]
        state.changed()
        return state

    def _leave(self, state: CandidateState, fold: int) -> None:
        state.running.discard(fold)
        state.leaving.discard(fold)
        state.held.pop(fold, None)
