"""Members held in memory, the sides of a split, and the parts of the cross-fitting."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import log_softmax

from foldrace.core.temperature import fit_temperature
from foldrace.ensemble.pool import Member, cross_fit_parts, member_rows

ROWS, CLASSES = 90, 4


@pytest.fixture(scope="module")
def arrays() -> tuple[list[NDArray[np.float64]], NDArray[np.int64], NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=2.0, size=(ROWS, CLASSES))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    members = [log_softmax(s * logits + rng.normal(size=logits.shape), axis=1) for s in (1, 2, 3)]
    return members, labels, rng.permutation(np.arange(ROWS) % 3)


def test_columns_are_softmaxes_at_the_fitted_temperatures(arrays: Any) -> None:
    log_probs, labels, folds = arrays
    rows = member_rows(log_probs, labels, folds)
    at = np.arange(ROWS), labels
    assert rows.members == (Member("m0000"), Member("m0001"), Member("m0002"))
    assert (rows.n_parts, rows.n_classes) == (3, CLASSES)
    assert rows.calibrated.shape == (4, 3, ROWS)
    for m, log_prob in enumerate(log_probs):
        np.testing.assert_allclose(rows.raw[m], np.exp(log_prob[at]), atol=1e-6)
        np.testing.assert_array_equal(rows.read(m), log_prob.astype(np.float32))
        for index, side in enumerate([folds >= 0, folds != 0, folds != 1, folds != 2]):
            temperature = fit_temperature(log_prob[side], labels[side])
            assert rows.temperatures[index, m] == pytest.approx(temperature, rel=1e-3)
            expected = np.exp(log_softmax(log_prob / temperature, axis=1)[at])
            np.testing.assert_allclose(rows.calibrated[index, m], expected, atol=1e-3)


@pytest.mark.parametrize("calibrated", [False, True])
def test_training_rows_and_the_whole_have_the_temperatures_fitted_outside(
    arrays: Any, calibrated: bool
) -> None:
    log_probs, labels, folds = arrays
    rows = member_rows(log_probs, labels, folds)
    train, whole = rows.training(1, calibrated), rows.scored(1, calibrated)
    for pool, side in ((train, folds != 1), (whole, folds >= 0)):
        np.testing.assert_array_equal(pool.labels, labels[side])
        for m, log_prob in enumerate(log_probs):
            temperature = rows.temperatures[2, m] if calibrated else 1.0
            expected = log_softmax(log_prob[side] / temperature, axis=1)
            np.testing.assert_allclose(pool.log_prob(m), expected, atol=1e-4)
            true = np.exp(expected[np.arange(side.sum()), labels[side]])
            np.testing.assert_allclose(pool.true_prob[m], true, atol=1e-5)


def test_taking_members(arrays: Any) -> None:
    log_probs, labels, folds = arrays
    names = [Member("a"), Member("b", "ema"), Member("c")]
    pool = member_rows(log_probs, labels, folds, names).pool(calibrated=True)
    taken = pool.take(np.array([2, 0]))
    order = [log_probs[2], log_probs[0]]
    alone = member_rows(order, labels, folds, [names[2], names[0]]).pool(calibrated=True)
    assert taken.members == alone.members
    np.testing.assert_array_equal(taken.true_prob, alone.true_prob)
    np.testing.assert_array_equal(taken.log_prob(1), alone.log_prob(1))


def test_the_rows_of_a_member_stay_adjacent(arrays: Any, tmp_path: Path) -> None:
    """Memory-mapped or not; a pass over one member would read them all otherwise."""
    log_probs, labels, folds = arrays
    rows = member_rows(log_probs, labels, folds)
    for name in ("raw", "calibrated"):
        np.save(tmp_path / f"{name}.npy", getattr(rows, name))
    mapped = replace(
        rows,
        raw=np.load(tmp_path / "raw.npy", mmap_mode="r"),
        calibrated=np.load(tmp_path / "calibrated.npy", mmap_mode="r"),
    )
    for calibrated in (False, True):
        outside = [of.training(1, calibrated).true_prob for of in (rows, mapped)]
        assert all(true_prob.flags.c_contiguous for true_prob in outside)
        np.testing.assert_array_equal(*outside)


def test_zeros_are_members_too() -> None:
    certain = np.array([[0.0, -np.inf], [-np.inf, 0.0], [0.0, -np.inf], [0.0, -np.inf]])
    rows = member_rows([certain.astype(np.float16)], [0, 1, 1, 0], [0, 0, 1, 1])
    np.testing.assert_allclose(rows.raw, [[1, 1, 1e-15, 1]], rtol=1e-4)
    assert np.isfinite(rows.calibrated).all()


def test_parts_are_the_folds_in_ascending_order() -> None:
    np.testing.assert_array_equal(cross_fit_parts([7, 3, 3, 9]), [1, 0, 0, 2])


@pytest.mark.parametrize(("rows", "counts"), [(52, [11, 11, 10, 10, 10]), (3, [1, 1, 1])])
def test_one_fold_is_split_into_at_most_five_fixed_parts(rows: int, counts: list[int]) -> None:
    parts = cross_fit_parts(np.zeros(rows, int))
    assert np.bincount(parts).tolist() == counts
    np.testing.assert_array_equal(parts, cross_fit_parts(np.full(rows, 4)))


GOOD = np.log(np.full((4, 2), 0.5))
NAN = np.array([[0.0, -1.0], [-1.0, math.nan], [0.0, 0.0], [0.0, 0.0]])


@pytest.mark.parametrize(
    ("log_probs", "labels", "folds", "message"),
    [
        ([], [0, 1, 0, 1], [0, 0, 1, 1], r"have shapes \[\], should all have one, \(4, classes\)"),
        ([GOOD, GOOD[:3]], [0, 1, 0, 1], [0, 0, 1, 1], r"shapes \[\(3, 2\), \(4, 2\)\]"),
        ([GOOD[0]], [0, 1], [0, 1], r"shapes \[\(2,\)\]"),
        ([GOOD], [0, 1, 2, 1], [0, 0, 1, 1], "row 2: the label is 2, should be 0 to 1"),
        ([GOOD], [0.0, 1.0, 0.0, 1.0], [0, 0, 1, 1], "type float64, should be .* an integer type"),
        ([GOOD], [0, 1, 0, 1], [0, 0, 1], r"labels have shape \(4,\) .* should be \(3,\)"),
        ([GOOD], [0, 1, 0, 1], [0.0, 0.0, 1.0, 1.0], "folds have the type float64"),
        ([GOOD, NAN], [0, 1, 0, 1], [0, 0, 1, 1], "member 1, row 1: nan is not the logarithm"),
        ([-GOOD], [0, 1, 0, 1], [0, 0, 1, 1], "member 0, row 0: 0.69.* is not the logarithm"),
    ],
)
def test_wrong_input_is_named(log_probs: Any, labels: Any, folds: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        member_rows(log_probs, labels, folds)


def test_as_many_names_as_members() -> None:
    with pytest.raises(ValueError, match="2 members are named, should be 1"):
        member_rows([GOOD], [0, 1, 0, 1], [0, 0, 1, 1], [Member("a"), Member("b")])
