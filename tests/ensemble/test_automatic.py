"""`auto`: the method that the cross-fitted loss asks for."""

from __future__ import annotations

import numpy as np
import pytest

from foldrace.ensemble.calibration import choose_calibration, choose_method, methods_to_try
from foldrace.ensemble.methods import METHODS, check_method, fit_method
from foldrace.ensemble.pool import MemberRows, Pool, member_rows
from foldrace.ensemble.pooling import Fit, Settings


@pytest.fixture(scope="module")
def rows() -> MemberRows:
    """Three experts, each sure of a third of the classes alone."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 600)
    logits = [
        np.where(np.arange(6) // 2 == expert, 3.0, 0.3) * np.eye(6)[labels]
        + rng.normal(size=(600, 6))
        for expert in range(3)
    ]
    log_probs = [z - np.log(np.exp(z).sum(axis=1, keepdims=True)) for z in logits]
    return member_rows(log_probs, labels, np.arange(600) % 3)


def fit(method: str, pool: Pool) -> Fit:
    return fit_method(method, pool, Settings())


def test_the_least_cross_fitted_loss_wins(rows: MemberRows) -> None:
    alone = {
        method: choose_calibration(rows, lambda pool, m=method: fit(m, pool)).crossfit.loss
        for method in ("greedy", "geometric", "stacking")
    }
    chosen = choose_method(rows, methods_to_try("auto"), fit)
    assert {t.method: t.crossfit_logloss for t in chosen.tried} == alone
    assert chosen.method == min(alone, key=lambda method: alone[method])
    assert chosen.calibration.crossfit.loss == min(alone.values())


def test_a_named_method_is_not_a_choice(rows: MemberRows) -> None:
    chosen = choose_method(rows, methods_to_try("optimal"), fit)
    assert (chosen.method, chosen.tried) == ("optimal", ())


def test_auto_is_a_name_and_tries_methods_of_the_table() -> None:
    assert check_method("auto") is None
    assert methods_to_try("auto") == ("greedy", "geometric", "stacking")
    assert set(methods_to_try("auto")) < METHODS.keys()
    problem = check_method("autos")
    assert problem is not None and "did you mean 'auto'?" in str(problem)
