"""The last selection by the user's own metric: which blend, or single member, and which classes.

Takes `MemberRows`, the `MethodChoice` by log loss and a `Metric`; gives a `MetricPick`. Nothing is
fitted to the metric but this choice among a few blends, and a decision rule of one or two numbers;
all figures are cross-fitted. Selecting members by the metric itself overfits, and is not done. The
blend of the least log loss stays unless another is better by more than a standard error of the
difference on the same rows (the one-standard-error rule: Breiman, Friedman, Olshen and Stone,
Classification and Regression Trees, 1984), and so does the most probable class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from foldrace.core.errors import ConfigError
from foldrace.core.metrics import Metric, UnfitMetric, normalise
from foldrace.core.standard_errors import Groups, Measured
from foldrace.core.temperature import at_temperature, fit_temperature
from foldrace.ensemble.calibration import CalibrationChoice, MethodChoice, choose_calibration
from foldrace.ensemble.decisions import decide, fit_rule
from foldrace.ensemble.pool import MemberRows, Pool
from foldrace.ensemble.pooling import Fit, blend_prob, mixture_fit
from foldrace.ensemble.single_members import MetricOnRows, SingleMembers
from foldrace.ensemble.solvers.equal_weights import equal_weights
from foldrace.ensemble.solvers.kernels import certified
from foldrace.run_folder.blend_records import SINGLE, MetricChoice, MetricTrial

FitMethod = Callable[[str, Pool], Fit]


@dataclass(frozen=True, eq=False)
class MetricPick:
    """What was kept."""

    method: str
    calibration: CalibrationChoice
    fit: Callable[[Pool], Fit]
    metric: Metric
    record: MetricChoice
    """Without the rule itself, which is fitted to the final blend."""
    has_rule: bool

    def final_record(self, prob: NDArray[np.float64], labels: NDArray[np.int64]) -> MetricChoice:
        """The record, with the decision rule fitted to the final blend's prob (N, C)."""
        rule = fit_rule(self.metric, prob, labels) if self.has_rule else None
        return self.record.model_copy(update={"rule": rule})


@dataclass(frozen=True, eq=False)
class _Trial:
    """A blend that stands to choose from."""

    method: str
    calibration: CalibrationChoice | None
    """None for a single member."""
    measured: Measured


def pick_by_metric(
    rows: MemberRows,
    choice: MethodChoice,
    fit: FitMethod,
    metric: Metric,
    singles: Sequence[int] = (),
    calibrate: bool = True,
    groups: Groups | None = None,
) -> MetricPick:
    """Choose among the blends that are cross-fitted already and the best single member.

    `fit(method, pool)` is that of `choose_method`, `singles` the members that may be a blend on
    their own, `groups` (N,) numbers that rows of one group share. Raises ConfigError where the
    metric gives no finite number.
    """
    try:
        return _pick(MetricOnRows(rows, metric, groups), choice, fit, singles, calibrate)
    except UnfitMetric as error:
        raise ConfigError.single("ensemble.metric", f"{metric.name!r} {error}") from error


def _pick(
    scorer: MetricOnRows,
    choice: MethodChoice,
    fit: FitMethod,
    singles: Sequence[int],
    calibrate: bool,
) -> MetricPick:
    rows, metric = scorer.rows, scorer.metric
    alone = SingleMembers(scorer, singles)
    trials = [*_blends(scorer, choice, fit)]
    if singles:  # after the blend of the least log loss, before the others: it is simpler
        trials.insert(1, _Trial(SINGLE, None, scorer(alone.crossfitted)))
    kept, best = _simplest(trials)
    found = trials[kept]
    if found.calibration is None:
        fitted: Callable[[Pool], Fit] = partial(_alone, alone.best)
        calibration = choose_calibration(rows, fitted, calibrate)
    else:
        fitted, calibration = partial(fit, found.method), found.calibration
    measured, gain, gain_se = found.measured, None, None
    has_rule = False
    if metric.of_classes is not None:
        ruled = scorer(_crossfitted_rule(rows, fitted, calibration, metric))
        gain, gain_se = ruled.better_by(measured)
        has_rule = ruled.is_better(measured)
        measured = ruled if has_rule else measured
    record = MetricChoice(
        metric=metric.name,
        greater_is_better=metric.greater_is_better,
        value=measured.value,
        se=measured.se,
        tried=tuple(_record(trial, trials[best]) for trial in trials),
        kept=kept,
        rule_gain=gain,
        rule_gain_se=gain_se,
    )
    return MetricPick(found.method, calibration, fitted, metric, record, has_rule)


def _simplest(trials: Sequence[_Trial]) -> tuple[int, int]:
    """Places of the first that the best is not better than by a standard error, and of the best.

    None that is behind the blend of the least log loss takes its place.
    """
    goodness = [t.measured.better_by(trials[0].measured)[0] for t in trials]
    best = max(range(len(trials)), key=lambda i: goodness[i])  # the first of equal ones
    enough = (
        good >= 0 and not trials[best].measured.is_better(trial.measured)
        for good, trial in zip(goodness, trials, strict=True)
    )
    return [*enough].index(True), best


def _record(trial: _Trial, best: _Trial) -> MetricTrial:
    behind, error = best.measured.better_by(trial.measured)
    return MetricTrial(
        method=trial.method,
        members=trial.calibration is not None and trial.calibration.members,
        value=trial.measured.value,
        se=trial.measured.se,
        behind=behind,
        behind_se=error,
    )


def _blends(scorer: MetricOnRows, choice: MethodChoice, fit: FitMethod) -> Iterator[_Trial]:
    """Each method with each calibration, that of the least log loss first.

    A temperature of the blend changes no class: with a metric of classes the better of the two by
    log loss stands for both.
    """
    best = choice.calibration
    yield _Trial(choice.method, best, _measured(scorer, partial(fit, choice.method), best))
    for method, own in choice.choices.items():
        for temperatures in _distinct(own, scorer.metric):
            calibration = own.with_temperatures(*temperatures)
            of_classes = scorer.metric.of_classes is not None
            same = (of_classes or calibration.blend == best.blend) and (
                calibration.members == best.members
            )
            if method != choice.method or not same:
                measured = _measured(scorer, partial(fit, method), calibration)
                yield _Trial(method, calibration, measured)


def _distinct(own: CalibrationChoice, metric: Metric) -> list[tuple[bool, bool]]:
    """The temperatures that may differ in the metric."""
    if metric.of_classes is None:
        return [*own.tried]
    kept: dict[bool, tuple[bool, bool]] = {}
    for temperatures in sorted(own.tried, key=lambda key: own.tried[key].loss):
        kept.setdefault(temperatures[0], temperatures)
    return [*kept.values()]


def _measured(
    scorer: MetricOnRows, fit: Callable[[Pool], Fit], calibration: CalibrationChoice
) -> Measured:
    """The cross-fitted metric; one of probabilities is fitted again, as these were not kept."""
    if scorer.metric.of_classes is not None:
        return scorer(calibration.crossfit.predicted)
    whole = np.empty((len(scorer.rows.labels), scorer.rows.n_classes))
    for held, prob in _held_out(scorer.rows, fit, calibration):
        whole[held] = prob[held]
    return scorer(whole)


def _held_out(
    rows: MemberRows, fit: Callable[[Pool], Fit], calibration: CalibrationChoice
) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.float64]]]:
    """For each part its rows, and prob (N, C) of the blend that was chosen on the others."""
    for part in range(rows.n_parts):
        held = rows.parts == part
        chosen = fit(rows.training(part, calibration.members))
        prob = normalise(blend_prob(chosen, rows.scored(part, calibration.members)))
        if calibration.blend:
            log_prob = np.log(prob)
            temperature = fit_temperature(log_prob[~held], rows.labels[~held])
            prob = np.exp(at_temperature(log_prob, temperature), dtype=np.float64)
        yield held, prob


def _crossfitted_rule(
    rows: MemberRows,
    fit: Callable[[Pool], Fit],
    calibration: CalibrationChoice,
    metric: Metric,
) -> NDArray[np.int64]:
    """Classes (N,) by rules that were fitted on the other parts."""
    decided = np.empty(len(rows.labels), dtype=np.int64)
    for held, prob in _held_out(rows, fit, calibration):
        rule = fit_rule(metric, prob[~held], rows.labels[~held])
        decided[held] = decide(rule, prob[held])
    return decided


def _alone(member: int, pool: Pool) -> Fit:
    return mixture_fit(certified(pool.true_prob, equal_weights([member], len(pool.members))))
