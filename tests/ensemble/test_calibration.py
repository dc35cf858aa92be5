"""Which temperatures are kept where the truth is known, and what the final fit gives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import log_softmax

from ensemble.calibrate import at_temperature
from ensemble.calibration import choose_calibration, final_fit
from ensemble.certificate import certified
from ensemble.crossfit import crossfit_rows
from ensemble.fit import Fit, mixture_fit
from ensemble.greedy import greedy
from ensemble.pool import MemberRows, Pool, member_rows
from experiment.metrics import log_loss

ROWS, CLASSES = 2000, 6


def greedy_fit(pool: Pool) -> Fit:
    return mixture_fit(greedy(pool.true_prob, max_rounds=10))


def uniform_fit(pool: Pool) -> Fit:
    count = len(pool.members)
    return mixture_fit(certified(pool.true_prob, np.full(count, 1 / count)))


def members_of(sharpness: list[float], noise: float, rows: int = ROWS) -> MemberRows:
    """Members with noise of their own on shared evidence; 1 is the honest sharpness where there is
    no noise."""
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=2.0, size=(rows, CLASSES))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    log_probs = [
        log_softmax(s * (logits + noise * rng.normal(size=logits.shape)), axis=1) for s in sharpness
    ]
    return member_rows(log_probs, labels, np.arange(rows) % 5)


def test_overconfident_members_get_temperatures() -> None:
    rows = members_of([1.0, 3.0, 6.0], noise=1.0)
    choice = choose_calibration(rows, greedy_fit)
    assert choice.members
    assert choice.crossfit.loss < crossfit_rows(rows, greedy_fit, calibrated=False)[0].loss - 0.02
    assert choice.record.after.ece < choice.record.before.ece


def test_a_mean_of_honest_but_different_members_is_sharpened() -> None:
    honest = members_of([0.5] * 8, noise=1.2)
    temperatures = honest.temperatures[0]
    sharpened = [at_temperature(honest.read(m), t) for m, t in enumerate(temperatures)]
    rows = member_rows(sharpened, honest.labels, honest.parts)
    choice = choose_calibration(rows, uniform_fit)
    assert choice.blend
    assert final_fit(rows, uniform_fit, choice)[1] < 0.9


def test_of_equal_losses_the_fewest_temperatures_are_kept() -> None:
    # 80% said and 80% right in every part: no temperature changes anything.
    rows = np.tile(np.log([0.8, 0.2]), (50, 1))
    labels = (np.arange(50) % 5 == 0).astype(np.int64)
    choice = choose_calibration(member_rows([rows, rows], labels, np.arange(50) // 10), uniform_fit)
    assert (choice.members, choice.blend) == (False, False)
    assert len(choice.record.tried) == 4


@pytest.mark.parametrize(("said", "kept"), [(0.8011, False), (0.804, True)])
def test_a_temperature_that_nobody_would_notice_is_not_kept(said: float, kept: bool) -> None:
    # 80% right in every part: a temperature gains the Kullback-Leibler divergence, about
    # (said - 0.8)^2 / 0.32 nats.
    rows = np.tile(np.log([said, 1 - said]), (50, 1))
    labels = (np.arange(50) % 5 == 0).astype(np.int64)
    choice = choose_calibration(member_rows([rows, rows], labels, np.arange(50) // 10), uniform_fit)
    losses = [trial.crossfit_logloss for trial in choice.record.tried]
    expected = 0.8 * np.log(0.8 / said) + 0.2 * np.log(0.2 / (1 - said))
    assert losses[0] - min(losses) == pytest.approx(expected, abs=5e-7)
    assert choice.blend == kept and not choice.members


@pytest.mark.parametrize("sharpness", [0.4, 1.0, 5.0])
def test_what_is_kept_has_the_least_of_the_losses_recorded(sharpness: float) -> None:
    rows = members_of([sharpness] * 3, noise=0.8, rows=200)
    choice = choose_calibration(rows, greedy_fit)
    kept = {(t.members, t.blend): t.crossfit_logloss for t in choice.record.tried}
    assert kept[choice.members, choice.blend] == choice.crossfit.loss
    assert choice.crossfit.loss <= min(kept.values()) + 1e-5
    assert (choice.record.members, choice.record.blend) == (choice.members, choice.blend)
    for calibrated in (False, True):
        for blend, crossfit in enumerate(crossfit_rows(rows, greedy_fit, calibrated)):
            assert kept[calibrated, bool(blend)] == crossfit.loss


def test_switched_off_nothing_is_tried() -> None:
    rows = members_of([5.0, 6.0], noise=1.0, rows=100)
    choice = choose_calibration(rows, greedy_fit, enabled=False)
    assert (choice.members, choice.blend) == (False, False)
    assert [(t.members, t.blend) for t in choice.record.tried] == [(False, False)]
    assert choice.record.before == choice.record.after


@pytest.mark.parametrize("members", [False, True])
@pytest.mark.parametrize("blend", [False, True])
def test_the_final_fit_keeps_what_was_chosen(members: bool, blend: bool) -> None:
    rows = members_of([0.5, 2.0, 4.0], noise=0.7, rows=300)
    choice = replace(choose_calibration(rows, greedy_fit), members=members, blend=blend)
    fit, temperature, prob = final_fit(rows, greedy_fit, choice)
    expected = mixed(rows, fit.combiner.weights, rows.temperatures[0] if members else np.ones(3))
    assert (temperature == 1.0) == (not blend)
    np.testing.assert_allclose(
        prob, np.exp(log_softmax(np.log(expected) / temperature, axis=1)), atol=1e-5
    )
    np.testing.assert_allclose(prob.sum(axis=1), 1.0, atol=1e-5)
    assert prob.dtype == np.float64
    assert log_loss(prob, rows.labels) <= log_loss(expected, rows.labels) + 1e-6


def mixed(
    rows: MemberRows, weights: NDArray[np.float64], temperatures: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(N, C) of a plain loop."""
    probs = [
        weight * np.exp(log_softmax(rows.read(m).astype(np.float64) / temperature, axis=1))
        for m, (weight, temperature) in enumerate(zip(weights, temperatures, strict=True))
    ]
    return np.asarray(np.sum(probs, axis=0))
