"""Limits of members, time and bytes: supports, their trade-off, any method within them."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from foldrace.ensemble import limits as support_search
from foldrace.ensemble.bounded import VISIBLE, fit_on, fit_within, supports_by_price, trade_off
from foldrace.ensemble.limits import Limits, choose_support
from foldrace.ensemble.methods import METHODS, fit_method
from foldrace.ensemble.pool import Pool
from foldrace.ensemble.pooling import Settings, blend_prob, pool_terms
from foldrace.ensemble.solvers.active_set import settle
from foldrace.ensemble.solvers.kernels import certified
from foldrace.ensemble.solvers.optimal import optimal
from tests.ensemble.member_pools import made_up, of_variants, pool_of


def members(seed: int, m: int, n: int = 300) -> NDArray[np.float64]:
    """(m, n) true-class probabilities of members that are each good at other rows."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(1.0, 1.0, n) + rng.normal(0.0, 1.5, (m, n)) + rng.normal(0, 0.4, (m, 1))
    return 1.0 / (1.0 + np.exp(-logits))


def least_loss(true_prob: NDArray[np.float64]) -> float:
    return optimal(true_prob, tolerance=1e-9).loss


def all_supports(limits: Limits, m: int) -> list[tuple[int, ...]]:
    sizes = range(1, m + 1)
    return [s for k in sizes for s in combinations(range(m), k) if limits.admit(s)]


def test_close_to_the_best_of_all_supports_and_never_beyond_the_limits() -> None:
    regrets = []
    for seed in range(25):
        rng = np.random.default_rng(1000 + seed)
        t = members(seed, 8)
        costs = rng.uniform(0.5, 5.0, (2, 8))
        limits = Limits(costs, costs.sum(axis=1) * rng.uniform(0.2, 0.5, 2), max_members=4)
        feasible = all_supports(limits, 8)
        if not feasible:
            continue
        support = tuple(choose_support(t, limits).tolist())
        assert limits.admit(support)
        best = min(least_loss(t[list(s)]) for s in feasible)
        regrets.append(least_loss(t[list(support)]) - best)
    assert len(regrets) >= 20
    assert max(regrets) < 1e-3
    assert np.mean(np.array(regrets) < 1e-9) >= 0.9


def test_without_a_limit_the_support_is_that_of_the_optimum() -> None:
    t = members(3, 12)
    support = choose_support(t, Limits(np.zeros((0, 12)), np.zeros(0)))
    assert least_loss(t[support]) == pytest.approx(least_loss(t), abs=1e-6)


def test_forced_members_are_in_and_fill_the_limit() -> None:
    t = members(5, 6)
    t[4] = 0.05  # nobody would choose it
    limits = Limits(np.ones((1, 6)), np.array([3.0]))
    support = choose_support(t, limits, forced=(4,))
    assert 4 in support
    others = min(least_loss(t[[4, *pair]]) for pair in combinations([0, 1, 2, 3, 5], 2))
    assert least_loss(t[support]) == pytest.approx(others, abs=1e-6)


def test_two_cheap_members_beat_a_dear_one() -> None:
    t = members(7, 3, n=4000)
    t[0] = t[1:].mean(axis=0) * 0.999  # as good as both others together, at a higher price
    limits = Limits(np.array([[10.0, 3.0, 3.0]]), np.array([6.0]))
    assert choose_support(t, limits).tolist() == [1, 2]


def test_more_members_than_the_shortlist() -> None:
    t = members(11, 400, n=120)
    limits = Limits(np.linspace(1.0, 9.0, 400)[None], np.array([12.0]))
    support = choose_support(t, limits)
    assert limits.admit(tuple(support.tolist()))
    fitting = np.flatnonzero(limits.costs[0] <= 12.0)
    assert least_loss(t[support]) < min(least_loss(t[[m]]) for m in fitting)


def test_what_cannot_fit_is_told() -> None:
    t = members(1, 3)
    limits = Limits(np.array([[4.0, 5.0, 6.0]]), np.array([3.0]))
    with pytest.raises(ValueError, match="no member is within the limits"):
        choose_support(t, limits)
    with pytest.raises(ValueError, match="must enter"):
        choose_support(t, limits.within(0, 8.0), forced=(0, 1))


@pytest.mark.parametrize("case", ["zeros", "copies", "all wrong", "all right", "one row"])
@pytest.mark.parametrize("forced", [(), (1, 3)])
def test_odd_members(case: str, forced: tuple[int, ...]) -> None:
    t = members(8, 7, n=1 if case == "one row" else 60)
    if case == "zeros":
        t[np.random.default_rng(0).random(t.shape) < 0.3] = 0.0
    if case == "copies":
        t = t[[0, 1, 0, 1, 0, 2, 2]]
    if case.startswith("all"):
        t[:] = case == "all right"
    for most in (2, 3, 7):
        support = tuple(choose_support(t, Limits(np.ones((0, 7)), np.ones(0), most), forced))
        assert 1 <= len(support) <= most and set(forced) <= set(support)


def test_forced_members_may_leave_no_room() -> None:
    t = members(5, 6)
    limits = Limits(np.ones((1, 6)), np.array([2.0]))
    assert choose_support(t, limits, forced=(0, 4)).tolist() == [0, 4]


def test_one_solve_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Solves are what the search takes its time for, many more if each member that could leave were
    left out in turn."""
    solved = []

    def counted(*given: Any) -> NDArray[np.float64]:
        solved.append(given)
        return settle(*given)

    monkeypatch.setattr(support_search, "settle", counted)
    costs = np.random.default_rng(0).uniform(1, 5, (1, 60))
    choose_support(members(1, 60, 500), Limits(costs, np.array([15.0])))
    assert 0 < len(solved) <= 40


def test_the_trade_off_rises_in_price_and_falls_in_loss() -> None:
    t = members(2, 9)
    limits = Limits(np.random.default_rng(0).uniform(1, 4, (1, 9)), np.array([np.inf]))
    points = trade_off(t, limits, 0)
    prices = [p.budget for p in points]
    losses = [least_loss(t[p.support]) for p in points]
    assert len(points) >= 3
    assert prices == sorted(prices) and losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(least_loss(t), abs=1e-6)
    assert all(b < a * (1 - VISIBLE) for a, b in pairwise(losses))


def test_each_point_is_close_to_the_best_at_its_price() -> None:
    regrets = []
    for seed in range(6):
        t = members(20 + seed, 7)
        costs = np.random.default_rng(seed).uniform(1, 4, (1, 7))
        points = trade_off(t, Limits(costs, np.array([np.inf])), 0)
        for point in points:
            feasible = all_supports(Limits(costs, np.array([point.budget])), 7)
            best = min(least_loss(t[list(support)]) for support in feasible)
            regrets.append(least_loss(t[point.support]) - best)
    assert max(regrets) < 1e-3
    assert np.mean(np.array(regrets) < 1e-9) >= 0.9


def test_forced_members_and_other_limits_hold_at_every_point() -> None:
    t = members(9, 8)
    costs = np.random.default_rng(9).uniform(1, 4, (2, 8))
    limits = Limits(costs, np.array([np.inf, 9.0]), max_members=4)
    points = trade_off(t, limits, 0, forced=(2,))
    assert len(points) >= 2
    assert all(2 in point.support for point in points)
    assert all(limits.admit(tuple(point.support.tolist())) for point in points)
    assert all(costs[0, p.support].sum() == pytest.approx(p.budget) for p in points)


def test_what_is_not_visibly_better_is_left_out() -> None:
    t = members(3, 2)
    t[1] = np.minimum(t[0] * (1 + 2e-5), 1.0)  # better by 2e-5 nats, at twice the price
    limits = Limits(np.array([[1.0, 2.0]]), np.array([np.inf]))
    assert [point.support.tolist() for point in trade_off(t, limits, 0)] == [[0]]


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
