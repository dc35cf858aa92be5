"""How far a sweep is: counts, the best candidates, the fold trials and the time that are left.

Takes fold trials, decisions and candidates as they end, gives `Progress`. Each sum grows by one
record at a time, so that a large sweep costs no more to show than a small one. No clock of its own.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

from foldrace.config.schema import ResourcesConfig, SearchConfig
from foldrace.run_folder.progress import BudgetUse, Event, Progress, RunningTrial
from foldrace.run_folder.records import (
    CandidateRecord,
    CandidateStatus,
    CandidateSummary,
    RaceDecision,
    TrialRecord,
)
from foldrace.scheduling.budget import Budget, CompletionCost, SweepUsage

_LEADERS = 8
_DECISIONS = 3


class ProgressCounts:
    """Counts and sums of one sweep, from its first session on."""

    def __init__(
        self, search: SearchConfig, resources: ResourcesConfig, folds: int, devices: float
    ) -> None:
        """`folds`: of a candidate; `devices`: of a fold trial, see `devices_of_a_trial`."""
        self._search, self._resources, self._devices = search, resources, devices
        self._budget = Budget(search, resources)
        self._folds = folds
        self._finished: Counter[str] = Counter()  # by backbone, of fold trials
        self._finished_seconds: defaultdict[str, float] = defaultdict(float)
        self._settled_trials = 0  # fold trials of settled candidates
        self._open: dict[str, CandidateSummary] = {}  # not settled, with an ended fold trial
        self._settled: Counter[CandidateStatus] = Counter()
        self._best: list[tuple[float, str, CandidateSummary]] = []  # ascending
        self._events: list[Event] = []
        self._last: deque[RaceDecision] = deque(maxlen=_DECISIONS)
        self._ended = self._failed = 0
        self._seconds = 0.0

    # -- events

    def replay(self, summaries: Sequence[CandidateSummary]) -> None:
        """Take in the candidates of earlier sessions, with the race's decisions about them."""
        for summary in summaries:
            for trial in summary.trials:
                self._count(trial)
            if summary.settled:
                self._settle(summary)
            else:
                self._open[summary.candidate.candidate] = summary
        decided = (d for summary in summaries for d in summary.decisions)
        last = heapq.nlargest(_DECISIONS, decided, key=lambda d: d.number)
        self._last = deque(reversed(last), _DECISIONS)

    def add_trial(self, record: TrialRecord) -> None:
        """Take in a fold trial that ended, and is not tried again."""
        self._count(record)
        known = self._open.get(record.candidate) or self._new(record)
        trials = sorted([*known.trials, record], key=lambda t: t.fold)
        self._open[record.candidate] = replace(known, trials=tuple(trials))
        self._events.append(record)

    def add_decision(self, decision: RaceDecision) -> None:
        """Take in a decision of the race, in place of an earlier one about the same fold."""
        self._last.append(decision)
        known = self._open.get(decision.candidate)
        if known is not None:
            others = (d for d in known.decisions if d.fold != decision.fold)
            self._open[decision.candidate] = replace(known, decisions=(*others, decision))
        self._events.append(decision)

    def settle(self, summary: CandidateSummary) -> None:
        """Take in a candidate that gets no further fold."""
        self._settle(summary)
        self._events.append(summary)

    # -- counts

    @property
    def trials_ended(self) -> int:
        """Number of fold trials that ended."""
        return self._ended

    @property
    def device_seconds(self) -> float:
        """Seconds of the fold trials that ended × devices of each."""
        return self._seconds * self._devices

    def fold_seconds(self, backbone: str) -> float | None:
        """Mean seconds of the backbone's finished fold trials, else of all; None without any."""
        if self._finished[backbone]:
            return self._finished_seconds[backbone] / self._finished[backbone]
        finished = self._finished.total()
        return sum(self._finished_seconds.values()) / finished if finished else None

    def cost(self, backbone: str, folds: int, slots: int) -> CompletionCost:
        """Expected cost of `folds` more fold trials of a candidate, for `Budget`."""
        return CompletionCost(folds, self.fold_seconds(backbone), slots, self._devices)

    def progress(
        self,
        running: Sequence[RunningTrial],
        usage: SweepUsage,
        slots: int,
        elapsed_s: float,
        notes: Sequence[str] = (),
    ) -> Progress:
        """The sweep at this moment; `usage` is of all sessions, `elapsed_s` of this one."""
        trials_left, eta_s = self._outlook(running, usage, slots)
        counts = dict(self._settled)
        if usage.candidates > self._settled.total():
            counts["running"] = usage.candidates - self._settled.total()
        return Progress(
            trials_done=self._ended,
            trials_total=self._ended + math.ceil(trials_left - 1e-6),
            running=tuple(running),
            counts=counts,
            leaders=self._leaders(),
            events=self._events,
            failed=self._failed,
            elapsed_s=elapsed_s,
            eta_s=eta_s,
            best_logloss=self._best[0][0] if self._best else None,
            blend_logloss=self._last[-1].blend_logloss if self._last else None,
            decisions=tuple(self._last),
            budget=tuple(self._used(usage, elapsed_s)),
            notes=tuple(notes),
        )

    def _count(self, record: TrialRecord) -> None:
        self._ended += 1
        self._seconds += record.seconds
        self._failed += record.status in ("failed", "diverged")
        if record.status == "finished":
            self._finished[record.backbone] += 1
            self._finished_seconds[record.backbone] += record.seconds

    def _settle(self, summary: CandidateSummary) -> None:
        name = summary.candidate.candidate
        self._open.pop(name, None)
        self._settled[summary.status] += 1
        self._settled_trials += len(summary.trials)
        if summary.status == "complete" and summary.best:
            entry = (summary.pooled_logloss(summary.best), name, summary)
            bisect.insort(self._best, entry, key=lambda e: e[:2])
            del self._best[_LEADERS:]

    def _new(self, record: TrialRecord) -> CandidateSummary:
        candidate = CandidateRecord(
            candidate=record.candidate, backbone=record.backbone, params=record.params
        )
        return CandidateSummary(candidate, "running", (), self._folds)

    def _leaders(self) -> tuple[CandidateSummary, ...]:
        """The best complete candidates, then open ones, no more than are shown."""
        best = [summary for _, _, summary in self._best]
        begun = (self._open[name] for name in sorted(self._open) if self._open[name].trials)
        return (*best, *islice(begun, _LEADERS - len(best)))

    def _outlook(
        self, running: Sequence[RunningTrial], usage: SweepUsage, slots: int
    ) -> tuple[float, float | None]:
        """Fold trials that have not ended, and seconds until they have.

        Fold trials still to start, as many of a candidate's folds as settled ones have had, times
        mean seconds over the slots, within the budget. None before one has finished.
        """
        settled = self._settled.total()
        used = self._settled_trials / (settled * self._folds) if settled else 1.0
        mean = self._seconds / self._ended if self._finished else None
        cost = CompletionCost(1, mean, slots, self._devices)
        to_start = min(
            used * self._waiting(running, usage), self._budget.fold_trials_left(usage, cost)
        )
        trials = to_start + len(running)
        if mean is None:
            return trials, None
        rests = [
            (1 - t.epoch / t.epochs) * (self.fold_seconds(t.backbone) or mean) for t in running
        ]
        seconds = max((to_start * mean + sum(rests)) / max(1, slots), max(rests, default=0.0))
        left = usage.seconds_left
        if left is None or seconds <= left:
            return trials, seconds
        left = max(0.0, left)
        return max(trials * left / seconds, float(len(running))), left

    def _waiting(self, running: Sequence[RunningTrial], usage: SweepUsage) -> int:
        """Fold trials that have not started, if every candidate gets all of its folds.

        A candidate with a fold that did not finish gets none.
        """
        running_of = Counter(trial.candidate for trial in running)
        candidates = max(self._search.most_candidates, usage.candidates)
        without_trials = candidates - self._settled.total() - len(self._open)
        first = sum(n for name, n in running_of.items() if name not in self._open)
        return (
            without_trials * self._folds
            - first
            + sum(
                self._folds - len(known.trials) - running_of[name]
                for name, known in self._open.items()
                if len(known.finished) == len(known.trials)
            )
        )

    def _used(self, usage: SweepUsage, elapsed_s: float) -> Iterator[BudgetUse]:
        yield BudgetUse(usage.candidates, self._search.candidates, "candidates")
        if self._search.fold_trials is not None:
            yield BudgetUse(usage.fold_trials, self._search.fold_trials, "fold trials")
        if self._resources.gpu_hours is not None:
            yield BudgetUse(usage.device_seconds / 3600, self._resources.gpu_hours, "GPU-hours")
        if usage.seconds_left is not None:
            yield BudgetUse(elapsed_s, elapsed_s + max(0.0, usage.seconds_left), "s")
