"""Supports within limits, against the search of all supports."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from foldrace.ensemble import limits as support_search
from foldrace.ensemble.limits import Limits, choose_support
from foldrace.ensemble.solvers.active_set import settle
from foldrace.ensemble.solvers.optimal import optimal


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
