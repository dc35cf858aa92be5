"""The contract of every kind of class weights, scikit-learn's, and the paper's formula."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from foldrace.trainables.losses import (
    CLASS_WEIGHTS,
    ClassWeights,
    class_weights,
)

COUNTS = np.array([50, 1, 7, 1000])

each_row = pytest.mark.parametrize("row", CLASS_WEIGHTS.values(), ids=CLASS_WEIGHTS)


@each_row
def test_one_on_average_over_the_training_rows(row: ClassWeights) -> None:
    weights = class_weights(row.name, COUNTS, 0.99)
    assert np.average(weights, weights=COUNTS) == pytest.approx(1.0)
    assert (weights > 0).all()


@each_row
def test_rarer_classes_never_count_less(row: ClassWeights) -> None:
    by_count = class_weights(row.name, COUNTS, 0.99)[np.argsort(COUNTS)]
    assert (np.diff(by_count) <= 0).all()


@each_row
def test_a_class_without_rows_changes_no_other(row: ClassWeights) -> None:
    with_gap = class_weights(row.name, np.array([50, 0, 1, 7, 1000]), 0.99)
    assert with_gap[1] == 1.0
    np.testing.assert_allclose(np.delete(with_gap, 1), class_weights(row.name, COUNTS, 0.99))


@each_row
def test_is_documented_under_its_name(row: ClassWeights) -> None:
    assert CLASS_WEIGHTS[row.name] is row and row.doc


def test_none_is_one() -> None:
    np.testing.assert_array_equal(class_weights("none", COUNTS, 0.999), np.ones(4))


def test_balanced_is_scikit_learns() -> None:
    labels = np.repeat(np.arange(4), COUNTS)
    expected = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    np.testing.assert_allclose(class_weights("balanced", COUNTS, 0.999), expected)


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.9999])
def test_effective_is_the_papers_formula(beta: float) -> None:
    raw = np.array([(1 - beta) / (1 - beta ** int(n)) for n in COUNTS])
    found = class_weights("effective", COUNTS, beta)
    np.testing.assert_allclose(found / found[0], raw / raw[0], rtol=1e-9)


def test_effective_goes_from_none_to_balanced() -> None:
    np.testing.assert_allclose(class_weights("effective", COUNTS, 0.0), np.ones(4))
    near_one = class_weights("effective", COUNTS, 0.999999)
    np.testing.assert_allclose(near_one, class_weights("balanced", COUNTS, 0.0), rtol=1e-3)
