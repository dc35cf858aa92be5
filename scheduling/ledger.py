"""Who is where: every candidate, its folds, and which fold trial should run next.

Takes candidates and outcomes of fold trials, gives tasks. Pure bookkeeping: no Ray, no Optuna, no
files, so that any order of events can be tested.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from experiment.records import CandidateRecord, CandidateSummary, TrialRecord
from experiment.store import summarise

_MAX_LOST = 10  # times a fold trial may vanish through no fault of its own before it counts


@dataclass(frozen=True)
class FoldTask:
    """One fold trial to run."""

    candidate: CandidateRecord
    fold: int


@dataclass
class _Entry:
    record: CandidateRecord
    waiting: list[int]
    running: set[int] = field(default_factory=set)
    ended: dict[int, TrialRecord] = field(default_factory=dict)
    failures: dict[int, int] = field(default_factory=dict)
    lost: dict[int, int] = field(default_factory=dict)


class Ledger:
    """The state of every candidate. A candidate is settled when none of its folds waits or
    runs; a fold never runs twice at once, nor after it ended."""

    def __init__(self, folds: int, max_failures: int) -> None:
        self.folds = folds
        self._max_failures = max_failures
        self._entries: dict[str, _Entry] = {}
        self._open: dict[str, _Entry] = {}  # those with a waiting fold

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, record: CandidateRecord, ended: Iterable[TrialRecord] = ()) -> None:
        """A new candidate, or one from an earlier session with the trials that have ended."""
        done = {trial.fold: trial for trial in ended}
        entry = _Entry(record, [k for k in range(self.folds) if k not in done], ended=done)
        self._entries[record.candidate] = entry
        self._drop_waiting_if_lost(entry)
        if entry.waiting:
            self._open[record.candidate] = entry

    def next_task(self) -> FoldTask | None:
        """The first waiting fold of the most promising started candidate: the one with the least
        log loss so far, those without a finished fold last, the older first."""
        if not self._open:
            return None
        entry = min(self._open.values(), key=_promise)
        return FoldTask(entry.record, entry.waiting[0])

    def start(self, task: FoldTask) -> None:
        entry = self._entries[task.candidate.candidate]
        entry.waiting.remove(task.fold)
        entry.running.add(task.fold)
        self._close_if_nothing_waits(entry)

    def end(self, record: TrialRecord) -> CandidateSummary | None:
        """A fold trial ended (finished, diverged, or failed for good). Gives the candidate's
        summary when this settles it."""
        entry = self._entries[record.candidate]
        entry.running.discard(record.fold)
        entry.ended[record.fold] = record
        self._drop_waiting_if_lost(entry)
        self._close_if_nothing_waits(entry)
        settled = not entry.waiting and not entry.running
        return self.summary(record.candidate) if settled else None

    def fail(self, candidate: str, fold: int) -> bool:
        """An attempt failed. True: it will be tried again; False: the caller ends it as failed,
        also where another fold has lost the candidate already."""
        entry = self._entries[candidate]
        entry.failures[fold] = entry.failures.get(fold, 0) + 1
        return self._again(entry, fold, entry.failures[fold] <= self._max_failures)

    def lose(self, candidate: str, fold: int) -> bool:
        """An attempt was taken away through no fault of its own; as `fail`, on another count."""
        entry = self._entries[candidate]
        entry.lost[fold] = entry.lost.get(fold, 0) + 1
        return self._again(entry, fold, entry.lost[fold] <= _MAX_LOST)

    def last_of_several(self, candidate: str, fold: int) -> bool:
        """Whether a fold trial has failed, and may be tried once more but not twice."""
        return 0 < self._entries[candidate].failures.get(fold, 0) == self._max_failures

    def summary(self, candidate: str) -> CandidateSummary:
        entry = self._entries[candidate]
        trials = [entry.ended[fold] for fold in sorted(entry.ended)]
        unsettled = bool(entry.waiting or entry.running)
        return summarise(entry.record, trials, self.folds, running=unsettled)

    def summaries(self) -> list[CandidateSummary]:
        return [self.summary(candidate) for candidate in self._entries]

    @property
    def next_number(self) -> int:
        """Of the next candidate: ids are never used twice."""
        return max((int(candidate[1:]) for candidate in self._entries), default=-1) + 1

    @property
    def trials_ended(self) -> int:
        return sum(len(entry.ended) for entry in self._entries.values())

    @property
    def trials_open(self) -> int:
        """Fold trials that wait or run."""
        return sum(len(e.waiting) + len(e.running) for e in self._entries.values())

    def _again(self, entry: _Entry, fold: int, allowed: bool) -> bool:
        if not allowed or _is_lost(entry):
            return False
        entry.running.discard(fold)
        entry.waiting = sorted([*entry.waiting, fold])
        self._open[entry.record.candidate] = entry
        return True

    def _drop_waiting_if_lost(self, entry: _Entry) -> None:
        """A candidate with a failed or diverged fold can never be complete: spend nothing more."""
        if _is_lost(entry):
            entry.waiting.clear()

    def _close_if_nothing_waits(self, entry: _Entry) -> None:
        if not entry.waiting:
            self._open.pop(entry.record.candidate, None)


def _is_lost(entry: _Entry) -> bool:
    return any(trial.status != "finished" for trial in entry.ended.values())


def _promise(entry: _Entry) -> tuple[bool, float, str]:
    scores = [t.variants[t.best].val_logloss for t in entry.ended.values() if t.best]
    mean = sum(scores) / len(scores) if scores else 0.0
    return not scores, mean, entry.record.candidate
