"""OOF arrays of a candidate: complete, in the order of the rows, and no pickle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from foldrace.core.errors import RunFolderError
from foldrace.run_folder.oof import array_of, npy
from foldrace.run_folder.store import RunStore
from tests.run_folder.stored_runs import (
    new_store,
    save_fold,
    sharpened,
)


def test_pooled_arrays_are_in_the_order_of_the_rows(
    complete: RunStore, prob: NDArray[np.float32]
) -> None:
    np.testing.assert_allclose(complete.oof("c0000", "raw"), prob, rtol=0.003)
    stored = np.log(prob).astype(np.float16)
    np.testing.assert_array_equal(complete.oof_log_prob("c0000", "raw"), stored)
    assert complete.oof_log_prob("c0000", "raw").dtype == np.float32
    true = prob[np.arange(70), complete.labels()]
    np.testing.assert_array_equal(complete.true_prob("c0000", "raw"), true)
    sharp = sharpened(prob)[np.arange(70), complete.labels()]
    np.testing.assert_array_equal(complete.true_prob("c0000", "ema"), sharp)


def test_with_one_split_the_rows_are_the_validation_rows(tmp_path: Path) -> None:
    fold = np.array([-1, 0, -2, -1, 0, 0, -1])
    store = new_store(tmp_path / "run", fold)
    prob = np.full((7, 3), 1 / 3, np.float32)
    save_fold(store, 0, prob)
    assert store.scored_rows().tolist() == [1, 4, 5]
    assert store.fold_count == 1
    assert store.oof("c0000", "raw").shape == (3, 3)


def test_rows_of_some_folds(complete: RunStore, prob: NDArray[np.float32]) -> None:
    complete.forget_trial("c0000", 1)
    fold = complete.folds().fold
    for folds in [(0,), (2, 0)]:
        found = np.exp(complete.oof_log_prob("c0000", "raw", folds))
        np.testing.assert_allclose(found, prob[np.isin(fold, folds)], rtol=6e-3)
    with pytest.raises(RunFolderError, match="fold 1"):
        complete.oof_log_prob("c0000", "raw", (0, 1))
    complete.files.write("trials/c0000/fold2/rows.npy", complete.files.read(
        "trials/c0000/fold0/rows.npy"
    ))  # fmt: skip
    with pytest.raises(RunFolderError, match="fold 2"):
        complete.oof_log_prob("c0000", "raw", (2,))


def damage_missing(folder: Path) -> None:
    (folder / "rows.npy").unlink()


def damage_shorter(folder: Path) -> None:
    np.save(folder / "true_prob.npy", np.ones(3, np.float32))


def damage_row_twice(folder: Path) -> None:
    rows = np.load(folder / "rows.npy")
    rows[0] = rows[1]
    np.save(folder / "rows.npy", rows)


def damage_truncated(folder: Path) -> None:
    data = (folder / "true_prob.npy").read_bytes()
    (folder / "true_prob.npy").write_bytes(data[:-8])


def damage_pickle(folder: Path) -> None:
    np.save(folder / "true_prob.npy", np.array([{"a": 1}] * 20, dtype=object), allow_pickle=True)


def damage_archive(folder: Path) -> None:
    with (folder / "true_prob.npy").open("wb") as file:
        np.savez(file, a=np.ones(20))


def damage_empty(folder: Path) -> None:
    (folder / "true_prob.npy").write_bytes(b"")


@pytest.mark.parametrize(
    "damage",
    [
        damage_missing,
        damage_shorter,
        damage_row_twice,
        damage_truncated,
        damage_pickle,
        damage_archive,
        damage_empty,
    ],
)
def test_incomplete_or_damaged_rows_never_reach_a_blend(
    complete: RunStore, tmp_path: Path, damage: object
) -> None:
    assert callable(damage)
    damage(tmp_path / "run" / "trials" / "c0000" / "fold1")
    with pytest.raises(RunFolderError, match="trials/c0000"):
        complete.true_prob("c0000", "raw")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda rows: rows[1:], "line {first} of folds.csv ({path}) is missing (19 rows for 20"),
        (
            lambda rows: np.append(rows, rows[0]),
            "line {first} of folds.csv ({path}) is there twice",
        ),
        (lambda rows: np.append(rows, 999), "row 999 (from 0) is of another fold, or none (21"),
        (lambda rows: rows.reshape(4, 5), "an odd shape (20 rows for 20 of fold 1)"),
        (lambda rows: np.array(7), " is missing (1 rows for 20 of fold 1)"),
    ],
)
def test_the_row_that_is_not_there_once_is_named(
    complete: RunStore, tmp_path: Path, damage: object, says: str
) -> None:
    assert callable(damage)
    folder = tmp_path / "run" / "trials" / "c0000" / "fold1"
    rows = np.load(folder / "rows.npy")
    np.save(folder / "rows.npy", damage(rows))
    with pytest.raises(RunFolderError) as error:
        complete.oof("c0000", "raw")
    (problem,) = error.value.problems
    expected = says.format(first=rows[0] + 2, path=f"{rows[0]}.png")
    assert problem.where == f"{complete.root}/trials/c0000/fold1/rows.npy"
    assert expected in problem.message and "each scored row once" in problem.message


def test_every_fold_that_lacks_rows_is_listed(complete: RunStore, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "trials" / "c0000"
    damage_row_twice(folder / "fold0")
    damage_shorter(folder / "fold2")
    with pytest.raises(RunFolderError) as error:
        complete.true_prob("c0000", "raw")
    assert [p.where.rpartition("c0000/")[2] for p in error.value.problems] == [
        "fold0/rows.npy",
        "fold2/true_prob.npy",
    ]
    assert "its shape is (3,) for 10 rows" in error.value.problems[1].message


def test_swapped_lengths_are_noticed(complete: RunStore, tmp_path: Path) -> None:
    """The totals fit, the folds do not."""
    trials = tmp_path / "run" / "trials" / "c0000"
    first, second = trials / "fold0" / "true_prob.npy", trials / "fold1" / "true_prob.npy"
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    with pytest.raises(RunFolderError, match="does not hold each scored row once"):
        complete.true_prob("c0000", "raw")


@pytest.mark.parametrize("shape", ["(True, 6)", "(6, True)", "(2, 3)", "(6,)"])
def test_sizes_of_any_kind_are_read_as_numbers(shape: str) -> None:
    numbers = np.arange(6, dtype=np.float32)
    data = npy(numbers.reshape(1, 6)).replace(b"(1, 6), }   ", f"{shape}, }}   ".encode().ljust(12))
    assert shape.encode() in data
    found = array_of(data[:128].ljust(128) + numbers.tobytes())
    np.testing.assert_array_equal(found.ravel(), numbers)
