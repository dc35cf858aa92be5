"""Supports at rising budgets."""

from __future__ import annotations

import numpy as np
import pytest

from ensemble.limits import Limits
from ensemble.trade_off import trade_off
from tests.ensemble.test_limits import least_loss, members


def test_the_trade_off_rises_in_price_and_falls_in_loss() -> None:
    t = members(2, 9)
    limits = Limits(np.random.default_rng(0).uniform(1, 4, (1, 9)), np.array([np.inf]))
    points = trade_off(t, limits, 0)
    prices = [p.budget for p in points]
    losses = [least_loss(t[p.support]) for p in points]
    assert len(points) >= 3
    assert prices == sorted(prices) and losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(least_loss(t), abs=1e-6)
