"""The score and the classification metrics, against scikit-learn and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn import metrics as sk

from foldrace.core import metrics
from foldrace.core.standard_errors import all_metrics


def _softmax_rows(n: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    prob = rng.dirichlet(np.full(classes, 0.3), size=n)
    return prob, rng.integers(0, classes, size=n)


def test_normalise_renormalises_then_clips() -> None:
    out = metrics.normalise([[1.0, 3.0], [0.0, 2.0]])
    assert out.tolist() == [[0.25, 0.75], [1e-15, 1.0]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_normalise_is_float64_and_leaves_its_input(dtype: type) -> None:
    prob = np.array([[0.5, 0.53], [0.0, 1.0]], dtype=dtype)
    before = prob.copy()
    out = metrics.normalise(prob)
    assert out.dtype == np.float64
    np.testing.assert_allclose(out.sum(axis=1), 1.0, atol=1e-12)
    np.testing.assert_array_equal(prob, before)


def test_true_class_probability_is_the_label_column_of_normalise() -> None:
    prob, labels = _softmax_rows(300, 7)
    prob *= np.random.default_rng(1).uniform(0.5, 2.0, size=(300, 1))
    expected = metrics.normalise(prob)[np.arange(300), labels]
    np.testing.assert_array_equal(metrics.true_class_probability(prob, labels), expected)


def test_a_row_that_sums_to_1_03_gains_nothing() -> None:
    honest, labels = _softmax_rows(200, 5)
    assert metrics.log_loss(honest * 1.03, labels) == pytest.approx(
        metrics.log_loss(honest, labels), abs=1e-14
    )


@pytest.mark.parametrize("seed", range(5))
def test_log_loss_agrees_with_scikit_learn(seed: int) -> None:
    prob, labels = _softmax_rows(500, 9, seed)
    prob = np.maximum(prob, 1e-12)
    prob /= prob.sum(axis=1, keepdims=True)
    expected = sk.log_loss(labels, prob, labels=np.arange(9))
    assert metrics.log_loss(prob, labels) == pytest.approx(expected, abs=1e-12)


def test_scikit_learn_clips_a_zero_elsewhere_and_ours_does_not_depend_on_the_dtype() -> None:
    for dtype in (np.float16, np.float32, np.float64):
        prob = np.array([[0.0, 1.0], [1.0, 0.0]], dtype=dtype)
        assert metrics.log_loss(prob, [0, 0]) == pytest.approx(-math.log(1e-15) / 2, abs=1e-12)


def test_log_loss_of_chance_is_log_c() -> None:
    assert metrics.log_loss(np.full((6, 4), 0.25), [0, 1, 2, 3, 0, 1]) == pytest.approx(math.log(4))


def test_the_loss_is_pooled_over_rows() -> None:
    folds = [np.array([0.5]), np.array([0.25, 0.25, 0.125])]
    pooled = metrics.log_loss_of_true(np.concatenate(folds))
    assert pooled == pytest.approx(8 / 4 * math.log(2))
    assert pooled != pytest.approx(np.mean([metrics.log_loss_of_true(f) for f in folds]))


def test_a_perfect_row_costs_nothing_and_rounding_above_one_is_clipped() -> None:
    assert metrics.log_loss_of_true([1.0, np.float32(1.0000001)]) == 0.0


def test_row_losses_are_the_terms_of_the_score() -> None:
    true = np.array([1.0, 0.5, 0.0])
    np.testing.assert_allclose(metrics.row_losses(true), [0.0, math.log(2), -math.log(1e-15)])


@pytest.mark.parametrize("seed", range(4))
def test_classification_metrics_agree_with_scikit_learn(seed: int) -> None:
    prob, labels = _softmax_rows(120, 6, seed)
    labels[labels == 5] = 0  # a class that occurs only in predictions
    guess = prob.argmax(axis=1)
    every = np.arange(6)
    precision, recall, f1, _ = sk.precision_recall_fscore_support(
        labels, guess, labels=every, zero_division=0
    )
    for predicted in (prob, guess):
        scores = metrics.precision_recall_f1(predicted, labels, 6)
        np.testing.assert_allclose(scores.precision, precision)
        np.testing.assert_allclose(scores.recall, recall)
        np.testing.assert_allclose(scores.f1, f1)
        table = metrics.confusion(predicted, labels, 6)
        assert table.dtype == np.int64
        np.testing.assert_array_equal(table, sk.confusion_matrix(labels, guess, labels=every))
        assert metrics.accuracy(predicted, labels) == sk.accuracy_score(labels, guess)


def test_macro_f1_leaves_out_classes_that_never_occur() -> None:
    labels, guess = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    expected = sk.f1_score(labels, guess, average="macro")
    assert metrics.macro_f1(guess, labels, 40) == pytest.approx(expected)


def test_absent_classes_score_zero() -> None:
    scores = metrics.precision_recall_f1([0, 0], [0, 0], 2)
    assert scores.precision.tolist() == scores.recall.tolist() == scores.f1.tolist() == [1.0, 0.0]


def test_confusion_has_a_row_per_label() -> None:
    assert metrics.confusion([1, 1], [0, 1], 2).tolist() == [[0, 1], [0, 1]]


GOOD = [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize(
    ("prob", "labels", "message"),
    [
        ([[0.5, 0.5], [0.5, math.nan]], [0, 1], "row 1: class 1 has the probability nan"),
        ([[0.5, 0.5], [-0.1, 1.1]], [0, 1], r"row 1: class 0 has the probability -0\.1"),
        ([[math.inf, 0.5]], [0], "row 0: class 0 has the probability inf"),
        ([[0.5, 0.5], [0.0, 0.0]], [0, 1], r"row 1: the probabilities sum to 0\.0"),
        ([0.5, 0.5], [0, 1], r"shape \(2,\), should be \(rows, classes\)"),
        (np.empty((0, 2)), [], r"shape \(0, 2\)"),
        (GOOD, [0, 2], r"row 1: the label is 2, should be in 0\.\.1"),
        (GOOD, [-1, 0], r"row 0: the label is -1, should be in 0\.\.1"),
        (GOOD, [0], r"label: the shape is \(1,\), should be \(2,\)"),
        (GOOD, [0.0, 1.0], "label: the type is float64, should be an integer"),
    ],
)
def test_wrong_input_is_named(prob: object, labels: object, message: str) -> None:
    for function in (metrics.log_loss, metrics.true_class_probability):
        with pytest.raises(ValueError, match=message):
            function(prob, labels)


@pytest.mark.parametrize(
    ("true", "message"),
    [
        ([0.5, math.nan], "row 1: nan is not"),
        ([-0.5, 0.5], r"row 0: -0\.5 is not"),
        ([0.5, 1.03], r"row 1: 1\.03 is not a probability between 0 and 1"),
        ([], r"shape \(0,\)"),
        ([[0.5]], r"shape \(1, 1\)"),
    ],
)
def test_wrong_true_class_probabilities_are_named(true: object, message: str) -> None:
    for function in (metrics.clip_true, metrics.row_losses, metrics.log_loss_of_true):
        with pytest.raises(ValueError, match=message):
            function(true)


def test_wrong_predictions_are_named() -> None:
    with pytest.raises(ValueError, match=r"row 1: the predicted class is 3, should be in 0\.\.2"):
        metrics.confusion([0, 3], [0, 1], 3)
    with pytest.raises(ValueError, match=r"row 0: the predicted class is -1, should be >= 0"):
        metrics.accuracy([-1], [0])
    with pytest.raises(ValueError, match="the probabilities have 2 classes, should be 3"):
        metrics.confusion(GOOD, [0, 1], 3)
    with pytest.raises(ValueError, match=r"row 1: the label is 3"):
        metrics.precision_recall_f1([0, 1], [0, 3], 3)


def test_the_table_is_scikit_learns_arithmetic() -> None:
    rng = np.random.default_rng(7)
    prob, labels = rng.dirichlet(np.ones(4), 50), rng.permutation(np.arange(50) % 4)
    best = prob.argmax(axis=1)
    expected = {
        "log_loss": (sk.log_loss(labels, prob), False),
        "accuracy": (sk.accuracy_score(labels, best), True),
        "macro_f1": (sk.f1_score(labels, best, average="macro"), True),
        "balanced_accuracy": (sk.balanced_accuracy_score(labels, best), True),
        "qwk": (sk.cohen_kappa_score(labels, best, weights="quadratic"), True),
    }
    assert expected.keys() == metrics.METRICS.keys()
    shown = [score.name for score in all_metrics(prob, labels)]
    assert shown == [name for name in expected if name != "qwk"]
    for score in all_metrics(prob, labels, chosen="qwk"):
        value, greater_is_better = expected[score.name]
        assert score.value == pytest.approx(value, rel=1e-12)
        assert score.greater_is_better == greater_is_better
