"""Greedy selection against slow implementations that share no code with it."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foldrace import ensemble
from foldrace.ensemble import Blend, greedy
from tests.conftest import examples

Backend = Literal["numba", "numpy"]
BACKENDS: tuple[Backend, ...] = ("numba", "numpy")


def exact_path(t: list[list[Fraction]], rounds: int, most: int) -> list[int]:
    """Greedy in rational arithmetic: the least log loss is the greatest product of the sums."""
    total, path = [Fraction(0)] * len(t[0]), []
    for _ in range(rounds):
        allowed = range(len(t)) if len(set(path)) < most else sorted(set(path))
        products = {m: math.prod(s + x for s, x in zip(total, t[m], strict=True)) for m in allowed}
        path.append(min(allowed, key=lambda m: (-products[m], m)))
        total = [s + x for s, x in zip(total, t[path[-1]], strict=True)]
    return path


def eager_path(
    t: np.ndarray, rounds: int, forced: Sequence[int] = ()
) -> tuple[list[int], list[float]]:
    """All members' losses in every round, in float64."""
    t = np.clip(t.astype(np.float64), 1e-15, 1)
    total, path, losses = np.zeros(t.shape[1]), [], []
    for r in range(1, rounds + 1):
        candidates = -np.log((total + t) / r).mean(axis=1)
        best = int(np.flatnonzero(candidates <= candidates.min() + 1e-12)[0])
        path.append(forced[r - 1] if r <= len(forced) else best)
        losses.append(float(candidates[path[-1]]))
        total = total + t[path[-1]]
    return path, losses


def best_prefix(losses: Sequence[float], at_least: int = 1) -> int:
    least = min(losses[at_least - 1 :]) + 1e-12
    return next(n for n in range(at_least, len(losses) + 1) if losses[n - 1] <= least)


def eager_weights(t: np.ndarray, rounds: int, forced: Sequence[int] = ()) -> np.ndarray:
    path, losses = eager_path(t, rounds, forced)
    length = best_prefix(losses, max(1, len(forced)))
    return np.bincount(path[:length], minlength=len(t)) / length


# Values k/64, at most 4 rows and 6 rounds: sums are exact in floats, and two different products
# differ by more than the tie tolerance.
grids = st.integers(1, 4).flatmap(
    lambda n: st.lists(st.lists(st.integers(1, 64), min_size=n, max_size=n), min_size=1, max_size=6)
)


@settings(max_examples=examples(200), deadline=None)
@given(
    grid=grids,
    rounds=st.integers(1, 6),
    most=st.integers(1, 6),
    single=st.booleans(),
    backend=st.sampled_from(BACKENDS),
)
def test_equals_exact_greedy(
    grid: list[list[int]], rounds: int, most: int, single: bool, backend: Backend
) -> None:
    t = np.array(grid, dtype=np.float32 if single else np.float64) / 64
    got = greedy(t, max_rounds=rounds, max_members=most, backend=backend)
    exact = exact_path([[Fraction(k, 64) for k in row] for row in grid], rounds, most)
    assert len(got.path_losses) == rounds
    length = best_prefix(got.path_losses)
    assert list(got.path) == exact[:length]
    np.testing.assert_allclose(
        got.weights, np.bincount(exact[:length], minlength=len(t)) / length, atol=1e-15
    )


def _correlated(members: int, rows: int, seed: int, zeros: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    logits = rng.normal(2, 2, rows) + rng.normal(0, 1.5, (members, rows))
    t = 1 / (1 + np.exp(-logits))
    t[rng.random(t.shape) < zeros] = 0.0
    t[rng.random(t.shape) < zeros] = 1e-20
    return t


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("members", "rows", "zeros"),
    [(60, 1500, 0.0), (60, 1500, 0.001), (150, 40, 0.1), (5, 513, 0.3), (1, 7, 0.5), (9, 1, 0.2)],
)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_eager_greedy(
    dtype: type, members: int, rows: int, zeros: float, seed: int, backend: Backend
) -> None:
    t = _correlated(members, rows, seed, zeros).astype(dtype)
    path, losses = eager_path(t, 25)
    got = greedy(t, max_rounds=25, backend=backend)
    assert list(got.path) == path[: best_prefix(losses)]
    np.testing.assert_allclose(got.path_losses, losses, rtol=0, atol=1e-12)
    assert got.loss == pytest.approx(min(losses), abs=2e-12)


def test_two_members_that_need_each_other() -> None:
    got = greedy([[0.9, 0.1], [0.1, 0.9]], max_rounds=9)
    assert got.weights.tolist() == [0.5, 0.5]
    assert got.path == (0, 1)
    assert got.loss == pytest.approx(math.log(2))
    assert got.certificate == pytest.approx(0.0, abs=1e-12)


def test_the_best_prefix_is_kept_not_the_last_round() -> None:
    got = greedy([[0.9, 0.1], [0.1, 0.9]], max_rounds=3)
    assert got.path_losses[2] > got.path_losses[1] == pytest.approx(got.loss)
    assert got.weights.tolist() == [0.5, 0.5]


def test_a_dominating_member_is_enough() -> None:
    got = greedy([[0.2, 0.3], [0.8, 0.9], [0.7, 0.9]])
    assert got.path == (1,)
    assert got.weights.tolist() == [0.0, 1.0, 0.0]
    assert len(got.path_losses) == 50


def test_the_lowest_of_exact_duplicates_gets_all_the_weight() -> None:
    t = _correlated(6, 300, 3, 0.01)
    plain = greedy(t)
    doubled = greedy(np.concatenate([t, t[::-1], t]))
    np.testing.assert_array_equal(doubled.weights[:6], plain.weights)
    assert not doubled.weights[6:].any()


def test_members_that_differ_only_below_the_clip_are_duplicates() -> None:
    got = greedy([[0.5, 1e-30], [0.5, 0.0], [0.5, 1e-15]], max_rounds=4)
    assert got.weights.tolist() == [1.0, 0.0, 0.0]


def test_rounding_does_not_break_a_tie() -> None:
    t = _correlated(1, 1000, 4, 0.0)
    mirrored = np.concatenate([t, t[:, ::-1]])  # equal losses, summed in another order
    assert greedy(mirrored).path[0] == greedy(mirrored[::-1]).path[0] == 0


@pytest.mark.parametrize("most", [1, 2, 3, 7, 100])
def test_max_members_bounds_the_distinct_members(most: int) -> None:
    t = _correlated(12, 400, 5, 0.0)
    free, bound = greedy(t), greedy(t, max_members=most)
    assert 1 <= np.count_nonzero(bound.weights) <= most
    assert bound.loss >= free.loss - 1e-12
    if most >= 12:
        np.testing.assert_array_equal(bound.weights, free.weights)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("forced", [(4,), (11, 0), (3, 7, 5)])
def test_forced_members_come_first_and_stay(forced: tuple[int, ...], backend: Backend) -> None:
    t = _correlated(12, 300, 8, 0.001)
    t[5] = 0.01  # a bad one: no shorter prefix may leave it out
    got = greedy(t, max_rounds=20, forced=forced, backend=backend)
    assert got.path[: len(forced)] == forced
    np.testing.assert_allclose(got.weights, eager_weights(t, 20, forced), atol=1e-15)
    assert (got.weights[list(forced)] > 0).all()
    assert list(got.path_losses) == pytest.approx(eager_path(t, 20, forced)[1], abs=1e-12)


def test_forced_members_count_among_max_members() -> None:
    t = _correlated(12, 300, 9, 0.0)
    assert set(np.flatnonzero(greedy(t, max_members=2, forced=(3, 5, 3)).weights)) == {3, 5}
    got = greedy(t, max_members=3, forced=(3, 5))
    assert {3, 5} < set(np.flatnonzero(got.weights)) or np.count_nonzero(got.weights) == 2


@pytest.mark.parametrize("seed", range(3))
def test_one_bag_is_greedy_on_a_half_of_the_members(seed: int) -> None:
    t = _correlated(7, 80, 10, 0.0)
    got = greedy(t, max_rounds=10, bags=1, seed=seed)
    halves = [list(half) for half in combinations(range(7), 4)]
    losses = []
    for half in halves:
        weights = np.zeros(7)
        weights[half] = eager_weights(t[half], 10)
        losses.append(float(np.abs(weights - got.weights).max()))
    assert min(losses) < 1e-12
    assert (got.path, got.path_losses) == ((), ())


def test_bags_are_averaged_by_the_seed() -> None:
    t = _correlated(30, 200, 11, 0.0)
    first, same, other = (greedy(t, 10, bags=8, seed=seed) for seed in (0, 0, 1))
    assert first.weights.tolist() == same.weights.tolist() != other.weights.tolist()
    assert first.weights.sum() == pytest.approx(1.0, abs=1e-12)
    assert np.count_nonzero(first.weights) > np.count_nonzero(greedy(t, 10, bags=1).weights)
    mixed = first.weights @ t
    assert first.loss == pytest.approx(float(-np.log(mixed).mean()), abs=1e-12)


def test_bags_obey_forced_and_max_members() -> None:
    t = _correlated(30, 200, 12, 0.0)
    t[17] = 0.01
    got = greedy(t, 10, max_members=4, bags=9, forced=(17, 2))
    assert np.count_nonzero(got.weights) <= 4
    assert got.weights[17] >= 0.1 - 1e-12
    assert got.weights[2] > 0
    free = greedy(t, 10, bags=9, forced=(17, 2))
    assert np.count_nonzero(free.weights) > 4


def test_backends_agree_on_a_large_problem() -> None:
    t = _correlated(200, 2500, 13, 0.001).astype(np.float32)
    one, other = (greedy(t, 30, bags=0, backend=backend) for backend in BACKENDS)
    assert one.path == other.path
    np.testing.assert_array_equal(one.weights, other.weights)
    assert one.certificate == pytest.approx(other.certificate, abs=1e-12)


def test_the_input_is_left_alone() -> None:
    t = _correlated(5, 50, 6, 0.1)
    t.setflags(write=False)
    assert isinstance(greedy(t), Blend)


def test_repeated_calls_agree_to_the_bit() -> None:
    t = _correlated(30, 700, 7, 0.0).astype(np.float32)
    first, second = greedy(t), greedy(t.copy())
    assert first.path == second.path
    assert first.path_losses == second.path_losses
    assert (first.loss, first.certificate) == (second.loss, second.certificate)


@pytest.mark.parametrize(
    ("t", "message"),
    [
        ([[0.5, 0.5], [0.5, math.nan]], "member 1, row 1: nan is not a probability"),
        ([[0.5, -0.25]], r"member 0, row 1: -0\.25 is not"),
        ([[0.5], [1.5]], r"member 1, row 0: 1\.5 is not a probability in \[0, 1\]"),
        ([[0.5], [math.inf]], "member 1, row 0: inf"),
        ([0.5, 0.5], r"shape \(2,\), should be \(members, rows\)"),
        (np.empty((0, 3)), r"shape \(0, 3\)"),
        (np.empty((3, 0)), r"shape \(3, 0\)"),
    ],
)
def test_wrong_members_are_named(t: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        greedy(t)


def test_wrong_limits_are_named() -> None:
    with pytest.raises(ValueError, match="max_rounds is 0, should be at least 1"):
        greedy([[0.5]], max_rounds=0)
    with pytest.raises(ValueError, match="max_members is 0, should be at least 1"):
        greedy([[0.5]], max_members=0)
    for name in ("max_rounds", "max_members"):
        with pytest.raises(ValueError, match=f"{name} is 1, should be at least 2 for 2 forced"):
            greedy([[0.5], [0.25]], forced=(1, 0), **{name: 1})
    with pytest.raises(ValueError, match="bags is -1, should be at least 0"):
        greedy([[0.5]], bags=-1)
    with pytest.raises(ValueError, match=r"forced members \[-1, 1\] do not exist, should be in 0"):
        greedy([[0.5]], forced=(-1, 0, 1))


def test_the_package_gives_functions_and_stays_light() -> None:
    assert all(callable(getattr(ensemble, name)) for name in ensemble.__all__)
    names = {"Blend", "CrossFit", "certify", "crossfit", "greedy", "optimal"}
    assert set(ensemble.__all__) == names
    code = (
        "import sys, foldrace.ensemble.methods, foldrace.core.metrics;"
        "heavy = {'torch', 'ray', 'optuna', 'sklearn', 'scipy', 'numba', 'pandas', 'pydantic'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
