"""The blend that grows against the one that is found at once, a convex solver, and closed forms."""

from __future__ import annotations

import math

import cvxpy as cp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foldrace.ensemble import optimal
from foldrace.ensemble.running_blend import RunningBlend
from tests.conftest import examples

CLASSES = 4
KINDS = ("plain", "zeros", "tiny", "grid", "alike")


def draw(seed: int, kind: str, members: int, rows: int) -> np.ndarray:
    """Columns (M, N) float32, often with an exact duplicate, a constant one or a hopeless row."""
    rng = np.random.default_rng(seed)
    t = rng.random((members, rows))
    if kind == "zeros":
        t[rng.random(t.shape) < 0.5] = 0.0
    if kind == "tiny":
        t = 10.0 ** -rng.uniform(0, 20, t.shape)
    if kind == "grid":
        t = rng.choice([0.0, 1e-30, 1e-9, 0.25, 0.5, 1.0], t.shape)
    if kind == "alike":
        t = t[:1] * (1 - 1e-7 * rng.random(t.shape))
    if rng.random() < 0.3:
        t[-1] = t[0]
    if rng.random() < 0.3:
        t[rng.integers(members)] = 1 / CLASSES
    if rng.random() < 0.3:
        t[:, rng.integers(rows)] = 0.0
    return t.astype(np.float32)


def varied(members: int, rows: int, seed: int) -> np.ndarray:
    """Members that each know some rows better: many of them have a weight."""
    rng = np.random.default_rng(seed)
    strengths = rng.normal(0, 0.8, (members, 12)) * (rng.random((members, 12)) < 0.3)
    logits = rng.normal(1, 1.5, rows) + strengths @ rng.normal(0, 1, (12, rows))
    return (1 / (1 + np.exp(-logits - rng.normal(0, 0.5, logits.shape)))).astype(np.float32)


def with_constant(t: np.ndarray) -> np.ndarray:
    return np.concatenate([t, np.full((1, t.shape[1]), 1 / CLASSES, np.float32)])


def clip(t: np.ndarray) -> np.ndarray:
    return np.maximum(t.astype(np.float64), 1e-15)


def solved(t: np.ndarray) -> float:
    """The least loss by an interior-point solver, at weights put back on the simplex."""
    w = cp.Variable(len(t), nonneg=True)
    objective = cp.Maximize(cp.sum(cp.log(clip(t).T @ w)) / t.shape[1])
    cp.Problem(objective, [cp.sum(w) == 1]).solve(solver=cp.CLARABEL)
    weights = np.maximum(np.asarray(w.value), 0)
    return float(-np.log(weights / weights.sum() @ clip(t)).mean())


def grown(t: np.ndarray, order: np.ndarray, blend: RunningBlend, at_a_time: int = 1) -> None:
    for start in range(0, len(order), at_a_time):
        blend.add({f"m{m}": t[m] for m in order[start : start + at_a_time]})


def test_begins_with_the_constant_member() -> None:
    blend = RunningBlend(5, CLASSES)
    np.testing.assert_array_equal(blend.mixed, np.full(5, 1 / CLASSES))
    assert blend.loss == pytest.approx(math.log(CLASSES))
    assert (blend.weights, blend.version, len(blend)) == ({}, 0, 0)


@settings(max_examples=examples(60), deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(KINDS),
    members=st.integers(1, 12),
    rows=st.integers(1, 30),
    at_a_time=st.integers(1, 4),
)
def test_any_order_comes_to_the_blend_of_all_at_once(
    seed: int, kind: str, members: int, rows: int, at_a_time: int
) -> None:
    t = draw(seed, kind, members, rows)
    blend = RunningBlend(rows, CLASSES)
    grown(t, np.random.default_rng(seed).permutation(members), blend, at_a_time)
    best = optimal(with_constant(t), tolerance=1e-9)
    assert best.loss - 1e-8 <= blend.loss <= best.loss + 1e-5 + 1e-8
    assert blend.loss - best.loss <= blend.certificate + 1e-8


@settings(max_examples=examples(40), deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(KINDS),
    most=st.integers(1, 14),
)
def test_what_it_tells_holds_after_every_member(seed: int, kind: str, most: int) -> None:
    """Loss, weights and `mixed` agree, the loss never rises, the version tells of every change,
    and no more columns are held than allowed."""
    t = draw(seed, kind, 12, 20)
    blend = RunningBlend(20, CLASSES, most_members=most)
    for m, column in enumerate(t):
        loss, mixed, version = blend.loss, blend.mixed.copy(), blend.version
        blend.add({f"m{m}": column})
        assert blend.loss <= loss + 1e-12
        assert (blend.version != version) == (not np.array_equal(blend.mixed, mixed))
        assert blend.loss == pytest.approx(float(-np.log(blend.mixed).mean()), abs=1e-12)
        constant = 1.0 - sum(blend.weights.values())
        weighted = sum(w * clip(t[int(name[1:])]) for name, w in blend.weights.items())
        np.testing.assert_allclose(blend.mixed, constant / CLASSES + weighted, atol=1e-6)
        assert len(blend) <= most


@pytest.mark.parametrize(("members", "rows", "seed"), [(5, 12, 0), (12, 100, 1), (30, 300, 2)])
def test_agrees_with_a_convex_solver(members: int, rows: int, seed: int) -> None:
    t = varied(members, rows, seed)
    blend = RunningBlend(rows, CLASSES, tolerance=1e-7)
    grown(t, np.arange(members), blend)
    assert len(blend.weights) >= 2
    assert blend.loss == pytest.approx(solved(with_constant(t)), abs=1e-6)


def test_the_large_way_agrees_too() -> None:
    """Enough members and rows for the compiled kernels and several passes."""
    t = varied(300, 16_000, 3)
    blend = RunningBlend(16_000, CLASSES)
    blend.add({f"m{m}": t[m] for m in range(280)})
    grown(t, np.arange(280, 300), blend, 3)
    assert blend.certificate <= 1e-5
    assert blend.loss == pytest.approx(optimal(with_constant(t), 1e-8).loss, abs=1e-5)


def test_closed_form_of_two_members() -> None:
    # Rows of each kind in shares 2:1; weights (a, 1 - a) give a, 1 - a on them: a = 2/3.
    blend = RunningBlend(3, 1000, tolerance=1e-12)
    blend.add({"a": np.array([1.0, 1.0, 0.0])})
    blend.add({"b": np.array([0.0, 0.0, 1.0])})
    assert blend.weights == pytest.approx({"a": 2 / 3, "b": 1 / 3}, abs=1e-5)


def test_a_member_that_adds_nothing_changes_nothing_and_is_held() -> None:
    t = varied(2, 200, 4)
    worse = t[0] * np.float32(0.5)
    blend = RunningBlend(200, CLASSES)
    blend.add({"good": t[0]})
    before, mixed = blend.version, blend.mixed
    blend.add({"worse": worse})
    assert (blend.version, len(blend)) == (before, 2)
    assert blend.mixed is mixed


def test_a_member_worse_than_chance_gets_no_weight() -> None:
    blend = RunningBlend(50, CLASSES)
    blend.add({"bad": np.full(50, 0.2 / CLASSES)})
    assert (blend.weights, blend.version) == ({}, 0)


def test_equal_members_are_one() -> None:
    t = varied(3, 100, 5)
    t[0, :9] = 0.0
    below = np.where(t[0] == 0.0, np.float32(1e-30), t[0])  # the same once clipped
    one, other = RunningBlend(100, CLASSES), RunningBlend(100, CLASSES)
    one.add({"a": t[0], "b": t[1]})
    other.add({"a": t[0], "b": t[1], "c": t[0].copy()})
    other.add({"d": below, "e": t[1].astype(np.float64)})
    assert len(other) == 2
    assert other.weights == one.weights
    one.add({"f": t[2]})
    other.add({"f": t[2]})
    assert other.loss == one.loss


def test_the_least_wanted_go_when_it_is_full() -> None:
    """Little is lost with them: the blend stays near that of all columns."""
    t = varied(60, 400, 6)
    blend = RunningBlend(400, CLASSES, most_members=25)
    grown(t, np.arange(25), blend)
    before = set(blend.weights)
    one_more = t[:1] * np.float32(0.9)
    blend.add({"useless": one_more[0]})  # less wanted than any
    assert len(blend) == 25
    assert set(blend.weights) == before
    grown(t, np.arange(25, 60), blend)
    assert len(blend) == 25
    assert blend.loss <= optimal(with_constant(t), 1e-8).loss + 1e-3


def test_many_at_once_pass_through_a_few_places() -> None:
    t = varied(200, 300, 7)
    blend = RunningBlend(300, CLASSES, most_members=40)
    blend.add({f"m{m}": t[m] for m in range(200)})
    assert len(blend) == 40
    assert blend.loss <= optimal(with_constant(t), 1e-8).loss + 1e-3


def test_no_member_with_a_weight_goes() -> None:
    """Three members, each alone right on its rows; there is no room for a fourth."""
    t = np.full((4, 8), 1e-6, dtype=np.float32)
    for m in range(4):
        t[m, 2 * m : 2 * m + 2] = 0.9
    blend = RunningBlend(8, 1000, most_members=3)
    grown(t, np.arange(3), blend)
    weights = blend.weights
    blend.add({"m3": t[3]})
    assert blend.weights == weights
    assert set(weights) == {"m0", "m1", "m2"}


def test_the_blend_cannot_be_changed_from_outside() -> None:
    t = varied(2, 50, 8)
    blend = RunningBlend(50, CLASSES)
    for m in range(2):
        with pytest.raises(ValueError, match="read-only"):
            blend.mixed[0] = 0.5
        given = t[m].copy()
        blend.add({f"m{m}": given})
        given[:] = 0.0
    assert blend.loss == pytest.approx(optimal(with_constant(t), 1e-9).loss, abs=1e-5)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (np.full(2, 0.5), r"member 'x' has shape \(2,\), should be \(3,\)"),
        (np.full((3, 1), 0.5), r"member 'x' has shape \(3, 1\)"),
        (np.array([0.5, math.nan, 0.5]), "member 'x', row 1: nan is not a probability"),
        (np.array([0.5, 0.5, 1.5]), "member 'x', row 2: 1.5 is not a probability"),
        (np.array([-0.1, 0.5, 0.5]), "member 'x', row 0: -0.1 is not a probability"),
    ],
)
def test_wrong_columns_are_named(column: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunningBlend(3, CLASSES).add({"x": column})


def test_a_name_stands_for_one_column() -> None:
    blend = RunningBlend(3, CLASSES)
    blend.add({"x": np.full(3, 0.5)})
    blend.add({"x": np.full(3, 0.5)})
    with pytest.raises(ValueError, match="member 'x' is held already, with another column"):
        blend.add({"x": np.full(3, 0.6)})


@pytest.mark.parametrize("sizes", [(0, 2, 1), (1, 0, 1), (1, 2, 0)])
def test_wrong_sizes_are_named(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="should be at least 1"):
        RunningBlend(*sizes)
