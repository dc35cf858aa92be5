"""How far a sweep is: counts, the best candidates, the fold trials and the time that are left.

Takes the candidates as they are and what runs, gives `Progress`. Plain loops over the candidates:
some milliseconds at 1,000 of them, twice a second. No clock of its own.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from itertools import islice

from foldrace.config.schema import ResourcesConfig, SearchConfig
from foldrace.run_folder.blend_records import SubmissionNote
from foldrace.run_folder.progress import BudgetUse, Event, Progress, RunningTrial
from foldrace.run_folder.records import CandidateSummary, RaceDecision, TrialRecord
from foldrace.run_folder.tables import ranked
from foldrace.scheduling.budget import Budget, CompletionCost, SweepUsage
from foldrace.scheduling.events import SweepListener

_LEADERS = 8
_DECISIONS = 3


class SessionEvents(SweepListener):
    """The events of one session, in order, for whoever shows them."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def trial_ended(self, record: TrialRecord, summary: CandidateSummary) -> None:
        """Keep the record."""
        self.events.append(record)

    def decided(self, decision: RaceDecision, summary: CandidateSummary) -> None:
        """Keep the decision."""
        self.events.append(decision)

    def settled(self, summary: CandidateSummary) -> None:
        """Keep the candidate as it ended."""
        self.events.append(summary)


def sweep_progress(
    summaries: Sequence[CandidateSummary],
    search: SearchConfig,
    resources: ResourcesConfig,
    *,
    folds: int,
    usage: SweepUsage,
    slots: int,
    devices: float,
    elapsed_s: float,
    running: Sequence[RunningTrial] = (),
    events: Sequence[Event] = (),
    submission: SubmissionNote | None = None,
    notes: Sequence[str] = (),
    waiting: str | None = None,
) -> Progress:
    """The sweep at this moment.

    `folds` of a candidate, `devices` of a fold trial (`devices_of_a_trial`); `usage` is of all
    sessions, `elapsed_s` and `events` are of this one.
    """
    trials = [trial for summary in summaries for trial in summary.trials]
    outlook = _Outlook(summaries, trials, search, folds, running, usage)
    left, eta_s = outlook.left(Budget(search, resources), slots, devices)
    counts = Counter(summary.status for summary in summaries)
    busy = {trial.candidate for trial in running}
    for summary in summaries:  # one whose fold goes on is no longer parked
        if summary.status == "parked" and summary.candidate.candidate in busy:
            counts.subtract({"parked": 1, "running": -1})
    best = [s for s in ranked(summaries) if s.status == "complete" and s.best]
    begun = (s for s in summaries if not s.settled and s.trials)
    decisions = (d for s in summaries for d in s.decisions)
    last = heapq.nlargest(_DECISIONS, decisions, key=lambda d: d.number)[::-1]
    return Progress(
        trials_done=len(trials),
        trials_total=len(trials) + math.ceil(left - 1e-6),
        running=tuple(running),
        counts=+counts,
        leaders=(*best[:_LEADERS], *islice(begun, max(0, _LEADERS - len(best)))),
        events=events,
        failed=sum(trial.status in ("failed", "diverged") for trial in trials),
        elapsed_s=elapsed_s,
        eta_s=eta_s,
        best_logloss=best[0].pooled_calibrated(best[0].best) if best and best[0].best else None,
        blend_logloss=last[-1].blend_logloss if last else None,
        decisions=tuple(last),
        budget=tuple(_used(search, resources, usage, elapsed_s)),
        submission=submission,
        trial_counts=Counter({"running": len(running)}) + Counter(t.status for t in trials),
        device_seconds=usage.device_seconds,
        saved_device_seconds=saved_seconds(summaries, busy) * devices,
        notes=tuple(notes),
        waiting=waiting,
    )


def saved_seconds(summaries: Sequence[CandidateSummary], busy: Collection[str] = ()) -> float:
    """Seconds of the epochs that stopped and parked candidates have not trained.

    An epoch costs what those of its backbone have, of fold trials that ended and of parked ones.
    `busy`: candidates whose fold trial runs, and that are parked no longer.
    """
    seconds, epochs, left = defaultdict[str, float](float), Counter[str](), Counter[str]()
    for summary in summaries:
        candidate = summary.candidate
        parked = [d for d in summary.decisions[-1:] if d.action == "park" and not summary.trials]
        trained = [(t.seconds, t.epochs_trained) for t in summary.trials]
        trained += [(d.seconds, d.epoch) for d in parked if d.epoch]
        for cost, count in trained:
            if count:
                seconds[candidate.backbone] += cost
                epochs[candidate.backbone] += count
        if summary.status in ("parked", "stopped") and candidate.candidate not in busy:
            whole = summary.folds * int(candidate.params.get("epochs", 0))
            left[candidate.backbone] += max(0, whole - sum(count for _, count in trained))
    return math.fsum(left[b] * seconds[b] / epochs[b] for b in left if epochs[b])


class _Outlook:
    """Fold trials that have not ended, and seconds until they have."""

    def __init__(
        self,
        summaries: Sequence[CandidateSummary],
        trials: Sequence[TrialRecord],
        search: SearchConfig,
        folds: int,
        running: Sequence[RunningTrial],
        usage: SweepUsage,
    ) -> None:
        self._running, self._usage = running, usage
        settled = [summary for summary in summaries if summary.settled]
        trained = sum(len(summary.trials) for summary in settled)
        used = trained / (len(settled) * folds) if settled else 1.0
        self._to_start = used * self._waiting(summaries, search, folds)
        self._by_backbone: defaultdict[str, list[float]] = defaultdict(list)
        for trial in trials:
            if trial.status == "finished":
                self._by_backbone[trial.backbone].append(trial.seconds)
        seconds = [trial.seconds for trial in trials]
        self._mean = math.fsum(seconds) / len(seconds) if self._by_backbone else None

    def left(self, budget: Budget, slots: int, devices: float) -> tuple[float, float | None]:
        """Fold trials still to end, and seconds.

        Those to start are as many of a candidate's folds as settled ones have had, times mean
        seconds over the slots, within the budget. No seconds before one has finished.
        """
        cost = CompletionCost(1, self._mean, slots, devices)
        to_start = min(self._to_start, budget.fold_trials_left(self._usage, cost))
        trials = to_start + len(self._running)
        if self._mean is None:
            return trials, None
        rests = [(1 - t.epoch / t.epochs) * self._expected(t.backbone) for t in self._running]
        spread = (to_start * self._mean + sum(rests)) / max(1, slots)
        seconds = max(spread, max(rests, default=0.0))
        left = self._usage.seconds_left
        if left is None or seconds <= left:
            return trials, seconds
        left = max(0.0, left)
        return max(trials * left / seconds, float(len(self._running))), left

    def _expected(self, backbone: str) -> float:
        own = self._by_backbone.get(backbone)
        return sum(own) / len(own) if own else self._mean or 0.0

    def _waiting(
        self, summaries: Sequence[CandidateSummary], search: SearchConfig, folds: int
    ) -> int:
        """Fold trials that have not started, if every candidate gets all of its folds.

        A candidate with a fold that did not finish gets none.
        """
        running_of = Counter(trial.candidate for trial in self._running)
        candidates = max(search.most_candidates, self._usage.candidates)
        unknown = candidates - len(summaries)  # not suggested yet
        return unknown * folds + sum(
            folds - len(summary.trials) - running_of[summary.candidate.candidate]
            for summary in summaries
            if not summary.settled and len(summary.finished) == len(summary.trials)
        )


def _used(
    search: SearchConfig, resources: ResourcesConfig, usage: SweepUsage, elapsed_s: float
) -> Iterator[BudgetUse]:
    yield BudgetUse(usage.candidates, search.candidates, "candidates")
    if search.fold_trials is not None:
        yield BudgetUse(usage.fold_trials, search.fold_trials, "fold trials")
    if resources.gpu_hours is not None:
        yield BudgetUse(usage.device_seconds / 3600, resources.gpu_hours, "GPU-hours")
    if usage.seconds_left is not None:
        yield BudgetUse(elapsed_s, elapsed_s + max(0.0, usage.seconds_left), "s")
