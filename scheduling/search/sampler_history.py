"""The history that a sampler learns from: one Optuna trial a candidate, with its value as of now.

Takes candidates as they start and end, gives the trials that count for the next ask of a backbone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from foldrace.config.hyperparameters import TrialParams
from foldrace.config.ranges import Value
from foldrace.run_folder.records import CandidateSummary
from foldrace.scheduling.search.samplers import Sampler
from foldrace.search_spaces.space import SearchSpace

_OWN_RUN = 0  # the group of this run's own values, and of those on the same level
_ENOUGH = 10  # ended candidates of a backbone, from which on others' are left out
_MOST_RUNNING = 250


@dataclass(frozen=True)
class EarlierCandidate:
    """A candidate of another run folder."""

    summary: CandidateSummary
    run: int
    """Number of the folder in the list, from 1 on."""
    comparable: bool
    """True where its log loss is on this run's level: the same folds, and the same values of the
    hyperparameters that are not searched."""


@dataclass
class _Entry:
    """A candidate and its trial.

    The trial is changed in place at each ask: building a thousand anew takes longer than the
    sampler.
    """

    candidate: str
    backbone: str
    group: int
    trial: FrozenTrial
    loss: float | None = None
    diverged: bool = False
    folds: int = 0

    def set_value(self, value: float | None) -> None:
        """Give the trial its value; of several folds Optuna's samplers take the last alone."""
        if self.trial.state == TrialState.PRUNED:
            self.trial.intermediate_values = {} if value is None else {self.folds: value}
        else:
            self.trial.value = value


class SamplerHistory:
    """Every candidate of the sweep, and of earlier runs, that lies in the search space."""

    def __init__(
        self,
        space: SearchSpace,
        sampler: Sampler,
        classes: int,
        gains: Callable[[], Mapping[str, float]] | None,
        earlier: Sequence[EarlierCandidate] = (),
    ) -> None:
        """`gains()`: candidate -> its gain; None where log loss is the objective."""
        self._space, self._sampler, self._gains = space, sampler, gains
        self._penalty = diverged_value(classes)
        self._distributions = {b: space.distributions(b) for b in space.backbones}
        self._running: dict[str, _Entry] = {}
        self._ended: dict[str, list[_Entry]] = {b: [] for b in space.backbones}
        self._first = 1 + len(earlier)  # number 0 is that of the trial that is asked for
        self._several_levels = False
        for number, candidate in enumerate(earlier, start=1):
            self._add_earlier(number, candidate)

    def start(self, candidate: str, backbone: str, params: TrialParams) -> None:
        """Add a candidate that is being trained, or will be."""
        knobs = self._space.encode(backbone, params)
        if knobs is not None:
            number = self._first + int(candidate[1:])
            self._running[candidate] = self._entry(candidate, backbone, knobs, number)

    def end(self, summary: CandidateSummary) -> None:
        """Give a settled candidate its value."""
        record = summary.candidate
        self._running.pop(record.candidate, None)
        knobs = self._space.encode(record.backbone, TrialParams.from_dict(record.params))
        if knobs is not None:
            number = self._first + int(record.candidate[1:])
            self._settle(self._entry(record.candidate, record.backbone, knobs, number), summary)

    def trials(self, backbone: str) -> list[FrozenTrial]:
        """Trials for the next ask of the backbone, by number.

        Those of the backbone alone once there are enough of them; before, all, whose shared
        hyperparameters say something about this one too. Empty for a sampler that learns nothing.
        """
        if not self._sampler.most_trials:
            return []
        own = self._ended[backbone]
        enough = len(own) >= _ENOUGH
        ended = own if enough else [e for entries in self._ended.values() for e in entries]
        running = [e for e in self._running.values() if not enough or e.backbone == backbone]
        newest = sorted(running, key=_number)[-_MOST_RUNNING:]
        return [e.trial for e in sorted([*self._chosen(ended), *newest], key=_number)]

    def _chosen(self, ended: list[_Entry]) -> list[_Entry]:
        """The ended candidates that the sampler sees: half the best, half the newest."""
        known, values = self._valued(ended)
        most = self._sampler.most_trials
        if len(known) > most:
            is_newest = np.zeros(len(known), dtype=bool)
            is_newest[np.argsort([_number(e) for e in known])[-(most // 2) :]] = True
            pruned = np.array([e.trial.state == TrialState.PRUNED for e in known])
            ranked = np.lexsort((values, pruned, is_newest))  # by the last key first
            chosen = np.concatenate([ranked[: most - most // 2], np.flatnonzero(is_newest)])
            known, values = [known[i] for i in chosen], values[chosen]
        for entry, value in zip(known, values, strict=True):
            entry.set_value(float(value))
        return known

    def _valued(self, ended: Iterable[_Entry]) -> tuple[list[_Entry], NDArray[np.float64]]:
        gains = None if self._gains is None else self._gains()
        pairs = [(e, v) for e in ended if (v := self._value(e, gains)) is not None]
        known = [entry for entry, _ in pairs]
        values = np.array([value for _, value in pairs])
        return known, self._on_one_level(known, values) if self._several_levels else values

    def _value(self, entry: _Entry, gains: Mapping[str, float] | None) -> float | None:
        """Value to be minimised, or None.

        An earlier run's candidate had its gain over another blend: its log loss stands for it.
        """
        if gains is None or entry.diverged or entry.group != _OWN_RUN:
            return entry.loss
        gain = gains.get(entry.candidate)
        return None if gain is None else -gain

    def _on_one_level(
        self, known: Sequence[_Entry], values: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """(n,) values, those of each run scaled by their median and interquartile range.

        Other folds, data or epochs have other losses, but what is good among them may be good here.
        """
        groups = np.array([entry.group for entry in known])
        levelled = np.empty_like(values)
        for group in np.unique(groups):
            own = values[groups == group]
            low, middle, high = np.percentile(own, [25, 50, 75])
            levelled[groups == group] = (own - middle) / (high - low or 1.0)
        return levelled

    def _add_earlier(self, number: int, earlier: EarlierCandidate) -> None:
        record = earlier.summary.candidate
        knobs = self._space.place(record.backbone, TrialParams.from_dict(record.params))
        if knobs is None:
            return
        entry = self._entry(record.candidate, record.backbone, knobs, number)
        if self._gains is not None or not earlier.comparable:  # a gain and a log loss never are
            entry.group, self._several_levels = earlier.run, True
        self._settle(entry, earlier.summary)

    def _settle(self, entry: _Entry, summary: CandidateSummary) -> None:
        entry.loss, entry.folds = last_value(summary), len(summary.finished)
        if summary.status == "diverged":
            entry.loss, entry.diverged, entry.folds = self._penalty, True, 0
        if entry.loss is None or summary.status == "failed":
            return  # nothing can be learnt from it
        # TPE ranks every COMPLETE trial above all that are PRUNED: beside stopped candidates a
        # diverged one would be among the best.
        pruned = summary.status in ("stopped", "diverged") and self._sampler.sees_pruned
        entry.trial.state = TrialState.PRUNED if pruned else TrialState.COMPLETE
        self._ended[entry.backbone].append(entry)

    def _entry(self, candidate: str, backbone: str, knobs: dict[str, Value], number: int) -> _Entry:
        trial = _running_trial(number, knobs, self._distributions[backbone])
        return _Entry(candidate, backbone, _OWN_RUN, trial)


def diverged_value(classes: int) -> float:
    """Value of a diverged candidate: worse than chance, and finite, so that the sampler learns.

    It is worse than the least possible gain, too (log 0.9 / 0.1 = -1.05 nats per row).
    """
    return 2.0 * math.log(classes)


def last_value(summary: CandidateSummary) -> float | None:
    """Pooled log loss of the finished folds, else the score at which the first one was stopped.

    None where there is neither.
    """
    if summary.best is not None:
        return summary.pooled_logloss(summary.best)
    scores = [d.score for d in summary.decisions if d.epoch is not None and d.score is not None]
    return scores[-1] if scores else None


def _running_trial(
    number: int, knobs: dict[str, Value], distributions: dict[str, BaseDistribution]
) -> FrozenTrial:
    return FrozenTrial(
        number=number,
        trial_id=number,
        state=TrialState.RUNNING,
        value=None,
        datetime_start=None,
        datetime_complete=None,
        params=knobs,
        distributions=distributions,
        user_attrs={},
        system_attrs={},
        intermediate_values={},
    )


def _number(entry: _Entry) -> int:
    return entry.trial.number
