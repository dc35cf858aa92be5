"""The bounded gain against the derivative of the blend's loss, its closed form and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import sem

from foldrace.ensemble.running_blend import MOST_LOST, STEP, bounded_gain
from tests.conftest import examples


def loss(q: np.ndarray) -> float:
    return float(-np.log(q).mean())


def columns(seed: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.uniform(0.0, 1.0, rows), rng.uniform(0.05, 1.0, rows)


@settings(max_examples=examples(50), deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(2, 400))
def test_is_the_mean_and_error_of_the_closed_form(seed: int, rows: int) -> None:
    t, q = columns(seed, rows)
    x = (np.log(0.9 * q + 0.1 * t) - np.log(q)) / 0.1
    gain = bounded_gain(t, q)
    assert gain.mean == pytest.approx(float(x.mean()), abs=1e-12)
    assert gain.se == pytest.approx(float(sem(x)), abs=1e-12)
    assert gain.rows == rows


@settings(max_examples=examples(50), deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_is_what_the_blend_gains_by_the_step(seed: int) -> None:
    t, q = columns(seed, 300)
    stepped = loss((1 - STEP) * q + STEP * t)
    assert bounded_gain(t, q).mean == pytest.approx((loss(q) - stepped) / STEP, abs=1e-12)


def test_is_the_slope_to_first_order() -> None:
    """For a member near the blend, what is left is of second order."""
    t, q = columns(1, 5000)
    away = t - q
    for size in (0.1, 0.01, 0.001):
        member = q + size * away
        h = 1e-6
        slope = (loss(q + h * (member - q)) - loss(q - h * (member - q))) / (2 * h)
        left = bounded_gain(member, q).mean + slope
        assert abs(left) <= size**2 * float(((away / q) ** 2).mean())


def test_a_member_equal_to_the_blend_gains_nothing() -> None:
    _, q = columns(2, 100)
    gain = bounded_gain(q, q)
    assert (gain.mean, gain.se) == (0.0, 0.0)


@settings(max_examples=examples(100), deadline=None)
@given(
    t=st.lists(st.floats(0, 1), min_size=1, max_size=20),
    q=st.floats(1e-15, 1.0),
)
def test_no_row_loses_more_than_the_bound(t: list[float], q: float) -> None:
    gain = bounded_gain(np.array(t), np.full(len(t), q))
    assert -MOST_LOST - 1e-12 <= gain.mean <= math.log(0.9 + 0.1 / q) / 0.1 + 1e-9


def test_one_overconfident_row_does_not_decide() -> None:
    """The plain ratio t / q - 1 has a mean of 1e6 here; all other rows lose."""
    q, t = np.full(1000, 0.5), np.full(1000, 0.3)
    q[7], t[7] = 1e-9, 1.0
    assert bounded_gain(t, q).mean < 0.0


def test_one_row_alone_stops_nobody() -> None:
    gain = bounded_gain(np.array([0.0]), np.array([0.9]))
    assert gain.rows == 1
    assert gain.se == MOST_LOST
    assert gain.mean + gain.se > 0.0


def test_zeros_count_as_the_least_probability() -> None:
    q = np.array([1e-15, 0.5])
    assert bounded_gain(np.array([0.0, 0.5], np.float32), q).mean == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("t", "q", "message"),
    [
        ([], [], r"shape \(0,\), the blend \(0,\)"),
        ([0.5], [0.5, 0.5], r"shape \(1,\), the blend \(2,\)"),
        ([0.5, 0.5], [0.5, 0.0], r"row 1: the blend gives 0\.0, should be above 0"),
        ([0.5], [math.nan], "row 0: the blend gives nan"),
    ],
)
def test_wrong_input_is_named(t: list[float], q: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bounded_gain(np.array(t), np.array(q))
