"""What a sampler learns from: one Optuna trial a candidate, of this run and of earlier ones.

Takes summaries of candidates, gives the trials that count for the next suggestion for a backbone.
The trials depend on the latest summary of each candidate alone, not on the order of events.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from foldrace.config.hyperparameters import TrialParams
from foldrace.config.ranges import Value
from foldrace.run_folder.records import CandidateRecord, CandidateSummary
from foldrace.scheduling.search.samplers import Sampler
from foldrace.search_spaces.space import SearchSpace

_OWN_RUN = 0  # the level of this run's own values, and of those that are comparable with them
_ENOUGH = 10  # candidates of a backbone with a value, from which on others' are left out
_FOLD = 100  # step of a whole fold: one in mid-training has the percent of its schedule


@dataclass(frozen=True)
class EarlierCandidate:
    """A candidate of another run folder."""

    summary: CandidateSummary
    run: int
    """Number of the folder in the list, from 1 on."""
    comparable: bool
    """True where its loss is on this run's level: the same folds, and the same values of the
    hyperparameters that are not searched."""


@dataclass(frozen=True)
class _Lesson:
    """What one candidate teaches; nothing yet where its state is RUNNING."""

    number: int
    """Place among all, those of earlier runs first."""
    backbone: str
    level: int
    """Number of the run whose losses its value compares with."""
    params: dict[str, Value]
    distributions: dict[str, BaseDistribution]
    state: TrialState = TrialState.RUNNING
    value: float | None = None
    """Value to be minimised."""
    step: int = 0
    """How far it got: of two that are PRUNED, TPE ranks the one that got further above."""

    @property
    def rank(self) -> tuple[bool, int, float]:
        """Order of those with a value, as TPE has it, the best first."""
        pruned = self.state == TrialState.PRUNED
        return pruned, -self.step * pruned, self.value or 0.0

    @cached_property
    def trial(self) -> FrozenTrial:
        """The candidate as Optuna has it."""
        seen = {} if self.value is None else {self.step: self.value}
        pruned = self.state == TrialState.PRUNED
        return create_trial(
            state=self.state,
            value=None if pruned else self.value,
            params=dict(self.params),
            distributions=self.distributions,
            intermediate_values=seen if pruned else {},
        )


class SamplerHistory:
    """Every candidate of the sweep, and of earlier runs, that lies in the search space."""

    def __init__(
        self,
        space: SearchSpace,
        sampler: Sampler,
        classes: int,
        by_gain: bool = False,
        earlier: Sequence[EarlierCandidate] = (),
    ) -> None:
        """`by_gain`: a candidate's value is minus its gain, else its loss."""
        self._space, self._sampler, self._by_gain = space, sampler, by_gain
        self._penalty = diverged_value(classes)
        self._distributions = {b: space.distributions(b) for b in space.backbones}
        self._own: dict[str, _Lesson] = {}
        found = (self._earlier(n, e) for n, e in enumerate(earlier, start=-len(earlier)))
        self._of_earlier = [lesson for lesson in found if lesson is not None]
        self._several_levels = any(lesson.level != _OWN_RUN for lesson in self._of_earlier)

    def start(self, candidate: CandidateRecord) -> None:
        """Add a candidate that is being trained, or will be."""
        name, backbone = candidate.candidate, candidate.backbone
        encoded = self._space.encode(backbone, TrialParams.from_dict(candidate.params))
        if encoded is not None:
            number, distributions = int(name[1:]), self._distributions[backbone]
            self._own[name] = _Lesson(number, backbone, _OWN_RUN, encoded, distributions)

    def update(self, summary: CandidateSummary) -> None:
        """Learn what a candidate has come to, settled or not."""
        name = summary.candidate.candidate
        if name in self._own:
            self._own[name] = self._learnt(self._own[name], summary, self._by_gain)

    def trials(self, backbone: str) -> list[FrozenTrial]:
        """Trials for the next suggestion for the backbone, by number.

        Those of the backbone alone once enough of them have a value; before, all, whose shared
        hyperparameters say something about this one too. Empty for a sampler that learns nothing.
        """
        if not self._sampler.most_trials:
            return []
        lessons = [*self._of_earlier, *self._own.values()]
        own = [lesson for lesson in lessons if lesson.backbone == backbone]
        if sum(lesson.value is not None for lesson in own) >= _ENOUGH:
            lessons = own
        running = (lesson for lesson in lessons if lesson.state == TrialState.RUNNING)
        known = [lesson for lesson in lessons if lesson.value is not None]
        if self._several_levels:
            known = _on_one_level(known)
        shown = chain(running, self._chosen(known))
        return [lesson.trial for lesson in sorted(shown, key=_number)]

    def _chosen(self, known: list[_Lesson]) -> list[_Lesson]:
        """As many as the sampler may see: half of them the best, half the newest."""
        most = self._sampler.most_trials
        if len(known) <= most:
            return known
        known = sorted(known, key=_number)
        older, newest = known[: -(most // 2)], known[-(most // 2) :]
        return sorted(older, key=lambda lesson: lesson.rank)[: most - most // 2] + newest

    def _earlier(self, number: int, earlier: EarlierCandidate) -> _Lesson | None:
        """Lesson of an earlier run, whose gain was over another blend: its loss stands for it."""
        record = earlier.summary.candidate
        encoded = self._space.place(record.backbone, TrialParams.from_dict(record.params))
        if encoded is None:
            return None
        # A gain and a loss are never on one level.
        level = _OWN_RUN if earlier.comparable and not self._by_gain else earlier.run
        distributions = self._distributions[record.backbone]
        new = _Lesson(number, record.backbone, level, encoded, distributions)
        return self._learnt(new, earlier.summary, by_gain=False)

    def _learnt(self, lesson: _Lesson, summary: CandidateSummary, by_gain: bool) -> _Lesson:
        value, step = loss_so_far(summary), _progress(summary)
        if summary.status == "diverged":
            value, step = self._penalty, 0
        elif by_gain:
            value = None if summary.gain is None else -summary.gain
        if value is None or summary.status == "failed":
            state = TrialState.FAIL if summary.settled else TrialState.RUNNING
            return replace(lesson, state=state, value=None, step=0)
        # TPE ranks every COMPLETE trial above all that are PRUNED: beside stopped candidates a
        # diverged one would be among the best.
        pruned = summary.status != "complete" and self._sampler.sees_pruned
        state = TrialState.PRUNED if pruned else TrialState.COMPLETE
        return replace(lesson, state=state, value=value, step=step)


def diverged_value(classes: int) -> float:
    """Value of a diverged candidate: worse than chance, and finite, so that the sampler learns.

    It is worse than the least possible gain, too (log 0.9 / 0.1 = -1.05 nats per row).
    """
    return 2.0 * math.log(classes)


def loss_so_far(summary: CandidateSummary) -> float | None:
    """Calibrated loss of the finished folds, else the last score of the first one in mid-training.

    None where there is neither.
    """
    if summary.best is not None:
        return summary.pooled_calibrated(summary.best)
    return mid_training_score(summary)


def mid_training_score(summary: CandidateSummary) -> float | None:
    """Log loss at the last decision in mid-training, or None."""
    scores = [d.score for d in summary.decisions if d.epoch is not None and d.score is not None]
    return scores[-1] if scores else None


def _progress(summary: CandidateSummary) -> int:
    """100 a finished fold, else the percent of the first one's schedule: 1 to 99."""
    if summary.finished:
        return _FOLD * len(summary.finished)
    epochs = [d.epoch for d in summary.decisions if d.epoch is not None]
    percent = _FOLD * epochs[-1] / float(summary.candidate.params["epochs"]) if epochs else 0
    return min(max(round(percent), 1), _FOLD - 1)


def _on_one_level(known: Sequence[_Lesson]) -> list[_Lesson]:
    """The same with their values scaled by median and interquartile range of their level.

    Other folds, data or epochs have other losses, but what is good among them may be good here.
    """
    levels = np.array([lesson.level for lesson in known])
    values = np.array([lesson.value for lesson in known], dtype=np.float64)
    for level in np.unique(levels):
        own = values[levels == level]
        low, middle, high = np.percentile(own, [25, 50, 75])
        values[levels == level] = (own - middle) / (high - low or 1.0)
    return [replace(lesson, value=float(v)) for lesson, v in zip(known, values, strict=True)]


def _number(lesson: _Lesson) -> int:
    return lesson.number
