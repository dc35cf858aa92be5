"""The last selection by the user's own metric, and members that beat the blend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from foldrace.core.errors import ConfigError
from foldrace.core.metrics import METRICS, Metric, normalise
from foldrace.core.standard_errors import Measured
from foldrace.ensemble.calibration import MethodChoice, choose_method, final_fit
from foldrace.ensemble.decisions import decide, fit_rule
from foldrace.ensemble.methods import fit_method
from foldrace.ensemble.metric_choice import MetricPick, _simplest, _Trial, pick_by_metric
from foldrace.ensemble.pool import MemberRows, Pool, member_rows
from foldrace.ensemble.pooling import Fit, Settings, blend_prob
from foldrace.ensemble.single_members import members_that_win
from foldrace.run_folder.blend_records import SINGLE, DecisionRule

ROWS, CLASSES = 1200, 4
PRIOR = np.array([0.7, 0.15, 0.1, 0.05])
RNG = np.random.default_rng(0)
LABELS = RNG.choice(CLASSES, ROWS, p=PRIOR)
FOLDS = np.arange(ROWS) % 3
EVERY = np.ones(ROWS, dtype=bool)


def logs(prob: np.ndarray) -> np.ndarray:
    return np.log(normalise(prob)).astype(np.float32)


def honest(noise: float, seed: int) -> np.ndarray:
    """(N, C) log-probabilities of a model that knows how rare classes are."""
    rng = np.random.default_rng(seed)
    means = 2.0 * np.eye(CLASSES)
    x = means[LABELS] + noise * rng.normal(size=(ROWS, CLASSES))
    logits = np.log(PRIOR) + (x @ means.T - 2.0) / noise**2
    prob = np.exp(logits - logits.max(axis=1, keepdims=True))
    return logs(prob)


def right_but_vague() -> np.ndarray:
    """The class is right in 95 of 100 rows, yet the log loss is poor: it never says more than 0.3,
    and where it is wrong it is sure."""
    rng = np.random.default_rng(7)
    prob = np.full((ROWS, CLASSES), 0.7 / 3)
    prob[np.arange(ROWS), LABELS] = 0.3
    wrong = rng.random(ROWS) < 0.05
    other = (LABELS + 1) % CLASSES
    prob[wrong] = 1e-12
    prob[wrong, other[wrong]] = 1.0
    return logs(prob)


def fit(method: str, pool: Pool) -> Fit:
    return fit_method(method, pool, Settings())


def best_only(method: str, pool: Pool) -> Fit:
    """`greedy` stopped after one round: the member of the least log loss."""
    return fit_method(method, pool, Settings(max_rounds=1))


def rows_of(*members: np.ndarray) -> MemberRows:
    return member_rows(list(members), LABELS, FOLDS)


def chosen(
    rows: MemberRows,
    name: str,
    methods: tuple[str, ...] = ("greedy",),
    one: Callable[[str, Pool], Fit] = fit,
    **more: Any,
) -> tuple[MethodChoice, MetricPick]:
    choice = choose_method(rows, methods, one)
    singles = range(len(rows.members))
    return choice, pick_by_metric(rows, choice, one, METRICS[name], singles, **more)


def test_the_best_member_alone_is_taken_where_the_blend_is_worse() -> None:
    """A blend of the least log loss has the honest member, which is right less often."""
    rows = rows_of(honest(1.6, 1), right_but_vague())
    choice, pick = chosen(rows, "accuracy", one=best_only)
    by_loss = choice.calibration.crossfit
    assert pick.method == SINGLE and pick.record.kept == 1
    first, kept = pick.record.tried[:2]
    assert first.value == accuracy_score(LABELS, by_loss.predicted)
    assert kept.value == accuracy_score(LABELS, rows.read(1).argmax(axis=1))
    assert kept.value > first.value + 0.03 and kept.behind == 0.0
    final, _, prob = final_fit(rows, pick.fit, pick.calibration)
    assert final.used.tolist() == [1]
    np.testing.assert_array_equal(prob.argmax(axis=1), rows.read(1).argmax(axis=1))


def test_the_blend_of_the_least_log_loss_stays_within_a_standard_error() -> None:
    rows = rows_of(honest(1.6, 1), honest(1.6, 2), honest(1.7, 3))
    choice, pick = chosen(rows, "accuracy", ("greedy", "geometric"))
    tried = pick.record.tried
    best = next(trial for trial in tried if trial.behind == 0.0)
    within = [t.behind <= 0 or t.behind <= (t.behind_se or np.inf) for t in tried]
    assert pick.record.kept == within.index(True)
    assert best.value == max(trial.value for trial in tried)
    assert tried[0].method == choice.method and tried[1].method == SINGLE
    assert pick.record.kept == 0 and pick.method == choice.method
    assert pick.calibration is choice.calibration


def trial(name: str, rows: np.ndarray) -> _Trial:
    value = float(rows.mean())
    return _Trial(name, None, Measured(METRICS["accuracy"], value, rows, None, None))


def test_the_simplest_within_a_standard_error_that_is_not_behind_the_first() -> None:
    """The second is within an error of the best, as it differs in many rows, but behind the first,
    which the best beats in a few rows alone."""
    rng = np.random.default_rng(0)
    first = (rng.random(400) < 0.5).astype(float)
    best = first.copy()
    best[np.flatnonzero(first == 0)[:5]] = 1.0
    unlike = rng.permutation(first)
    unlike[np.flatnonzero(unlike == 1)[:2]] = 0.0
    trials = [trial("first", first), trial("unlike", unlike), trial("best", best)]
    assert trials[2].measured.is_better(trials[0].measured)
    assert not trials[2].measured.is_better(trials[1].measured)
    assert _simplest(trials) == (2, 2)
    assert _simplest([trials[0], trials[2], trials[2]]) == (1, 1)  # the first of equal ones
    assert _simplest(trials[:2]) == (0, 0)


def test_what_stands_to_choose_from_is_each_method_with_each_calibration() -> None:
    """A temperature of the blend changes no class: it is not tried again."""
    rows = rows_of(honest(1.6, 1), honest(1.6, 2))
    choice, pick = chosen(rows, "macro_f1", ("greedy", "geometric"))
    found = {(t.method, t.members): t.value for t in pick.record.tried if t.method != SINGLE}
    expected = {
        (method, members): f1_score(LABELS, crossfit.predicted, average="macro")
        for method, own in choice.choices.items()
        for (members, _), crossfit in own.tried.items()
    }
    assert len(pick.record.tried) == 5
    assert found == pytest.approx(expected)


def test_a_single_member_is_chosen_on_the_other_parts() -> None:
    rows = rows_of(honest(1.5, 1), honest(1.5, 2), honest(1.5, 3))
    _, pick = chosen(rows, "macro_f1")
    classes = [rows.read(m).argmax(axis=1) for m in range(3)]
    score = partial(f1_score, average="macro")
    held = np.empty(ROWS, dtype=int)
    for part in range(3):
        own = part == FOLDS
        best = max(classes, key=lambda c: score(LABELS[~own], c[~own]))
        held[own] = best[own]
    single = next(t for t in pick.record.tried if t.method == SINGLE)
    assert single.value == pytest.approx(score(LABELS, held))


def test_a_decision_rule_is_cross_fitted_and_kept_where_it_gains() -> None:
    rows = rows_of(honest(1.6, 1), honest(1.6, 2))
    choice, pick = chosen(rows, "macro_f1")
    members, tempered = pick.calibration.members, pick.calibration.blend
    decided = np.empty(ROWS, dtype=int)
    for part in range(3):
        held = part == FOLDS
        pool = rows.training(part, members)
        prob = normalise(blend_prob(pick.fit(pool), rows.scored(part, members)))
        assert not tempered or choice.calibration.blend
        rule = fit_rule(METRICS["macro_f1"], prob[~held], LABELS[~held])
        decided[held] = decide(rule, prob[held])
    value = f1_score(LABELS, decided, average="macro")
    plain = pick.record.tried[pick.record.kept].value
    assert pick.has_rule and pick.record.rule_gain is not None
    if not tempered:
        assert pick.record.value == pytest.approx(value)
    assert pick.record.rule_gain == pytest.approx(pick.record.value - plain)
    assert pick.record.rule_gain > (pick.record.rule_gain_se or np.inf) > 0
    _, _, prob = final_fit(rows, pick.fit, pick.calibration)
    final = pick.final_record(prob, LABELS)
    assert final.rule == fit_rule(METRICS["macro_f1"], prob, LABELS)


def test_no_rule_where_it_gains_nothing() -> None:
    """Of honest probabilities the most probable class is right most often."""
    _, pick = chosen(rows_of(honest(1.6, 1)), "accuracy")
    assert not pick.has_rule and pick.record.rule_gain is not None
    assert pick.record.rule_gain <= (pick.record.rule_gain_se or 0.0)
    assert pick.record.value == pick.record.tried[pick.record.kept].value


def test_groups_widen_the_errors() -> None:
    """Every row twice as a group: the error is that of half as many rows."""
    twice = np.repeat(np.arange(ROWS // 2), 2)
    labels = LABELS[twice]
    members = [honest(1.6, seed)[twice] for seed in (1, 2)]
    rows = replace(member_rows(members, labels, np.arange(ROWS) // 2 % 3))
    choice = choose_method(rows, ("greedy",), fit)
    alone, grouped = (
        pick_by_metric(rows, choice, fit, METRICS["accuracy"], range(2), groups=groups)
        for groups in (None, twice)
    )
    ratio = (grouped.record.tried[0].se or 0) / (alone.record.tried[0].se or 1)
    assert ratio == pytest.approx(np.sqrt(2), rel=1e-2)


def own(function: object) -> Metric:
    return Metric("own", "mine", function, True)  # type: ignore[arg-type]


def test_a_metric_of_probabilities_decides_too() -> None:
    """The log loss as a metric of one's own keeps the blend of the least log loss."""
    rows = rows_of(honest(1.6, 1), honest(1.6, 2))
    choice = choose_method(rows, ("greedy",), fit)
    metric = own(lambda prob, labels: np.log(prob[np.arange(len(labels)), labels]).mean())
    pick = pick_by_metric(rows, choice, fit, metric, range(2))
    assert pick.record.kept == 0 and pick.record.rule_gain is None and not pick.has_rule
    found = sorted(-t.value for t in pick.record.tried if t.method == "greedy")
    expected = sorted(c.loss for c in choice.calibration.tried.values())
    assert found == pytest.approx(expected, rel=1e-5)
    assert pick.final_record(np.full((ROWS, CLASSES), 0.25), LABELS).rule is None


def test_a_metric_that_gives_no_number_is_an_error_that_names_it() -> None:
    rows = rows_of(honest(1.6, 1), honest(1.6, 2))
    choice = choose_method(rows, ("greedy",), fit)
    with pytest.raises(ConfigError) as caught:
        pick_by_metric(rows, choice, fit, own(lambda prob, labels: float("nan")), range(2))
    [problem] = caught.value.problems
    assert str(problem) == "ensemble.metric: 'own' gives nan, should be a finite number"


def test_a_member_that_beats_the_blend_is_named_with_both_values() -> None:
    rows = rows_of(honest(1.6, 1), right_but_vague())
    prob = np.exp(rows.read(0)).astype(np.float64)
    shown = [METRICS["log_loss"], METRICS["accuracy"], METRICS["macro_f1"]]
    found = list(members_that_win(rows, prob, None, shown, lambda m: f"c000{m} raw"))
    classes = rows.read(1).argmax(axis=1), prob.argmax(axis=1)
    assert [lost.metric for lost in found] == ["accuracy", "macro_f1"]
    assert {lost.member for lost in found} == {"c0001 raw"}
    for lost, score in zip(
        found, (accuracy_score, partial(f1_score, average="macro")), strict=True
    ):
        assert [lost.value, lost.blend_value] == pytest.approx([score(LABELS, c) for c in classes])
        assert lost.value - lost.blend_value > lost.se > 0
    assert not list(members_that_win(rows, np.eye(CLASSES)[LABELS] * 0.9 + 0.025, None, shown, str))
    assert not list(members_that_win(rows, np.exp(rows.read(1)), None, shown, str))  # equal


def test_the_blends_classes_are_those_of_its_rule() -> None:
    rows = rows_of(honest(1.6, 1), right_but_vague())
    sure = DecisionRule(log_weights=(90.0, 0.0, 0.0, 0.0))  # always class 0
    prob = np.eye(CLASSES)[LABELS] * 0.9 + 0.025
    [lost] = members_that_win(rows, prob, sure, [METRICS["accuracy"]], str)
    assert lost.blend_value == (LABELS == 0).mean()


def test_a_metric_that_fails_on_a_member_is_told_and_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = rows_of(honest(1.6, 1), right_but_vague())
    prob = np.exp(rows.read(0)).astype(np.float64)
    failing = own(lambda p, y: 1 / 0)
    found = list(members_that_win(rows, prob, None, [failing, METRICS["accuracy"]], str))
    assert [lost.metric for lost in found] == ["accuracy"]
    assert "metric own, of a member: ZeroDivisionError" in caplog.text
