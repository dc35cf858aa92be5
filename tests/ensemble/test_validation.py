"""The integrity gate: each violation is found, and named by trial, row and file."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from foldrace.core.errors import Problem
from foldrace.dataset.folds import FoldTable
from foldrace.ensemble.pool import Member
from foldrace.ensemble.selection.members import OofSource
from foldrace.ensemble.selection.validation import ScoredRows, allowed_sum_error, violations
from tests.conftest import examples

N, CLASSES = 60, ("cat", "dog", "고양이")
FOLD = np.arange(N) % 3
LABELS = np.random.default_rng(0).integers(0, 3, N)


def scored(k: int = 3) -> ScoredRows:
    """k: 1 scores the rows of fold 0 alone."""
    fold = FOLD if k > 1 else np.where(FOLD == 0, 0, -1)
    rows = np.flatnonzero(fold >= 0)
    paths = tuple(f"images/{i}.png" for i in range(N))
    table = FoldTable(paths, tuple(CLASSES[c] for c in LABELS), None, fold, "hash")
    return ScoredRows(rows, LABELS[rows], CLASSES, table)


def sound(rows: NDArray[np.int64] | None = None) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """As a trial stores them: logarithms rounded to float16, true_prob not."""
    chosen = np.arange(N) if rows is None else rows
    prob = np.random.default_rng(1).dirichlet(np.full(3, 0.5), size=N)[chosen]
    prob = np.maximum(prob, 1e-12)
    log_prob = np.log(prob).astype(np.float16).astype(np.float32)
    return log_prob, prob[np.arange(len(prob)), LABELS[chosen]].astype(np.float32)


def source(variant: str = "ema", where: str = "/run/trials/c0003/*/oof_ema.npy") -> OofSource:
    def never() -> NDArray[np.float32]:
        raise AssertionError("the gate takes arrays")

    return OofSource(Member("c0003", variant), where, "", never, never)


def found(
    log_prob: NDArray[np.float32], true_prob: NDArray[np.float32], rows: ScoredRows | None = None
) -> list[Problem]:
    return violations(source(), log_prob, true_prob, rows or scored())


def test_sound_arrays_pass() -> None:
    assert found(*sound()) == []


@pytest.mark.parametrize("n_classes", [2, 10, 396, 1000])
def test_what_float16_logarithms_lose_is_allowed(n_classes: int) -> None:
    """Rows of every confidence, the least certain ones with the largest errors of rounding."""
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(2000, n_classes)) * rng.uniform(0, 20, size=(2000, 1))
    logits[:50] *= 1e-3
    log_prob = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    stored = log_prob.astype(np.float16).astype(np.float64)
    error = np.abs(np.exp(stored).sum(axis=1) - 1).max()
    assert error <= np.log(n_classes) / 2048 * 1.001 + 1e-6  # the bound without the tolerance
    assert error < allowed_sum_error(n_classes) <= 1e-3 + np.log(n_classes) / 2000
    labels = rng.integers(0, n_classes, 2000)
    table = FoldTable(("x",) * 2000, ("x",) * 2000, None, np.zeros(2000, np.int64), "")
    classes = tuple(map(str, range(n_classes)))
    rows = ScoredRows(np.arange(2000), labels, classes, table)
    true = np.exp(log_prob[np.arange(2000), labels]).astype(np.float32)
    assert found(stored.astype(np.float32), np.minimum(true, 1), rows) == []


@settings(max_examples=examples(60), deadline=None)
@given(st.integers(0, N - 1), st.floats(0.5, 1.5))
def test_a_row_is_refused_exactly_when_its_sum_is_beyond_the_tolerance(
    row: int, sum_: float
) -> None:
    prob = np.full((N, 3), 1 / 3)
    prob[row] = np.array([0.2, 0.3, 0.5]) * sum_
    true = prob[np.arange(N), LABELS].astype(np.float32)
    problems = found(np.log(prob).astype(np.float32), true)
    allowed = allowed_sum_error(3)
    if abs(abs(sum_ - 1) - allowed) > 1e-5:
        assert bool(problems) == (abs(sum_ - 1) > allowed)


def spoil_sum(log_prob: NDArray[np.float32], true_prob: NDArray[np.float32]) -> None:
    log_prob[17] += np.log(1.03)


def spoil_nan(log_prob: NDArray[np.float32], true_prob: NDArray[np.float32]) -> None:
    log_prob[17, 2] = np.nan


def spoil_infinite(log_prob: NDArray[np.float32], true_prob: NDArray[np.float32]) -> None:
    log_prob[17, 1] = np.inf


def spoil_positive(log_prob: NDArray[np.float32], true_prob: NDArray[np.float32]) -> None:
    log_prob[17] = [0.25, -9, -9]


def spoil_zeros(log_prob: NDArray[np.float32], true_prob: NDArray[np.float32]) -> None:
    log_prob[17] = -np.inf


def spoil_true_nan(log_prob: NDArray[np.float32], true_prob: NDArray[np.float32]) -> None:
    true_prob[17] = np.nan


def spoil_true_high(log_prob: NDArray[np.float32], true_prob: NDArray[np.float32]) -> None:
    true_prob[17] = 1.5


def spoil_true_negative(log_prob: NDArray[np.float32], true_prob: NDArray[np.float32]) -> None:
    true_prob[17] = -0.25


def spoil_label(log_prob: NDArray[np.float32], true_prob: NDArray[np.float32]) -> None:
    log_prob[17] = np.log([0.25, 0.25, 0.25])
    log_prob[17, LABELS[17]] = np.log(0.5)
    true_prob[17] = 0.25  # of another class


@pytest.mark.parametrize(
    ("spoil", "file", "says"),
    [
        (spoil_sum, "oof_ema.npy", "the probabilities sum to 1.03, should be 1 within 0.0015"),
        (spoil_nan, "oof_ema.npy", "class 고양이 has the log-probability nan, should be <= 0"),
        (spoil_infinite, "oof_ema.npy", "class dog has the log-probability inf"),
        (spoil_positive, "oof_ema.npy", "class cat has the log-probability 0.25"),
        (spoil_zeros, "oof_ema.npy", "the probabilities sum to 0, should be 1"),
        (spoil_true_nan, "true_prob_ema.npy", "true_prob is nan, should be in [0, 1]"),
        (spoil_true_high, "true_prob_ema.npy", "true_prob is 1.5, should be in [0, 1]"),
        (spoil_true_negative, "true_prob_ema.npy", "true_prob is -0.25, should be in [0, 1]"),
        (
            spoil_label,
            "true_prob_ema.npy",
            f"true_prob is 0.25, but the OOF probabilities give its class {CLASSES[LABELS[17]]} "
            "0.5: rows or labels are mixed up",
        ),
    ],
)  # fmt: skip
def test_a_violation_names_trial_row_and_file(spoil: object, file: str, says: str) -> None:
    log_prob, true_prob = sound()
    assert callable(spoil)
    spoil(log_prob, true_prob)
    (problem,) = found(log_prob, true_prob)
    assert problem.where == f"/run/trials/c0003/fold2/{file}"
    head = "c0003 ema, fold 2, line 19 of folds.csv (images/17.png): "
    assert problem.message.startswith(head + says), problem.message
    assert problem.message.endswith("; delete this fold's folder and resume")


def test_a_stored_zero_is_sound() -> None:
    """A probability that no logarithm could hold is -inf: as in the score, it counts as 1e-15."""
    log_prob, true_prob = sound()
    log_prob[17] = np.log(0.5)
    log_prob[17, LABELS[17]] = -np.inf
    true_prob[17] = 1e-20
    assert found(log_prob, true_prob) == []


def test_a_shuffled_file_is_caught_and_its_rows_are_counted() -> None:
    log_prob, true_prob = sound()
    of_fold = np.flatnonzero(FOLD == 1)
    log_prob[of_fold] = log_prob[np.roll(of_fold, 1)]
    (problem,) = found(log_prob, true_prob)
    assert problem.where.endswith("/fold1/true_prob_ema.npy")
    count = re.search(r"and (\d+) more rows of this fold", problem.message)
    stored = log_prob[of_fold, LABELS[of_fold]]
    apart = np.abs(stored - np.log(true_prob[of_fold])) > 0.1
    assert count is not None and int(count[1]) + 1 >= apart.sum() > 10


def test_labels_of_another_order_are_caught() -> None:
    log_prob, true_prob = sound()
    other = replace(scored(), labels=(LABELS + 1) % 3)
    problems = found(log_prob, true_prob, other)
    assert [p.where[-23:-18] for p in problems] == ["fold0", "fold1", "fold2"]
    assert all("rows or labels are mixed up" in p.message for p in problems)


@pytest.mark.parametrize(
    ("log_shape", "true_shape", "file", "says"),
    [
        ((N, 4), (N,), "oof_ema.npy", "the shape is (60, 4), should be (60, 3)"),
        ((N,), (N,), "oof_ema.npy", "the shape is (60,), should be (60, 3)"),
        ((N, 3), (N, 1), "true_prob_ema.npy", "the shape is (60, 1), should be (60,)"),
    ],
)
def test_shapes(log_shape: tuple[int], true_shape: tuple[int], file: str, says: str) -> None:
    (problem,) = found(np.zeros(log_shape, np.float32), np.zeros(true_shape, np.float32))
    assert problem.where == f"/run/trials/c0003/*/{file}"
    assert says in problem.message


def test_with_one_fixed_split_rows_are_those_of_the_table() -> None:
    """The 5th scored row is row 12 of the table."""
    rows = scored(k=1)
    log_prob, true_prob = sound(rows.rows)
    assert found(log_prob, true_prob, rows) == []
    true_prob[4] = 2
    (problem,) = found(log_prob, true_prob, rows)
    assert "line 14 of folds.csv (images/12.png)" in problem.message


def test_many_problems_are_counted() -> None:
    log_prob, true_prob = sound()
    log_prob[0:9] = np.nan  # of three folds
    log_prob[9:18] += 0.5
    true_prob[30:39] = -1
    problems = found(log_prob, true_prob)
    assert len(problems) == 4
    assert problems[-1].where == "/run/trials/c0003/*/oof_ema.npy"
    assert problems[-1].message == "c0003 ema: 6 more problems like these"


def test_a_file_made_elsewhere_is_named_as_it_is() -> None:
    log_prob, true_prob = sound()
    true_prob[17] = 2
    added = source("added", "/home/me/oof.csv")
    (problem,) = violations(added, log_prob, true_prob, scored())
    assert problem.where == "/home/me/oof.csv"
    assert "line 19 of folds.csv" in problem.message
    assert problem.message.endswith("; correct the file and add it again")
