"""Temperatures and method by the cross-fitted loss, and the reliability diagram."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import log_softmax

from foldrace.core.metrics import log_loss
from foldrace.core.temperature import at_temperature
from foldrace.ensemble.calibration import (
    choose_calibration,
    choose_method,
    final_fit,
    methods_to_try,
    reliability,
)
from foldrace.ensemble.crossfit import crossfit_rows
from foldrace.ensemble.methods import METHODS, check_method, fit_method
from foldrace.ensemble.pool import MemberRows, Pool, member_rows
from foldrace.ensemble.pooling import Fit, Settings, mixture_fit
from foldrace.ensemble.solvers.greedy import greedy
from foldrace.ensemble.solvers.kernels import certified

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


def two_classes(said: float, rows: int) -> MemberRows:
    """Two members, all of whose rows say `said`; 80% are right in every one of five parts."""
    log_prob = np.tile(np.log([said, 1 - said]), (rows, 1))
    labels = (np.arange(rows) % 5 == 0).astype(np.int64)
    return member_rows([log_prob, log_prob], labels, np.arange(rows) // (rows // 5))


def divergence(right: float, said: float) -> float:
    """Kullback-Leibler, nats, of two classes."""
    return float(right * np.log(right / said) + (1 - right) * np.log((1 - right) / (1 - said)))


def fitted_share(right: float, rows: int) -> float:
    """What the best temperature says of `rows` equal rows: one row's worth of targets is wrong."""
    return (right * rows + 1 - right) / (rows + 1)


def test_of_equal_losses_the_fewest_temperatures_are_kept() -> None:
    # Each part's temperature, fitted on 40 rows, says what the members say: it changes nothing.
    choice = choose_calibration(two_classes(fitted_share(0.8, 40), 50), uniform_fit)
    assert (choice.members, choice.blend) == (False, False)
    losses = [trial.crossfit_logloss for trial in choice.record.tried]
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-6)


@pytest.mark.parametrize(
    ("said", "rows", "kept"),
    [(0.8011, 5000, False), (0.804, 5000, True), (0.8142, 50, False), (0.8147, 50, True)],
)
def test_a_temperature_that_nobody_would_notice_is_not_kept(
    said: float, rows: int, kept: bool
) -> None:
    # A temperature gains the divergence from what was said, and loses that from what it says.
    choice = choose_calibration(two_classes(said, rows), uniform_fit)
    losses = [trial.crossfit_logloss for trial in choice.record.tried]
    expected = divergence(0.8, said) - divergence(0.8, fitted_share(0.8, rows * 4 // 5))
    assert losses[0] - losses[1] == pytest.approx(expected, abs=5e-7)
    assert (expected > 1e-5) == kept
    assert choice.blend == kept and not choice.members


def test_a_temperature_of_few_rows_is_not_kept_for_honest_members() -> None:
    # What one further row takes from 40 costs more than nothing is to gain.
    choice = choose_calibration(two_classes(0.8, 50), uniform_fit)
    assert (choice.members, choice.blend) == (False, False)
    losses = [trial.crossfit_logloss for trial in choice.record.tried]
    assert losses[1] - losses[0] == pytest.approx(divergence(0.8, fitted_share(0.8, 40)), abs=5e-7)


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


def test_auto_is_chosen_by_the_definition_on_all_rows_and_scored_on_others(
    rows: MemberRows,
) -> None:
    """Another method than `geometric` only where it is better by a standard error, paired."""
    names = ("greedy", "geometric", "stacking")
    alone = {m: choose_calibration(rows, lambda pool, m=m: fit(m, pool)) for m in names}
    losses = {
        m: {kind: -np.log(found.true_prob) for kind, found in choice.tried.items()}
        for m, choice in alone.items()
    }

    def chosen_by(seen: NDArray[np.bool_]) -> tuple[str, tuple[bool, bool]]:
        kinds = {m: min(of, key=lambda kind: of[kind][seen].mean()) for m, of in losses.items()}
        columns = {m: losses[m][kinds[m]][seen] for m in names}
        best = "geometric"
        for method in names:
            change = columns["geometric"] - columns[method]
            if change.mean() > change.std(ddof=1) / np.sqrt(len(change)):
                best = min(best, method, key=lambda m: columns[m].mean())
        return best, kinds[best]

    found = choose_method(rows, methods_to_try("auto"), fit)
    assert {t.method: t.crossfit_logloss for t in found.tried} == {
        m: choice.crossfit.loss for m, choice in alone.items()
    }
    assert found.method == chosen_by(np.ones(len(rows.labels), dtype=bool))[0]
    expected = np.empty(len(rows.labels))
    for part in range(rows.n_parts):
        held = rows.parts == part
        method, kind = chosen_by(~held)
        expected[held] = losses[method][kind][held]
    assert found.crossfit.loss == pytest.approx(expected.mean(), abs=1e-12)
    assert found.crossfit.se == pytest.approx(expected.std(ddof=1) / np.sqrt(600), abs=1e-12)


def test_a_method_that_is_better_by_chance_is_not_taken() -> None:
    """Of equally good methods the least loss would be another one each time."""
    rng, taken, optimism = np.random.default_rng(1), [], []
    for _ in range(40):
        labels = rng.integers(0, 2, 60)
        right = rng.uniform(0.5, 0.9, (3, 60))
        log_probs = [
            np.log(np.where(np.eye(2)[labels] == 1, p[:, None], 1 - p[:, None])) for p in right
        ]
        of = member_rows(log_probs, labels, np.arange(60) % 5)

        def one(name: str, pool: Pool) -> Fit:
            """The method is a member."""
            place = ("greedy", "geometric", "stacking").index(name)
            return mixture_fit(certified(pool.true_prob, np.eye(3)[place]))

        found = choose_method(of, methods_to_try("auto"), one, calibrate=False)
        taken.append(found.method)
        least = min(t.crossfit_logloss for t in found.tried)
        every = np.mean([t.crossfit_logloss for t in found.tried])
        optimism.append((least - every, found.crossfit.loss - every))
    assert taken.count("geometric") > 20
    naive, honest = np.mean(optimism, axis=0)
    spread = np.std(optimism, axis=0, ddof=1) / np.sqrt(40)
    assert naive < -5 * spread[0] and abs(honest) < 3 * spread[1]


def test_a_named_method_is_not_a_choice(rows: MemberRows) -> None:
    chosen = choose_method(rows, methods_to_try("optimal"), fit)
    assert (chosen.method, chosen.tried) == ("optimal", ())


def test_auto_is_a_name_and_tries_methods_of_the_table() -> None:
    assert check_method("auto") is None
    assert methods_to_try("auto") == ("greedy", "geometric", "stacking")
    assert set(methods_to_try("auto")) < METHODS.keys()
    problem = check_method("autos")
    assert problem is not None and "did you mean 'auto'?" in str(problem)


@pytest.mark.parametrize(("rows", "bins"), [(1, 15), (10, 3), (2000, 15), (500, 1)])
def test_equals_a_plain_loop(rows: int, bins: int) -> None:
    rng = np.random.default_rng(rows)
    confidence = rng.uniform(0.1, 1.0, size=rows)
    hits = rng.uniform(size=rows) < confidence**2
    got, ece = reliability(confidence, hits, bins), 0.0
    assert len(got.bins) == bins
    for b, filled in enumerate(got.bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        assert filled.rows == inside.sum()
        if inside.any():
            assert filled.confidence == pytest.approx(confidence[inside].mean())
            assert filled.accuracy == pytest.approx(hits[inside].mean())
            ece += inside.mean() * abs(hits[inside].mean() - confidence[inside].mean())
    assert got.ece == pytest.approx(ece)


def test_confidence_that_is_the_accuracy_has_no_error() -> None:
    confidence = np.repeat([0.25, 0.5, 0.75], 100)
    hits = np.tile(np.arange(100), 3) < 100 * confidence
    assert reliability(confidence, hits).ece == pytest.approx(0.0)
    assert reliability(confidence, ~hits).ece == pytest.approx((0.5 + 0.0 + 0.5) / 3)


def test_overconfidence_is_the_error() -> None:
    got = reliability(np.full(10, 0.9), np.arange(10) < 6)
    assert got.ece == pytest.approx(0.3)
    assert got.bins[13].rows == 10


def test_edges_belong_to_the_lower_bin_and_all_rows_count() -> None:
    got = reliability(np.array([0.0, 0.5, 0.75, 1.0], np.float32), np.ones(4, bool), bins=4)
    assert [filled.rows for filled in got.bins] == [1, 1, 1, 1]
    assert got.bins[0].confidence == 0.0


def test_a_bin_without_rows_has_its_middle() -> None:
    empty = reliability(np.array([0.9]), np.array([True]), bins=2).bins[0]
    assert (empty.rows, empty.confidence, empty.accuracy) == (0, 0.25, 0.0)
