"""What members are good for, against another solver and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize

from foldrace.ensemble.crossfit import rise_of_least_loss, rise_of_mixture


def members(seed: int, m: int, n: int = 300) -> NDArray[np.float64]:
    """(m, n) true-class probabilities of members that are each good at other rows."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(1.0, 1.0, n) + rng.normal(0.0, 1.5, (m, n)) + rng.normal(0, 0.4, (m, 1))
    return 1.0 / (1.0 + np.exp(-logits))


def test_leaving_out_agrees_with_another_solver() -> None:
    t = members(4, 4, n=200)

    def reference(columns: NDArray[np.float64]) -> float:
        def loss(z: NDArray[np.float64]) -> float:
            w = np.exp(z - z.max())
            return -float(np.log(w / w.sum() @ columns).mean())

        starts = [np.zeros(len(columns)), *(6 * np.eye(len(columns)))]
        options = {"xatol": 1e-8, "fatol": 1e-12, "maxiter": 8000, "maxfev": 8000}
        return min(minimize(loss, s, method="Nelder-Mead", options=options).fun for s in starts)

    rises = [reference(np.delete(t, m, axis=0)) - reference(t) for m in range(4)]
    np.testing.assert_allclose(
        np.array(rise_of_least_loss(t), dtype=float), np.maximum(rises, 0), atol=2e-6
    )


def test_a_member_without_a_weight_costs_nothing() -> None:
    t = members(6, 3)
    t[2] = 0.5 * t[:2].min(axis=0)
    rises = rise_of_least_loss(t)
    assert rises[2] == 0.0 and min(rises[:2]) > 1e-3  # type: ignore[type-var]
    copies = rise_of_least_loss(np.vstack([t, t[:2]]))
    assert copies == [0.0] * 5


def test_only_the_heaviest_of_many_are_asked() -> None:
    t = np.full((60, 60), 0.1) + 0.8 * np.eye(60)  # each is needed for one row
    rises = rise_of_least_loss(t)
    assert sum(rise is None for rise in rises) == 10
    assert min(rise for rise in rises if rise is not None) > 0.0


def test_the_mean_of_the_others() -> None:
    t = members(8, 5)
    t[3] = 0.01
    rises = rise_of_mixture(t, np.full(5, 0.2))
    losses = [-np.log(np.delete(t, m, axis=0).mean(axis=0)).mean() for m in range(5)]
    np.testing.assert_allclose(rises, losses + np.log(t.mean(axis=0)).mean(), atol=1e-12)
    assert rises[3] < 0.0 < rises[0]


def test_one_member_has_no_others() -> None:
    t = members(6, 1)
    with pytest.raises(ValueError, match="one member"):
        rise_of_least_loss(t)
    with pytest.raises(ValueError, match="one member"):
        rise_of_mixture(t, np.ones(1))
