"""The mean of folds' blends and what is known of its loss, against labelled rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from foldrace.ensemble.fold_mean import fold_mean, loss_of_mean


def folds(k: int, rows: int = 400, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """(K, n, C) log-probabilities that differ, and labels (n,)."""
    rng = np.random.default_rng(k)
    logits = rng.normal(scale=2.0, size=(rows, classes))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    return log_softmax(logits + rng.normal(size=(k, rows, classes)), axis=2), labels


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.8])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_loss_of_the_mean_is_that_of_the_folds_and_log_z(k: int, temperature: float) -> None:
    """Row by row, whatever the labels are."""
    log_probs, labels = folds(k)
    found = fold_mean(iter(log_probs), temperature)
    tempered = log_softmax(log_probs / temperature, axis=2)
    np.testing.assert_allclose(
        found.prob, np.exp(log_softmax(tempered.mean(axis=0), axis=1)), atol=1e-12
    )
    np.testing.assert_allclose(found.log_z, logsumexp(tempered.mean(axis=0), axis=1), atol=1e-12)
    assert (found.log_z <= 0).all() and (k == 1) == (not found.log_z.any())
    rows = np.arange(len(labels))
    for truth in (labels, np.roll(labels, 1)):
        of_folds = -tempered[:, rows, truth].mean(axis=0)
        of_mean = -np.log(found.prob[rows, truth])
        np.testing.assert_allclose(of_mean, of_folds + found.log_z, atol=1e-9)


def test_folds_that_agree_gain_nothing() -> None:
    log_probs, _ = folds(1)
    assert np.abs(fold_mean([log_probs[0]] * 4, 0.7).log_z).max() < 1e-12


def test_two_folds_of_two_classes_in_closed_form() -> None:
    said = np.log([[0.8, 0.2]]), np.log([[0.4, 0.6]])
    z = math.sqrt(0.8 * 0.4) + math.sqrt(0.2 * 0.6)
    found = fold_mean(said)
    assert found.log_z == pytest.approx([math.log(z)])
    assert found.prob == pytest.approx(np.array([[math.sqrt(0.32), math.sqrt(0.12)]]) / z)


def test_the_figure_has_the_errors_of_both_terms() -> None:
    log_z = np.array([-0.2, -0.1, 0.0, -0.3])
    loss, se = loss_of_mean(0.5, 0.03, log_z)
    assert loss == pytest.approx(0.35)
    assert se == pytest.approx(math.hypot(0.03, log_z.std(ddof=1) / 2))
    group = np.array([0, 0, 1, 1])
    of_groups = math.sqrt(2 * (0.0**2 + 0.0**2)) / 4
    assert loss_of_mean(0.5, 0.03, log_z, group)[1] == pytest.approx(math.hypot(0.03, of_groups))
    assert loss_of_mean(0.5, 0.03, np.zeros(7)) == (0.5, 0.03)


def test_it_is_the_loss_of_new_images_without_their_labels() -> None:
    """One fold's loss from some labelled rows, log Z from other ones that have no labels."""
    log_probs, labels = folds(5, rows=40_000)
    rows = np.arange(20_000)
    one_fold = -log_probs[:, rows, labels[rows]].mean(axis=0)
    expected, se = loss_of_mean(
        float(one_fold.mean()),
        float(one_fold.std(ddof=1) / math.sqrt(20_000)),
        fold_mean(log_probs[:, 20_000:]).log_z,
    )
    prob = fold_mean(log_probs[:, 20_000:]).prob
    truth = -np.log(prob[rows, labels[20_000:]])
    assert expected == pytest.approx(truth.mean(), abs=3 * math.hypot(se, truth.std() / 141))
    assert expected < one_fold.mean() - 10 * se


def test_no_fold_is_no_mean() -> None:
    with pytest.raises(ValueError, match="no fold"):
        fold_mean([])
