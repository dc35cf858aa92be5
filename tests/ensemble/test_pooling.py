"""The four poolings on numbers that can be checked by hand."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from foldrace.ensemble.pooling import (
    ArithmeticMean,
    Combiner,
    GeometricMean,
    Stacking,
    Votes,
    pool_terms,
)

A = np.array([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]])
B = np.array([[0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])


def pooled(combiner: Combiner) -> np.ndarray:
    return pool_terms(combiner, [(0, np.log(A)), (2, np.log(B))])


WEIGHTS = np.array([0.25, 0.0, 0.75])


def test_arithmetic() -> None:
    np.testing.assert_allclose(pooled(ArithmeticMean(WEIGHTS)), 0.25 * A + 0.75 * B)


def test_geometric() -> None:
    product = A**0.25 * B**0.75
    expected = product / product.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(pooled(GeometricMean(WEIGHTS)), expected)


def test_votes() -> None:
    shares = np.array([[0.25, 0.75, 0.0], [0.0, 0.0, 1.0]])
    np.testing.assert_allclose(pooled(Votes(WEIGHTS, 0.3)), 0.7 * shares + 0.1)


def test_a_tied_vote_goes_to_the_lowest_class() -> None:
    tied = np.log([[0.2, 0.4, 0.4]])
    got = pool_terms(Votes(np.ones(1), 0.0), [(0, tied)])
    np.testing.assert_array_equal(got, [[0.0, 1.0, 0.0]])


def stack_of_two() -> Stacking:
    matrix = np.arange(9.0).reshape(3, 3) / 10
    return Stacking(
        WEIGHTS, np.array([0.5, 0.0, 1.5]), matrix[None], np.array([2]), np.array([0.1, 0.0, -0.2])
    )


def centred(prob: np.ndarray) -> np.ndarray:
    logs = np.log(prob)
    return logs - logs.mean(axis=1, keepdims=True)


def test_stacking() -> None:
    combiner = stack_of_two()
    logits = 0.5 * centred(A) + 1.5 * centred(B) + centred(B) @ combiner.matrices[0]
    raised = np.exp(logits + combiner.intercept)
    np.testing.assert_allclose(pooled(combiner), raised / raised.sum(axis=1, keepdims=True))


def test_stacking_keeps_its_matrices_with_their_members() -> None:
    expected = pooled(stack_of_two())
    turned = stack_of_two().take(np.array([2, 0]))
    got = pool_terms(turned, [(1, np.log(A)), (0, np.log(B))])
    np.testing.assert_allclose(got, expected, atol=1e-15)
    without = stack_of_two().take(np.array([0, 1]))
    assert without.matrices.shape == (0, 3, 3)


@pytest.mark.parametrize("combiner", [GeometricMean(WEIGHTS), stack_of_two()])
def test_a_probability_of_zero_is_clipped_like_the_score(combiner: Combiner) -> None:
    with np.errstate(divide="ignore"):
        zero = np.log(np.array([[1.0, 0.0, 0.0]]))
    clipped = np.log(np.array([[1.0, 1e-15, 1e-15]]))
    np.testing.assert_allclose(
        pool_terms(combiner, [(0, zero), (2, zero)]),
        pool_terms(combiner, [(0, clipped), (2, clipped)]),
    )


def test_nothing_to_pool() -> None:
    with pytest.raises(ValueError, match="no member to pool"):
        pool_terms(ArithmeticMean(WEIGHTS), [])


@pytest.mark.parametrize(
    "combiner",
    [ArithmeticMean(WEIGHTS), GeometricMean(WEIGHTS), Votes(WEIGHTS, 0.3), stack_of_two()],
)
def test_rows_are_pooled_block_by_block(combiner: Combiner) -> None:
    """Each as if it were alone, and without copies of all."""
    log_prob = np.log(np.tile(A, (60_000, 1))).astype(np.float32)
    expected = pool_terms(combiner, [(0, log_prob[:2]), (2, log_prob[:2])])
    tracemalloc.start()
    got = pool_terms(combiner, [(0, log_prob), (2, log_prob)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(got, np.tile(expected, (60_000, 1)), rtol=1e-12)
    assert peak < 2 * got.nbytes
