"""Members on their own beside the blend, by any metric.

Takes `MemberRows` and metrics; gives the best member's cross-fitted predictions, and the metrics in
which a member is better than the blend.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from foldrace.core.metrics import (
    LOG_LOSS,
    Metric,
    log_loss_of_true,
    metric_value,
    most_probable,
    normalise,
)
from foldrace.core.plugin_files import error_with_place
from foldrace.core.standard_errors import Groups, Measured, Predictions, measure
from foldrace.core.temperature import at_temperature
from foldrace.ensemble.decisions import decide
from foldrace.ensemble.pool import MemberRows
from foldrace.run_folder.blend_records import BeatenBy, DecisionRule

_log = logging.getLogger("foldrace")

_RIVALS = 20
"""Members that are looked at, those of the least calibrated log loss: each has to be read."""


@dataclass(frozen=True, eq=False)
class MetricOnRows:
    """A metric on the scored rows."""

    rows: MemberRows
    metric: Metric
    groups: Groups | None

    def __call__(self, predictions: Predictions) -> Measured:
        """The value of classes (N,), or of probabilities (N, C), with its uncertainty."""
        rows = self.rows
        return measure(self.metric, predictions, rows.labels, rows.n_classes, self.groups)

    def goodness(self, predictions: Predictions, among: NDArray[np.bool_]) -> float:
        """The value on some rows, with its sign turned where less is better."""
        metric, labels = self.metric, self.rows.labels[among]
        if metric.of_classes is None:
            value = metric_value(metric, predictions[among], labels)
        else:
            value = metric.of_classes(labels, predictions[among], self.rows.n_classes, None)
        return value if metric.greater_is_better else -value

    def of_member(self, member: int) -> Predictions:
        """What the metric takes of one member: classes (N,) or probabilities (N, C)."""
        if self.metric.of_classes is None:
            return _probabilities(self.rows, member)
        # No temperature changes them.
        return most_probable(self.rows.read(member))


def _probabilities(rows: MemberRows, member: int) -> NDArray[np.float64]:
    """(N, C) of one member, each part at the temperature of the other parts."""
    log_prob = rows.read(member)
    prob = np.empty(log_prob.shape)
    for part in range(rows.n_parts):
        held = rows.parts == part
        temperature = float(rows.temperatures[1 + part, member])
        prob[held] = np.exp(at_temperature(log_prob[held], temperature))
    return normalise(prob)


def best_members(rows: MemberRows, among: Sequence[int]) -> list[int]:
    """The members of the least calibrated log loss, as many as are looked at, the best first."""
    losses = {member: log_loss_of_true(rows.calibrated[0][member]) for member in among}
    return sorted(among, key=lambda member: (losses[member], member))[:_RIVALS]


@dataclass(frozen=True, eq=False)
class SingleMembers:
    """The best of some members by a metric."""

    scorer: MetricOnRows
    allowed: Sequence[int]

    @property
    def best(self) -> int:
        """The member with the best metric on all rows."""
        return self._best[-1]

    @cached_property
    def crossfitted(self) -> Predictions:
        """For each part what the member predicts that is best on the other parts."""
        parts = self.scorer.rows.parts
        found: Predictions | None = None
        for member in dict.fromkeys(self._best[:-1]):
            own = self.scorer.of_member(member)
            held = np.isin(parts, [k for k, best in enumerate(self._best[:-1]) if best == member])
            found = own.copy() if found is None else found
            found[held] = own[held]
        assert found is not None  # there are at least two parts
        return found

    @cached_property
    def _best(self) -> list[int]:
        """The best member outside each part, then that of all rows; each is read once."""
        parts = self.scorer.rows.parts
        sides = [*(parts != k for k in range(self.scorer.rows.n_parts)), parts >= 0]
        members = best_members(self.scorer.rows, self.allowed)
        goodness = np.empty((len(members), len(sides)))
        for i, member in enumerate(members):
            own = self.scorer.of_member(member)
            goodness[i] = [self.scorer.goodness(own, side) for side in sides]
        return [members[i] for i in goodness.argmax(axis=0).tolist()]


def members_that_win(
    rows: MemberRows,
    prob: NDArray[np.float64],
    rule: DecisionRule | None,
    metrics: Sequence[Metric],
    name: Callable[[int], str],
    groups: Groups | None = None,
) -> Iterator[BeatenBy]:
    """For each metric the best member, where it is better than the blend's prob (N, C).

    By more than a standard error of the difference on the same rows. `name` says what a member is
    called; `rule`, if any, makes the blend's classes. The log loss is left out: the cross-fitted
    one is compared elsewhere.
    """
    members = best_members(rows, range(len(rows.members)))
    decided = decide(rule, prob)
    classes: dict[int, Predictions] = {}
    for metric in (m for m in metrics if m.name != LOG_LOSS):
        scorer = MetricOnRows(rows, metric, groups)
        if metric.of_classes is not None and not classes:
            classes = {member: scorer.of_member(member) for member in members}
        blend = prob if metric.of_classes is None else decided
        known = classes if metric.of_classes is not None else {}
        try:
            yield from _winner(scorer, blend, members, known, name)
        except Exception as error:  # a user's own metric may raise anything
            _log.warning("metric %s, of a member: %s", metric.name, error_with_place(error))


def _winner(
    scorer: MetricOnRows,
    blend: Predictions,
    members: Sequence[int],
    known: Mapping[int, Predictions],
    name: Callable[[int], str],
) -> Iterator[BeatenBy]:
    """The best member, where it is better than the blend."""
    every = np.ones(len(scorer.rows.labels), dtype=np.bool_)
    own = {m: scorer.goodness(_of(scorer, m, known), every) for m in members}
    best = max(members, key=lambda member: own[member])
    if own[best] <= scorer.goodness(blend, every):
        return
    member, blended = scorer(_of(scorer, best, known)), scorer(blend)
    gain, error = member.better_by(blended)
    if error is not None and gain > error:
        yield BeatenBy(
            metric=scorer.metric.name,
            member=name(best),
            value=member.value,
            blend_value=blended.value,
            se=error,
        )


def _of(scorer: MetricOnRows, member: int, known: Mapping[int, Predictions]) -> Predictions:
    return known[member] if member in known else scorer.of_member(member)
