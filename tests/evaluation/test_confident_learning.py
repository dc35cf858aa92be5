"""Confident learning against cleanlab, and against errors that are known."""

from __future__ import annotations

import cleanlab.count
import numpy as np
import pytest
from numpy.typing import NDArray

from foldrace.evaluation.confident_learning import (
    calibrated_joint,
    confident_classes,
    confident_counts,
    counter_thresholds,
    estimate_noise,
    thresholds,
)


def planted(
    seed: int, n: int = 600, n_classes: int = 5, share: float = 0.08, spread: float = 0.6
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.bool_]]:
    """Probabilities that know the true class, labels of which a share is another class."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, n_classes, n)
    wrong = rng.random(n) < share
    labels = np.where(wrong, (true + rng.integers(1, n_classes, n)) % n_classes, true)
    logits = 2.5 * np.eye(n_classes)[true] + spread * rng.normal(size=(n, n_classes))
    prob = np.exp(logits)
    return prob / prob.sum(axis=1, keepdims=True), labels, wrong


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spread", [0.3, 1.0])
def test_as_cleanlab_has_it(seed: int, spread: float) -> None:
    prob, labels, _ = planted(seed, spread=spread)
    # Where two thresholds are reached cleanlab takes the most probable class even if it is
    # neither of the two; the paper takes the more probable of these.
    limits = thresholds(prob, labels)
    above = prob >= limits - 1e-6
    same = (above.sum(axis=1) < 2) | above[np.arange(len(prob)), prob.argmax(axis=1)]
    assert same.mean() > 0.95
    np.testing.assert_allclose(limits, cleanlab.count.get_confident_thresholds(labels, prob))
    if same.all():
        theirs = cleanlab.count.compute_confident_joint(labels, prob, calibrate=False)
        np.testing.assert_array_equal(confident_counts(prob, labels), theirs)
        joint = cleanlab.count.estimate_joint(labels, prob)
        ours = estimate_noise(prob, labels)
        np.testing.assert_allclose(ours.joint, joint, atol=0.01)  # cleanlab rounds to whole rows


def test_suspects_by_hand() -> None:
    prob = np.array([[0.9, 0.1], [0.05, 0.95], [0.4, 0.6], [0.1, 0.9], [0.2, 0.8]])
    labels = np.array([0, 0, 0, 1, 1])
    np.testing.assert_allclose(counter_thresholds(prob, labels), [0.15, (0.1 + 0.95 + 0.6) / 3])
    found = estimate_noise(prob, labels)
    assert found.suspects.tolist() == [1]  # row 2 is predicted as 1, but 0.4 speaks for its label
    assert found.suggested.tolist() == [1, 1, 1, 0, 0]


def test_a_matrix_by_hand() -> None:
    counts = np.array([[8, 2], [0, 5]])
    joint = calibrated_joint(counts, np.array([20, 10]))
    np.testing.assert_allclose(joint, np.array([[16, 4], [0, 10]]) / 30)


def test_confident_is_who_reaches_a_threshold() -> None:
    prob = np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.45, 0.55]])
    labels = np.array([0, 0, 1, 1])
    np.testing.assert_allclose(thresholds(prob, labels), [0.75, 0.625])
    assert confident_classes(prob, labels).tolist() == [0, -1, 1, -1]


def test_planted_errors_come_first() -> None:
    prob, labels, wrong = planted(0, spread=0.5)
    found = estimate_noise(prob, labels)
    assert found.off_diagonal == pytest.approx(wrong.mean(), abs=0.03)
    hits = wrong[found.suspects]
    assert hits.mean() > 0.95 and hits.sum() > 0.75 * wrong.sum()
    assert hits[: len(hits) // 2].mean() >= hits.mean()


def test_right_labels_have_few_suspects() -> None:
    prob, labels, _ = planted(1, share=0.0, spread=0.3)
    found = estimate_noise(prob, labels)
    assert len(found.suspects) == 0 and found.off_diagonal < 0.01


def test_a_class_without_rows() -> None:
    prob, labels, _ = planted(2, n_classes=4)
    wide = np.column_stack([prob, np.full(len(prob), 1e-9)])
    found = estimate_noise(wide, labels)
    assert np.isfinite(found.joint).all() and found.joint[4].sum() == 0.0
    np.testing.assert_array_equal(found.suspects, estimate_noise(prob, labels).suspects)
