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
from foldrace.run_folder.progress import Event, Progress, RunningTrial, Used
from foldrace.run_folder.records import (
    CandidateRecord,
    CandidateStatus,
    CandidateSummary,
    RaceDecision,
    TrialRecord,
)
from foldrace.scheduling.budget import Budget, Need, Spent

_LEADERS = 8
_DECISIONS = 3


class ProgressCounts:
    """One sweep, from its first session on."""

    def __init__(
        self, search: SearchConfig, resources: ResourcesConfig, folds: int, devices: float
    ) -> None:
        """`devices`: of a fold trial, as `devices_of_a_trial` gives them."""
        self._search, self._resources, self._devices = search, resources, devices
        self._budget = Budget(search, resources)
        self._folds = folds
        self._finished: Counter[str] = Counter()  # by backbone, of fold trials
        self._finished_seconds: defaultdict[str, float] = defaultdict(float)
        self._settled_trials = 0  # fold trials of settled candidates
        self._open: dict[str, CandidateSummary] = {}  # not settled, as far as they are known
        self._settled: Counter[CandidateStatus] = Counter()
        self._best: list[tuple[float, str, CandidateSummary]] = []  # ascending
        self._events: list[Event] = []
        self._last: deque[RaceDecision] = deque(maxlen=_DECISIONS)
        self._ended = self._failed = 0
        self._seconds = 0.0

    # -- what happens

    def replay(self, summaries: Sequence[CandidateSummary]) -> None:
        """The candidates of earlier sessions, with what the race has decided about them since."""
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
        """A fold trial ended, and is not tried again."""
        self._count(record)
        known = self._open.get(record.candidate) or self._new(record)
        trials = sorted([*known.trials, record], key=lambda t: t.fold)
        self._open[record.candidate] = replace(known, trials=tuple(trials))
        self._events.append(record)

    def add_decision(self, decision: RaceDecision) -> None:
        """The race decided after a fold of a candidate, or within one; a later decision takes the
        place of an earlier one of the same fold, as in the run folder."""
        self._last.append(decision)
        known = self._open.get(decision.candidate)
        if known is not None:
            others = (d for d in known.decisions if d.fold != decision.fold)
            self._open[decision.candidate] = replace(known, decisions=(*others, decision))
        self._events.append(decision)

    def settle(self, summary: CandidateSummary) -> None:
        """A candidate gets no further fold."""
        self._settle(summary)
        self._events.append(summary)

    # -- what is known

    @property
    def trials_ended(self) -> int:
        return self._ended

    @property
    def device_seconds(self) -> float:
        """Of the fold trials that ended."""
        return self._seconds * self._devices

    def fold_seconds(self, backbone: str) -> float | None:
        """Mean seconds of the backbone's finished fold trials, else of all; None without any."""
        if self._finished[backbone]:
            return self._finished_seconds[backbone] / self._finished[backbone]
        finished = self._finished.total()
        return sum(self._finished_seconds.values()) / finished if finished else None

    def need(self, backbone: str, folds: int, slots: int) -> Need:
        """What `folds` more fold trials of a candidate take, for `Budget`."""
        return Need(folds, self.fold_seconds(backbone), slots, self._devices)

    def progress(
        self,
        running: Sequence[RunningTrial],
        spent: Spent,
        slots: int,
        elapsed_s: float,
        notes: Sequence[str] = (),
    ) -> Progress:
        """`spent` is of all sessions; `elapsed_s` of this one."""
        trials_left, eta_s = self._outlook(running, spent, slots)
        counts = dict(self._settled)
        if spent.candidates > self._settled.total():
            counts["running"] = spent.candidates - self._settled.total()
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
            budget=tuple(self._used(spent, elapsed_s)),
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
        """No more than are shown."""
        best = [summary for _, _, summary in self._best]
        begun = (self._open[name] for name in sorted(self._open) if self._open[name].trials)
        return (*best, *islice(begun, _LEADERS - len(best)))

    def _outlook(
        self, running: Sequence[RunningTrial], spent: Spent, slots: int
    ) -> tuple[float, float | None]:
        """Fold trials that have not ended, and the seconds until they have (None before the first
        one has finished): those still to start, as far as the race and the budget let them, times
        mean seconds over the slots."""
        settled = self._settled.total()
        used = self._settled_trials / (settled * self._folds) if settled else 1.0
        mean = self._seconds / self._ended if self._finished else None
        need = Need(1, mean, slots, self._devices)
        to_start = min(
            used * self._waiting(running, spent), self._budget.fold_trials_left(spent, need)
        )
        trials = to_start + len(running)
        if mean is None:
            return trials, None
        rests = [
            (1 - t.epoch / t.epochs) * (self.fold_seconds(t.backbone) or mean) for t in running
        ]
        seconds = max((to_start * mean + sum(rests)) / max(1, slots), max(rests, default=0.0))
        left = spent.seconds_left
        if left is None or seconds <= left:
            return trials, seconds
        left = max(0.0, left)
        return max(trials * left / seconds, float(len(running))), left

    def _waiting(self, running: Sequence[RunningTrial], spent: Spent) -> int:
        """Fold trials that have not started, if every candidate gets all of its folds; none of a
        candidate with a fold that did not finish."""
        running_of = Counter(trial.candidate for trial in running)
        candidates = max(self._search.most_candidates, spent.candidates)
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

    def _used(self, spent: Spent, elapsed_s: float) -> Iterator[Used]:
        yield Used(spent.candidates, self._search.candidates, "candidates")
        if self._search.fold_trials is not None:
            yield Used(spent.fold_trials, self._search.fold_trials, "fold trials")
        if self._resources.gpu_hours is not None:
            yield Used(spent.device_seconds / 3600, self._resources.gpu_hours, "GPU-hours")
        if spent.seconds_left is not None:
            yield Used(elapsed_s, elapsed_s + max(0.0, spent.seconds_left), "s")
