"""Standard errors against closed forms and a second bootstrap."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from foldrace.core.metrics import METRICS, Metric, UnfitMetric
from foldrace.core.standard_errors import error_of_mean, measure

ROWS, CLASSES = 300, 4
LABELS = np.random.default_rng(0).choice(CLASSES, ROWS, p=[0.6, 0.2, 0.15, 0.05])
GROUPS = np.random.default_rng(1).integers(0, 60, ROWS) * 7
THEIRS: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
"""Metrics of tables (draws, C, C), row = label, written anew."""


def theirs(function: Callable[[np.ndarray], np.ndarray]) -> None:
    THEIRS[function.__name__] = function


@theirs
def macro_f1(tables: np.ndarray) -> np.ndarray:
    hits, sums = np.einsum("bii->bi", tables), tables.sum(axis=1) + tables.sum(axis=2)
    return (2 * hits / np.maximum(sums, 1)).sum(axis=1) / (sums > 0).sum(axis=1)


@theirs
def balanced_accuracy(tables: np.ndarray) -> np.ndarray:
    hits, rows = np.einsum("bii->bi", tables), tables.sum(axis=2)
    return (hits / np.maximum(rows, 1)).sum(axis=1) / (rows > 0).sum(axis=1)


@theirs
def qwk(tables: np.ndarray) -> np.ndarray:
    distance = (np.arange(CLASSES)[:, None] - np.arange(CLASSES)) ** 2
    chance = tables.sum(axis=2)[:, :, None] * tables.sum(axis=1)[:, None, :]
    seen, expected = ((distance * t).sum(axis=(1, 2)) for t in (tables, chance))
    return 1 - seen / expected * tables.sum(axis=(1, 2))


def guesses(seed: int, right: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.where(rng.random(ROWS) < right, LABELS, rng.integers(0, CLASSES, ROWS))


def second_bootstrap(name: str, a: np.ndarray, b: np.ndarray, grouped: bool) -> tuple[float, float]:
    """Errors of a's metric and of the difference to b's: a table of counts a row, or a group, and
    multinomial draws of these."""
    own = np.unique(GROUPS, return_inverse=True)[1] if grouped else np.arange(ROWS)
    counts = np.zeros((own.max() + 1, CLASSES, CLASSES, CLASSES))
    np.add.at(counts, (own, LABELS, a, b), 1)
    units = len(counts)
    times = np.random.default_rng(99).multinomial(units, np.full(units, 1 / units), size=1000)
    tables = (times @ counts.reshape(units, -1)).reshape(-1, CLASSES, CLASSES, CLASSES)
    first, second = (THEIRS[name](tables.sum(axis=axis)) for axis in (3, 2))
    return float(first.std(ddof=1)), float((first - second).std(ddof=1))


@pytest.mark.parametrize("grouped", [False, True], ids=["rows", "groups"])
@pytest.mark.parametrize("name", THEIRS)
def test_a_second_bootstrap_has_the_same_errors(name: str, grouped: bool) -> None:
    """To four standard errors of both bootstraps' own errors."""
    groups = GROUPS if grouped else None
    a, b = guesses(2, 0.7), guesses(3, 0.6)
    first, second = (measure(METRICS[name], p, LABELS, CLASSES, groups) for p in (a, b))
    allowed = 4 * math.sqrt(1 / 400 + 1 / 2000)
    alone, paired = second_bootstrap(name, a, b, grouped)
    assert first.se == pytest.approx(alone, rel=allowed)
    gain, error = first.better_by(second)
    assert gain == first.value - second.value
    assert error == pytest.approx(paired, rel=allowed)
    again = measure(METRICS[name], a, LABELS, CLASSES, groups)
    assert again.se == first.se  # the same draws on every call


def test_the_error_of_an_accuracy_is_that_of_a_share() -> None:
    predicted = guesses(2, 0.7)
    found = measure(METRICS["accuracy"], predicted, LABELS, CLASSES)
    share = (predicted == LABELS).mean()
    assert found.value == share
    assert found.se == pytest.approx(math.sqrt(share * (1 - share) / (ROWS - 1)), rel=1e-12)
    other = guesses(3, 0.6)
    gain, error = found.better_by(measure(METRICS["accuracy"], other, LABELS, CLASSES))
    change = (predicted == LABELS).astype(float) - (other == LABELS)
    assert gain == pytest.approx(change.mean())
    assert error == pytest.approx(change.std(ddof=1) / math.sqrt(ROWS), rel=1e-12)


def test_rows_that_are_copies_of_each_other_count_as_one() -> None:
    """Every row three times, in groups: the errors of the rows once."""
    values = np.random.default_rng(5).normal(size=50)
    copies, groups = np.repeat(values, 3), np.repeat(np.arange(50), 3)
    assert error_of_mean(copies, groups) == pytest.approx(error_of_mean(values), rel=1e-12)
    assert error_of_mean(copies) < 0.6 * error_of_mean(values)
    predicted = guesses(2, 0.7)
    tripled = np.repeat(np.arange(ROWS), 3)
    metric = METRICS["macro_f1"]
    once = measure(metric, predicted, LABELS, CLASSES)
    thrice = measure(metric, predicted[tripled], LABELS[tripled], CLASSES, tripled)
    assert thrice.se == pytest.approx(once.se, rel=1e-9)


def test_one_group_tells_no_error() -> None:
    groups = np.zeros(ROWS, dtype=np.int64)
    for name in ("accuracy", "macro_f1"):
        found = measure(METRICS[name], guesses(2, 0.7), LABELS, CLASSES, groups)
        assert found.se is None and not found.is_better(found)


def test_the_log_loss_is_better_where_it_is_less() -> None:
    rng = np.random.default_rng(4)
    prob = rng.dirichlet(np.ones(CLASSES), ROWS)
    better = prob + np.eye(CLASSES)[LABELS]
    better /= better.sum(axis=1, keepdims=True)
    metric = METRICS["log_loss"]
    good, bad = (measure(metric, p, LABELS, CLASSES) for p in (better, prob))
    rows = -np.log(prob[np.arange(ROWS), LABELS])
    assert bad.value == pytest.approx(rows.mean())
    assert bad.se == pytest.approx(rows.std(ddof=1) / math.sqrt(ROWS))
    assert good.is_better(bad) and not bad.is_better(good)
    assert good.better_by(bad)[0] == pytest.approx(bad.value - good.value)


def own(function: object) -> Metric:
    return Metric("own", "mine", function, True)  # type: ignore[arg-type]


def test_a_metric_of_ones_own_is_resampled_too() -> None:
    """The mean of the true class's probability, whose error has a closed form."""
    prob = np.random.default_rng(4).dirichlet(np.ones(CLASSES), ROWS)
    rows = prob[np.arange(ROWS), LABELS]
    found = measure(own(lambda p, y: p[np.arange(len(y)), y].mean()), prob, LABELS, CLASSES)
    assert found.value == pytest.approx(rows.mean())
    assert found.se == pytest.approx(rows.std() / math.sqrt(ROWS), rel=4 / math.sqrt(400))


@pytest.mark.parametrize("value", [None, "x", float("nan"), np.ones(2)])
def test_a_metric_that_gives_no_number_is_told(value: object) -> None:
    prob = np.full((ROWS, CLASSES), 0.25)
    with pytest.raises(UnfitMetric, match="should be a finite number"):
        measure(own(lambda p, y: value), prob, LABELS, CLASSES)
