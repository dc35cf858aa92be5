"""Methods within limits: what is kept, what is certified, how the combiner is seen from outside."""

from __future__ import annotations

import numpy as np
import pytest

from foldrace.ensemble.bounded import fit_on, fit_within, supports_by_price
from foldrace.ensemble.limits import Limits
from foldrace.ensemble.methods import METHODS, fit_method
from foldrace.ensemble.pool import Pool
from foldrace.ensemble.pooling import Settings, blend_prob, pool_terms
from foldrace.ensemble.solvers.kernels import certified
from foldrace.ensemble.solvers.optimal import optimal
from tests.ensemble.member_pools import made_up, of_variants, pool_of

COUNT = 6
BOUNDED = [name for name in METHODS if name not in ("soup", "snapshot")]
FREE = Limits(np.zeros((0, COUNT)), np.zeros(0))
PAIR = Limits(np.zeros((0, COUNT)), np.zeros(0), max_members=2)


@pytest.fixture(scope="module")
def pool() -> Pool:
    log_probs, labels = made_up(COUNT, 240, 4, seed=3)
    return pool_of(log_probs, labels, of_variants(3, ("ema", "raw")))


@pytest.mark.parametrize("method", BOUNDED)
def test_limits_are_kept(pool: Pool, method: str) -> None:
    settings = Settings()
    fit = fit_within(method, pool, settings, PAIR)
    assert 1 <= len(fit.used) <= 2
    costs = np.array([[5.0, 1.0, 4.0, 2.0, 9.0, 3.0]])
    fit = fit_within(method, pool, settings, Limits(costs, np.array([6.0])))
    assert 0 < costs[0, fit.used].sum() <= 6.0


@pytest.mark.parametrize("method", BOUNDED)
def test_what_the_limits_admit_stays(pool: Pool, method: str) -> None:
    """The same as without limits, to the last bit."""
    free = fit_method(method, pool, Settings())
    wide = Limits(np.ones((1, COUNT)), np.array([len(free.used)]), max_members=len(free.used))
    for limits in (wide, FREE):
        same = fit_within(method, pool, Settings(), limits)
        np.testing.assert_array_equal(same.combiner.weights, free.combiner.weights)
        np.testing.assert_array_equal(blend_prob(same, pool), blend_prob(free, pool))


def test_the_best_pair_of_all(pool: Pool) -> None:
    fit = fit_within("optimal", pool, Settings(), PAIR)
    pairs = [(i, j) for i in range(COUNT) for j in range(i)]
    least = min(optimal(pool.true_prob[list(pair)], tolerance=1e-9).loss for pair in pairs)
    assert fit.blend is not None
    assert fit.blend.loss == pytest.approx(least, abs=1e-6)


def test_the_certificate_is_over_the_whole_pool(pool: Pool) -> None:
    fit = fit_within("greedy", pool, Settings(), PAIR)
    assert fit.blend is not None
    whole = certified(pool.true_prob, fit.combiner.weights)
    assert fit.blend.certificate == pytest.approx(whole.certificate, abs=1e-12)
    assert fit.blend.loss == pytest.approx(whole.loss, abs=1e-12)
    best = optimal(pool.true_prob, tolerance=1e-9).loss
    assert fit.blend.loss - fit.blend.certificate <= best + 1e-9
    assert fit.blend.certificate > 1e-3
    assert set(fit.blend.path) == set(fit.used.tolist())  # members of the pool, not of the pair


@pytest.mark.parametrize("method", ["greedy", "optimal", "geometric", "stacking"])
def test_forced_members_are_in(pool: Pool, method: str) -> None:
    for forced in range(COUNT):
        fit = fit_within(method, pool, Settings(forced=(forced,)), PAIR)
        assert forced in fit.used and len(fit.used) <= 2


@pytest.mark.parametrize("method", BOUNDED)
def test_the_combiner_counts_the_pools_members(pool: Pool, method: str) -> None:
    """It predicts as the method does on the members alone, in any order they are kept in."""
    support = np.array([1, 4])
    fit = fit_on(method, pool, Settings(), support)
    used = fit.used
    assert used.tolist() == [1, 4]
    few = pool.take(support)
    expected = blend_prob(fit_method(method, few, Settings()), few)
    np.testing.assert_allclose(blend_prob(fit, pool), expected, atol=1e-12)
    for order in (used, used[::-1]):
        kept = fit.combiner.take(order)
        assert kept.pooling == fit.combiner.pooling
        np.testing.assert_array_equal(kept.weights, fit.combiner.weights[order])
        terms = ((place, pool.log_prob(int(m))) for place, m in enumerate(order))
        np.testing.assert_allclose(pool_terms(kept, terms), blend_prob(fit, pool), atol=1e-12)


def test_on_given_members_alone(pool: Pool) -> None:
    support = np.array([1, 4, 5])
    fit = fit_on("uniform", pool, Settings(forced=(4,)), support)
    np.testing.assert_allclose(fit.combiner.weights, [0, 1 / 3, 0, 0, 1 / 3, 1 / 3])
    whole = certified(pool.true_prob, fit.combiner.weights)
    assert fit.blend is not None
    assert fit.blend.certificate == pytest.approx(whole.certificate, abs=1e-12)
    forced = fit_on("optimal", pool, Settings(forced=(4,)), support)
    assert {4} <= set(forced.used.tolist()) <= set(support.tolist())


def test_supports_by_price_are_of_members_that_the_method_takes() -> None:
    members = of_variants(3, ("raw", "snap1"))
    log_probs, labels = made_up(6, 240, 4, seed=3)
    costs = np.array([[1.0, 2.0, 1.0, 3.0, 1.0, 4.0]])
    pool, limits = pool_of(log_probs, labels, members), Limits(costs, np.array([9.0]))
    supports = supports_by_price("snapshot", pool, Settings(), limits, 0)
    assert supports and all(m in (1, 3, 5) for support in supports for m in support)
    every = supports_by_price("greedy", pool, Settings(forced=(2,)), limits, 0)
    assert len(every) > 1 and all(2 in support for support in every)


def test_no_member_fits(pool: Pool) -> None:
    limits = Limits(np.full((1, COUNT), 2.0), np.array([1.0]))
    with pytest.raises(ValueError, match="no member is within the limits"):
        fit_within("greedy", pool, Settings(), limits)


@pytest.mark.parametrize(
    ("method", "variants"), [("soup", ("raw", "soup")), ("snapshot", ("raw", "snap1", "snap2"))]
)
def test_methods_that_take_few_choose_among_those(method: str, variants: tuple[str, ...]) -> None:
    """However good the others are."""
    members = of_variants(2, variants)
    log_probs, labels = made_up(len(members), 240, 4, seed=3)
    raw = [i for i, member in enumerate(members) if member.variant == "raw"]
    log_probs[raw] = np.log(0.96 * np.eye(4)[labels] + 0.01)
    pool = pool_of(log_probs, labels, members)
    costs = np.where([m.variant == "raw" for m in members], 1.0, 2.0)
    costs[fit_method(method, pool, Settings()).used] = 3.0
    fit = fit_within(method, pool, Settings(), Limits(costs[None], np.array([2.0]), max_members=1))
    (used,) = fit.used
    assert members[used].variant != "raw" and costs[used] == 2.0
