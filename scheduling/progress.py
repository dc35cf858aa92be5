"""The sums of a sweep: counts, the best candidates, what is left. Each grows with what happens, so
that 10,000 candidates cost no more to show than ten.

Takes fold trials, decisions and candidates as they end, gives `Progress`.

How long a sweep will still take, from what its fold trials have taken so far.

Takes fold trials that ended and candidates that are settled, gives seconds. Pure: no clock.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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


class Pace:
    """Seconds of a fold trial, by backbone, and fold trials of a candidate. Grows by one record at
    a time: nothing is walked again.

    The fold trials are the product-limit estimate of Kaplan and Meier (1958), in which candidates
    that are not settled count too: a mean over the settled ones would be of those that were
    stopped soon."""

    def __init__(self, folds: int) -> None:
        self.folds = folds
        self._seconds: dict[str, _Mean] = defaultdict(_Mean)  # by backbone
        self._any = _Mean()
        self._finished: Counter[str] = Counter()  # fold trials of a candidate
        self._reached = [0] * (folds + 1)  # candidates with so many finished ones or more
        self._ended = [0] * (folds + 1)  # candidates that were settled with so many
        self._broken = [_Mean() for _ in range(folds + 1)]  # parts of what was trained beyond them

    def add(self, trial: TrialRecord) -> None:
        """A fold trial that ended. One that did not finish says nothing about a whole one."""
        if trial.status == "finished":
            self._seconds[trial.backbone].add(trial.seconds)
            self._any.add(trial.seconds)
            self._finished[trial.candidate] += 1
            self._reached[self._finished[trial.candidate]] += 1

    def settle(self, summary: CandidateSummary) -> None:
        """A candidate that gets no further fold, after its fold trials were added. One that was
        stopped counts as the part of its epochs that it has trained."""
        finished = len(summary.finished)
        self._finished.pop(summary.candidate.candidate, None)
        broken = [_part(trial) for trial in summary.trials if trial.status != "finished"]
        if broken:
            self._broken[finished].add(sum(broken))
        else:
            self._ended[finished] += 1

    def fold_seconds(self, backbone: str) -> float | None:
        """Mean of the backbone's finished fold trials, else of everybody's; None without any."""
        own = self._seconds.get(backbone)
        return own.value if own is not None else self._any.value

    @property
    def seconds(self) -> float | None:
        """Mean of all finished fold trials."""
        return self._any.value

    @property
    def longest(self) -> float | None:
        """Of the backbones' means."""
        return max((m.value for m in self._seconds.values() if m.value is not None), default=None)

    def further_folds(self, done: int) -> float:
        """Fold trials that a candidate with `done` finished ones will still take, if it gets one
        more."""
        expected = 0.0
        for level in reversed(range(done, self.folds)):
            expected = self._expected(level, expected)
        return expected

    def _expected(self, level: int, after: float) -> float:
        """`after`: of a candidate that goes on from `level` + 1."""
        reached, broken = self._reached[level + 1], self._broken[level]
        goes_on = 1 - self._ended[level + 1] / reached if reached else 1.0
        if level + 1 == self.folds:
            goes_on = 0.0
        whole = reached / (reached + broken.count) if reached + broken.count else 1.0
        return whole * (1 + goes_on * after) + (1 - whole) * (broken.value or 0.0)


@dataclass(frozen=True)
class OpenCandidate:
    """A started candidate that is not settled."""

    backbone: str
    done: int
    """Finished fold trials."""
    running: Sequence[float]
    """Of each running fold trial the part that is trained, 0 to 1."""


@dataclass(frozen=True)
class Ahead:
    """What a sweep has before it."""

    new: int
    """Candidates that have not started."""
    open: Sequence[OpenCandidate]
    slots: int
    """Fold trials that run at a time."""
    fold_trials_left: float = math.inf
    """That the budget lets start."""
    seconds_left: float | None = None
    """Until the sweep's deadline; None: there is none."""


@dataclass(frozen=True)
class Outlook:
    """What is expected."""

    fold_trials: float
    """That have not ended yet, running ones included."""
    seconds: float | None
    """None while no fold trial has finished."""


def outlook(pace: Pace, ahead: Ahead) -> Outlook:
    """Expected fold trials × their seconds / slots, and the time when slots have no work at the
    end; within the limits of the budget."""
    waiting = [max(0.0, _further(pace, c) - len(c.running)) for c in ahead.open]
    new = ahead.new * pace.further_folds(0)
    to_start = sum(waiting) + new
    share = min(1.0, ahead.fold_trials_left / to_start) if to_start else 0.0
    fold_trials = share * to_start + sum(len(c.running) for c in ahead.open)
    mean = pace.seconds
    if mean is None:
        return Outlook(fold_trials, None)
    each = [pace.fold_seconds(c.backbone) or mean for c in ahead.open]
    unstarted = share * (new * mean + sum(n * s for n, s in zip(waiting, each, strict=True)))
    rests = [s * (1 - part) for c, s in zip(ahead.open, each, strict=True) for part in c.running]
    slots = max(1, ahead.slots)
    # The last of so many that end evenly within one fold trial is half a one later than their mean;
    # as much again, since folds of one candidate wait for each other's decisions.
    tail = (pace.longest or mean) * (slots - 1) / (slots + 1) if unstarted else 0.0
    seconds = max((unstarted + sum(rests)) / slots + tail, max(rests, default=0.0))
    if ahead.seconds_left is None or seconds <= ahead.seconds_left:
        return Outlook(fold_trials, seconds)
    left = max(0.0, ahead.seconds_left)
    return Outlook(max(fold_trials * left / seconds, float(len(rests))), left)


class _Mean:
    """Of what was added."""

    def __init__(self) -> None:
        self._sum, self.count = 0.0, 0

    def add(self, value: float) -> None:
        self._sum += value
        self.count += 1

    @property
    def value(self) -> float | None:
        return self._sum / self.count if self.count else None


def _further(pace: Pace, candidate: OpenCandidate) -> float:
    """At least those that run, at most those that there are."""
    expected = max(pace.further_folds(candidate.done), float(len(candidate.running)))
    return min(expected, float(pace.folds - candidate.done))


def _part(trial: TrialRecord) -> float:
    if trial.status != "stopped":
        return 1.0
    epochs = float(trial.params.get("epochs", 0))
    return min(1.0, trial.epochs_trained / epochs) if epochs else 1.0


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
