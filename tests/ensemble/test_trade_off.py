"""Supports at rising budgets."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from foldrace.ensemble.bounded import VISIBLE, trade_off
from foldrace.ensemble.limits import Limits
from tests.ensemble.test_limits import all_supports, least_loss, members


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
