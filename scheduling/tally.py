"""The sums of a sweep: counts, the best candidates, what is left. Each grows with what happens, so
that 10,000 candidates cost no more to show than ten.

Takes fold trials, decisions and candidates as they end, gives `Progress`.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

from experiment.config import ResourcesConfig, SearchConfig
from experiment.progress import Event, Progress, RunningTrial, Used
from experiment.records import (
    CandidateRecord,
    CandidateStatus,
    CandidateSummary,
    RaceDecision,
    TrialRecord,
)
from scheduling.budget import Budget, Need, Spent
from scheduling.eta import Ahead, OpenCandidate, Pace, outlook

_LEADERS = 8
_DECISIONS = 3


class Tally:
    """One sweep, from its first session on."""

    def __init__(
        self, search: SearchConfig, resources: ResourcesConfig, folds: int, devices: float
    ) -> None:
        """`devices`: of a fold trial, as `devices_of_a_trial` gives them."""
        self._search, self._resources, self._devices = search, resources, devices
        self._budget = Budget(search, resources)
        self.pace = Pace(folds)
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
            if summary.status in ("running", "unfinished"):
                self._open[summary.candidate.candidate] = summary
            else:
                self._settle(summary)
        decided = (d for summary in summaries for d in summary.decisions)
        last = heapq.nlargest(_DECISIONS, decided, key=lambda d: d.number)
        self._last = deque(reversed(last), _DECISIONS)

    def trial(self, record: TrialRecord) -> None:
        """A fold trial ended, and is not tried again."""
        self._count(record)
        known = self._open.get(record.candidate) or self._new(record)
        trials = sorted([*known.trials, record], key=lambda t: t.fold)
        self._open[record.candidate] = replace(known, trials=tuple(trials))
        self._events.append(record)

    def decide(self, decision: RaceDecision) -> None:
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

    def need(self, backbone: str, folds: int, slots: int) -> Need:
        """What `folds` more fold trials of a candidate take, for `Budget`."""
        return Need(folds, self.pace.fold_seconds(backbone), slots, self._devices)

    def progress(
        self,
        running: Sequence[RunningTrial],
        spent: Spent,
        slots: int,
        elapsed_s: float,
        notes: Sequence[str] = (),
    ) -> Progress:
        """`spent` is of all sessions; `elapsed_s` of this one."""
        any_need = Need(1, self.pace.seconds, slots, self._devices)
        left = outlook(
            self.pace,
            Ahead(
                new=max(0, self._search.most_candidates - spent.candidates),
                open=self._open_candidates(running),
                slots=slots,
                fold_trials_left=self._budget.fold_trials_left(spent, any_need),
                seconds_left=spent.seconds_left,
            ),
        )
        counts = dict(self._settled)
        if spent.candidates > self._settled.total():
            counts["running"] = spent.candidates - self._settled.total()
        return Progress(
            trials_done=self._ended,
            trials_total=self._ended + math.ceil(left.fold_trials - 1e-6),
            running=tuple(running),
            counts=counts,
            leaders=self._leaders(),
            events=self._events,
            failed=self._failed,
            elapsed_s=elapsed_s,
            eta_s=left.seconds,
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
        self.pace.add(record)

    def _settle(self, summary: CandidateSummary) -> None:
        name = summary.candidate.candidate
        self._open.pop(name, None)
        self._settled[summary.status] += 1
        self.pace.settle(summary)
        if summary.status == "complete" and summary.best:
            entry = (summary.pooled_logloss(summary.best), name, summary)
            bisect.insort(self._best, entry, key=lambda e: e[:2])
            del self._best[_LEADERS:]

    def _new(self, record: TrialRecord) -> CandidateSummary:
        candidate = CandidateRecord(
            candidate=record.candidate, backbone=record.backbone, params=record.params
        )
        return CandidateSummary(candidate, "running", (), self.pace.folds)

    def _leaders(self) -> tuple[CandidateSummary, ...]:
        """No more than are shown."""
        best = [summary for _, _, summary in self._best]
        begun = (self._open[name] for name in sorted(self._open) if self._open[name].trials)
        return (*best, *islice(begun, _LEADERS - len(best)))

    def _open_candidates(self, running: Sequence[RunningTrial]) -> list[OpenCandidate]:
        """Those that are known, and those whose first fold trial runs."""
        parts: dict[str, list[float]] = defaultdict(list)
        for trial in running:
            parts[trial.candidate].append(trial.epoch / trial.epochs)
        backbones = {trial.candidate: trial.backbone for trial in running}
        backbones |= {name: known.candidate.backbone for name, known in self._open.items()}
        done = {name: len(known.finished) for name, known in self._open.items()}
        for name, known in self._open.items():
            if len(known.finished) < len(known.trials):  # one did not finish: no fold will follow
                done[name] = self.pace.folds - len(parts.get(name, ()))
        return [
            OpenCandidate(backbone, done.get(name, 0), parts.get(name, ()))
            for name, backbone in backbones.items()
        ]

    def _used(self, spent: Spent, elapsed_s: float) -> Iterator[Used]:
        yield Used(spent.candidates, self._search.candidates, "candidates")
        if self._search.fold_trials is not None:
            yield Used(spent.fold_trials, self._search.fold_trials, "fold trials")
        if self._resources.gpu_hours is not None:
            yield Used(spent.device_seconds / 3600, self._resources.gpu_hours, "GPU-hours")
        if spent.seconds_left is not None:
            yield Used(elapsed_s, elapsed_s + max(0.0, spent.seconds_left), "s")
