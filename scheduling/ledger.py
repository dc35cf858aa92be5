"""The state of every candidate and of its folds, and which fold trial should run next.

Takes candidates, outcomes of fold trials and decisions of the race, gives tasks. Pure bookkeeping:
no Ray, no Optuna, no files, so that any order of events can be tested.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice

from foldrace.run_folder.records import (
    CandidateRecord,
    CandidateSummary,
    RaceDecision,
    TrialRecord,
    summarise,
)

_MAX_LOST = 10  # times a fold trial may vanish through no fault of its own before it fails


@dataclass(frozen=True)
class FoldTask:
    """One fold trial to run."""

    candidate: CandidateRecord
    fold: int


@dataclass(eq=False)
class _Entry:
    record: CandidateRecord
    waiting: list[int]
    running: set[int] = field(default_factory=set)
    ended: dict[int, TrialRecord] = field(default_factory=dict)
    decisions: dict[int, RaceDecision] = field(default_factory=dict)
    failures: dict[int, int] = field(default_factory=dict)
    lost: dict[int, int] = field(default_factory=dict)
    ending: set[int] = field(default_factory=set)
    """Folds that were asked to stop: whether the candidate is stopped is open until they end."""
    deferred: bool = False
    stamp: int = 0
    """Version of the entry: what was put on the heap with another one is out of date."""

    @property
    def name(self) -> str:
        return self.record.candidate

    @property
    def number(self) -> int:
        return int(self.record.candidate[1:])

    @property
    def settled(self) -> bool:
        return not self.waiting and not self.running

    @property
    def stopped(self) -> bool:
        return any(d.action == "stop" for d in self.decisions.values()) or any(
            t.status == "stopped" for t in self.ended.values()
        )

    @property
    def hopeless(self) -> bool:
        """True where it is stopped or a fold failed or diverged: it can never be complete."""
        return self.stopped or any(t.status != "finished" for t in self.ended.values())

    @property
    def startable(self) -> bool:
        return bool(self.waiting) and not self.deferred and self.running.isdisjoint(self.ending)

    @property
    def latest(self) -> RaceDecision | None:
        return max(self.decisions.values(), key=lambda d: d.number, default=None)


class Ledger:
    """The state of every candidate of a sweep.

    A candidate is settled when none of its folds waits or runs; a fold never runs twice at once,
    nor after it ended. No candidate may be stopped before `min_complete` are complete (None: none
    ever is), so the first unsettled candidates, as many as are missing, get their next folds
    without a decision.
    """

    def __init__(self, folds: int, max_failures: int, min_complete: int | None = None) -> None:
        self.folds = folds
        self._max_failures, self._min_complete = max_failures, min_complete
        self._entries: dict[str, _Entry] = {}
        self._unsettled: dict[str, _Entry] = {}
        # Candidates with a waiting fold:
        self._fresh: dict[str, _Entry] = {}  # without any other fold
        self._busy: dict[str, _Entry] = {}  # with a running one
        self._judged: list[tuple[float, float, int, int, _Entry]] = []  # a heap: with finished ones
        self._deferred: list[_Entry] = []
        self._summaries: dict[str, CandidateSummary] = {}
        self._changed: set[str] = set()
        self._trials_ended = 0
        self._complete = 0
        self._started: Counter[str] = Counter()
        self._gains: defaultdict[str, dict[str, float]] = defaultdict(dict)
        self.next_number = 0
        """Number of the next candidate: ids are never used twice."""
        self.trained_seconds = 0.0
        """Seconds of all fold trials that ended."""

    def __len__(self) -> int:
        return len(self._entries)

    def add(
        self,
        record: CandidateRecord,
        ended: Iterable[TrialRecord] = (),
        decisions: Iterable[RaceDecision] = (),
    ) -> None:
        """Add a new candidate, or one of an earlier session with its trials and decisions."""
        entry = _Entry(record, [])
        self._entries[record.candidate] = self._unsettled[record.candidate] = entry
        self._started[record.backbone] += 1
        self.next_number = max(self.next_number, entry.number + 1)
        for trial in ended:
            self._book(entry, trial)
        for decision in decisions:
            self._note(entry, decision)
        entry.waiting = [k for k in range(self.folds) if k not in entry.ended]
        self._settle(entry)
        self.summary(record.candidate)  # so that they are in the order of the candidates

    def next_task(self, spare: bool = False) -> FoldTask | None:
        """The fold trial that should run next, or None.

        First the folds that need no decision; then, once candidates may be stopped, the next fold
        of the most promising one; then first folds. `spare`: nothing else could start, so that
        several folds of a candidate may run, and one without any decision may go on.
        """
        entry = self._next_undecided()
        if entry is None and self._open:
            entry = self._most_promising()
        if entry is None:
            entry = next(iter(self._fresh.values()), None)
        if entry is None and spare:
            entry = self._most_promising() or min(self._busy.values(), key=_order, default=None)
        return FoldTask(entry.record, entry.waiting[0]) if entry is not None else None

    def start(self, task: FoldTask) -> None:
        """Move a waiting fold to the running ones."""
        entry = self._entries[task.candidate.candidate]
        entry.waiting.remove(task.fold)
        entry.running.add(task.fold)
        self._place(entry)

    def end(self, record: TrialRecord) -> CandidateSummary | None:
        """Book a fold trial that ended: finished, stopped, diverged, or failed for good.

        Returns the candidate's summary when this settles it.
        """
        entry = self._entries[record.candidate]
        entry.running.discard(record.fold)
        self._book(entry, record)
        return self._settle(entry)

    def decide(self, decision: RaceDecision) -> CandidateSummary | None:
        """Book a decision of the race; returns the candidate's summary when it is settled."""
        entry = self._entries[decision.candidate]
        self._note(entry, decision)
        return self._settle(entry)

    def fail(self, candidate: str, fold: int) -> bool:
        """Count a failed attempt; True where the fold will be tried again.

        False: the caller ends it as failed, also where another fold has lost the candidate already.
        """
        entry = self._entries[candidate]
        entry.failures[fold] = entry.failures.get(fold, 0) + 1
        return self._again(entry, fold, entry.failures[fold] <= self._max_failures)

    def lose(self, candidate: str, fold: int) -> bool:
        """Count an attempt that vanished through no fault of its own; returns as `fail` does."""
        entry = self._entries[candidate]
        entry.lost[fold] = entry.lost.get(fold, 0) + 1
        return self._again(entry, fold, entry.lost[fold] <= _MAX_LOST)

    def drop(self, candidate: str, fold: int) -> CandidateSummary | None:
        """Forget a running attempt of a stopped candidate that came to nothing."""
        entry = self._entries[candidate]
        entry.running.discard(fold)
        return self._settle(entry)

    def expect_stop(self, candidate: str, fold: int) -> None:
        """Note that a running fold was asked to stop.

        None of the candidate's others starts before it has ended, which it may yet do well.
        """
        entry = self._entries[candidate]
        entry.ending.add(fold)
        self._place(entry)

    def defer(self, candidate: str) -> None:
        """Let no fold of the candidate start for now: the next task is another candidate's."""
        entry = self._entries[candidate]
        entry.deferred = True
        self._deferred.append(entry)
        self._place(entry)

    def recall_deferred(self) -> None:
        """Let all deferred candidates start folds again."""
        for entry in self._deferred:
            entry.deferred = False
            self._place(entry)
        self._deferred.clear()

    def last_of_several(self, candidate: str, fold: int) -> bool:
        """True where a fold trial has failed, and may be tried once more but not twice."""
        return 0 < self._entries[candidate].failures.get(fold, 0) == self._max_failures

    def is_stopped(self, candidate: str) -> bool:
        """True where the race has stopped the candidate, or one of its fold trials."""
        return self._entries[candidate].stopped

    def is_hopeless(self, candidate: str) -> bool:
        """True where the candidate can never be complete."""
        return self._entries[candidate].hopeless

    def running_count(self, candidate: str) -> int:
        """Number of the candidate's folds that run now."""
        return len(self._entries[candidate].running)

    def folds_left(self, candidate: str) -> int:
        """Number of the candidate's folds that wait."""
        return len(self._entries[candidate].waiting)

    def summary(self, candidate: str) -> CandidateSummary:
        """The candidate as it is now."""
        if candidate in self._changed or candidate not in self._summaries:
            self._changed.discard(candidate)
            entry = self._entries[candidate]
            trials = [entry.ended[fold] for fold in sorted(entry.ended)]
            decisions = sorted(entry.decisions.values(), key=lambda d: d.number)
            self._summaries[candidate] = summarise(
                entry.record, trials, self.folds, not entry.settled, decisions
            )
        return self._summaries[candidate]

    def summaries(self) -> list[CandidateSummary]:
        """All candidates as they are now, in the order in which they were added."""
        for candidate in list(self._changed):
            self.summary(candidate)
        return list(self._summaries.values())

    @property
    def trials_open(self) -> int:
        """Number of fold trials that wait or run."""
        return sum(len(e.waiting) + len(e.running) for e in self._unsettled.values())

    @property
    def trials_started(self) -> int:
        """Number of fold trials that run or have ended."""
        return self._trials_ended + sum(len(e.running) for e in self._unsettled.values())

    @property
    def started(self) -> Mapping[str, int]:
        """Backbone -> number of its candidates."""
        return self._started

    def gains(self) -> dict[str, list[float]]:
        """Backbone -> the latest gain of each of its candidates that has one."""
        return {backbone: list(gains.values()) for backbone, gains in self._gains.items()}

    @property
    def _open(self) -> bool:
        return self._min_complete is not None and self._complete >= self._min_complete

    def _next_undecided(self) -> _Entry | None:
        """The first startable candidate of those that are to be complete before any is stopped."""
        needed = None if self._min_complete is None else self._min_complete - self._complete
        if needed is not None and needed <= 0:
            return None
        first = islice(self._unsettled.values(), needed)
        return next((entry for entry in first if entry.startable), None)

    def _most_promising(self) -> _Entry | None:
        while self._judged:
            *_, stamp, entry = self._judged[0]
            if stamp == entry.stamp:
                return entry
            heapq.heappop(self._judged)
        return None

    def _again(self, entry: _Entry, fold: int, allowed: bool) -> bool:
        if not allowed or entry.hopeless:
            return False
        entry.running.discard(fold)
        entry.waiting = sorted([*entry.waiting, fold])
        self._place(entry)
        return True

    def _book(self, entry: _Entry, record: TrialRecord) -> None:
        entry.ended[record.fold] = record
        self._trials_ended += 1
        self.trained_seconds += record.seconds

    def _note(self, entry: _Entry, decision: RaceDecision) -> None:
        entry.decisions[decision.fold] = decision
        if decision.gain is not None:
            self._gains[entry.record.backbone][entry.name] = decision.gain

    def _settle(self, entry: _Entry) -> CandidateSummary | None:
        """End what is left of a hopeless candidate; returns the summary of a settled one."""
        if entry.hopeless:
            entry.waiting.clear()
        self._place(entry)
        if not entry.settled:
            return None
        summary = self.summary(entry.name)
        if self._unsettled.pop(entry.name, None) is not None and summary.status == "complete":
            self._complete += 1
        return summary

    def _place(self, entry: _Entry) -> None:
        """Put the candidate where the next task is looked for."""
        entry.stamp += 1
        self._changed.add(entry.name)
        self._fresh.pop(entry.name, None)
        self._busy.pop(entry.name, None)
        if not entry.startable:
            return
        if entry.running:
            self._busy[entry.name] = entry
        elif not entry.ended:
            self._fresh[entry.name] = entry
        else:
            heapq.heappush(self._judged, (*_order(entry), entry.stamp, entry))


def _order(entry: _Entry) -> tuple[float, float, int]:
    """Sort key of the waiting candidates, the most promising first.

    Where the race goes by gains, the highest gain that its standard error allows, and before them
    those whose gain is not known yet; then the least log loss.
    """
    scores = [t.variants[t.best].val_logloss for t in entry.ended.values() if t.best]
    loss = math.fsum(scores) / len(scores) if scores else math.inf
    latest = entry.latest
    if latest is None or latest.rule != "gain":
        return 0.0, loss, entry.number
    if latest.gain is None or latest.gain_se is None:
        return -math.inf, loss, entry.number
    return -(latest.gain + (latest.z or 0.0) * latest.gain_se), loss, entry.number
