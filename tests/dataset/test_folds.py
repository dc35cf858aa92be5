"""Folds against scikit-learn's own splitters and against properties that must always hold."""

from __future__ import annotations

import csv
import hashlib
import io
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from foldrace.config.schema import FoldsConfig
from foldrace.core.errors import DataError
from foldrace.dataset.folds import (
    HELD_OUT,
    TRAIN_ONLY,
    fold_warnings,
    folds_csv,
    folds_hash,
    make_folds,
    read_folds,
)
from foldrace.dataset.manifest import Manifest


def manifest(
    labels: Sequence[int] | NDArray[np.int64],
    groups: Sequence[str] | None = None,
    given: Sequence[str] | None = None,
) -> Manifest:
    return Manifest(
        image_root=Path("images"),
        image_paths=tuple(f"{i}.jpg" for i in range(len(labels))),
        labels=np.asarray(labels, dtype=np.int64),
        classes=tuple(f"class {c}" for c in range(int(max(labels)) + 1)),
        groups=None if groups is None else tuple(groups),
        given_folds=None if given is None else tuple(given),
    )


def grouped(n_groups: int = 120, n_classes: int = 4, seed: int = 0) -> Manifest:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 20, n_groups)
    labels = np.repeat(np.arange(n_groups) % n_classes, sizes)
    groups = np.repeat([f"g{g}" for g in range(n_groups)], sizes)
    order = rng.permutation(len(labels))
    return manifest(labels[order], groups[order].tolist())


def problems(data: Manifest, config: FoldsConfig) -> list[str]:
    with pytest.raises(DataError) as error:
        make_folds(data, config)
    return [str(problem) for problem in error.value.problems]


def assert_no_group_is_torn(data: Manifest, fold: NDArray[np.int64]) -> None:
    assert data.groups is not None
    assert len(set(zip(data.groups, fold.tolist(), strict=True))) == len(set(data.groups))


# --- k folds


@pytest.mark.parametrize("seed", [0, 42])
def test_same_folds_as_sklearn(seed: int) -> None:
    data = manifest(np.random.default_rng(1).integers(0, 5, 300))
    fold = make_folds(data, FoldsConfig(k=5, seed=seed))
    splitter = StratifiedKFold(5, shuffle=True, random_state=seed)
    for k, (_, rows) in enumerate(splitter.split(data.labels, data.labels)):
        np.testing.assert_array_equal(np.flatnonzero(fold == k), rows)
    assert fold.dtype == np.int64


def mixed(kind: str, seed: int) -> Manifest:
    """Groups of one class, of several, of very different sizes, or of a rare class."""
    rng = np.random.default_rng(seed)
    sizes = {
        "pure": rng.integers(1, 20, 120),
        "heavy tail": (rng.pareto(1.0, 200) * 3 + 1).astype(int).clip(1, 600),
        "several classes": rng.integers(5, 60, 60),
        "few": rng.integers(1, 100, 12),
        "rare class": rng.geometric(0.1, 400),
    }[kind]
    count = len(sizes)
    if kind == "pure":
        mixes = np.eye(5)[np.arange(count) % 5]
    elif kind == "rare class":
        mixes = np.eye(2)[(rng.random(count) < 0.1).astype(int)]
    else:
        mixes = rng.dirichlet(np.ones(5), count)
    group = np.repeat(np.arange(count), sizes)
    labels = [int(rng.choice(len(mixes[g]), p=mixes[g])) for g in group]
    return manifest(labels, [f"g{g}" for g in group])


@pytest.mark.parametrize("kind", ["pure", "heavy tail", "several classes", "few", "rare class"])
@pytest.mark.parametrize("seed", range(3))
def test_group_folds_are_as_even_as_sklearns_or_more(kind: str, seed: int) -> None:
    data = mixed(kind, seed)
    fold = make_folds(data, FoldsConfig(k=5, seed=seed))
    assert_no_group_is_torn(data, fold)
    other = np.empty(len(data), np.int64)
    splitter = StratifiedGroupKFold(5, shuffle=True, random_state=seed)
    for k, (_, rows) in enumerate(splitter.split(data.labels, data.labels, data.groups)):
        other[rows] = k
    largest, others_largest = (np.bincount(f).max() / len(data) * 5 for f in (fold, other))
    assert largest <= max(others_largest, 1.05)
    spread, others_spread = (
        np.mean([np.std(np.bincount(f[data.labels == c], minlength=5)) for c in set(data.labels)])
        for f in (fold, other)
    )
    assert spread <= 1.5 * others_spread + 2


def test_a_million_rows_of_many_groups_and_classes_take_seconds() -> None:
    rng = np.random.default_rng(0)
    n, groups, classes = 100_000, 10_000, 500  # a tenth of it: the time grows with the rows
    group = np.append(np.arange(groups), rng.integers(0, groups, n - groups))
    labels = np.where(rng.random(n) < 0.7, group % classes, rng.integers(0, classes, n))
    data = manifest(labels, [f"g{g}" for g in group])
    start = time.process_time()
    fold = make_folds(data, FoldsConfig(k=5))
    assert time.process_time() - start < 4  # StratifiedGroupKFold takes half a minute
    assert np.bincount(fold).max() < 1.01 * n / 5
    assert_no_group_is_torn(data, fold)


def test_a_fold_of_half_as_many_rows_again_is_warned_of() -> None:
    data = manifest([0, 1] * 100, ["giant"] * 100 + [f"g{i // 2}" for i in range(100)])
    (warning,) = fold_warnings(data, make_folds(data, FoldsConfig(k=4)))
    assert str(warning) == (
        "folds: folds of more than 1.5 times the mean size: fold 0 (100 rows, 2.0 times); the "
        "largest group, giant, has 100 of 200 rows; the losses of such folds weigh most"
    )
    even = manifest([0, 1] * 100)
    assert not list(fold_warnings(even, make_folds(even, FoldsConfig(k=4))))
    given = manifest([0, 1] * 50, given=["0"] * 60 + ["1"] * 20 + ["2"] * 20)
    (warning,) = fold_warnings(given, make_folds(given, FoldsConfig(k=3, column="part")))
    assert "fold 0 (60 rows, 1.8 times); the losses" in str(warning)


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("with_groups", [False, True])
def test_only_the_seed_decides(k: int, with_groups: bool) -> None:
    data = grouped() if with_groups else manifest(np.arange(200) % 4)
    config = FoldsConfig(k=k, seed=3, test_fraction=0.1)
    np.random.seed(0)
    first = make_folds(data, config)
    np.random.seed(1)
    np.testing.assert_array_equal(first, make_folds(data, config))
    other = make_folds(data, config.model_copy(update={"seed": 4}))
    assert not np.array_equal(first, other)
    make_folds(data, config.model_copy(update={"seed": 2**40}))


def test_too_few_images_of_a_class() -> None:
    (found,) = problems(manifest([0] * 9 + [1] * 3 + [2] * 4), FoldsConfig(k=5))
    assert found == (
        "folds: classes with fewer images than folds.k: 5: class 1 (3), class 2 (4); "
        "add images, remove the class or lower folds.k"
    )


def test_too_few_groups_of_a_class() -> None:
    data = manifest([0] * 9 + [1] * 9, [f"a{i}" for i in range(9)] + ["b1"] * 5 + ["b2"] * 4)
    (found,) = problems(data, FoldsConfig(k=3))
    assert "fewer groups than folds.k: 3: class 1 (2); add groups" in found


# --- one fixed split


@pytest.mark.parametrize(("valid", "test"), [(0.2, 0.0), (0.15, 0.1), (0.45, 0.45), (0.01, 0.01)])
@pytest.mark.parametrize("per_class", [7, 100])
def test_fixed_split_keeps_its_fractions(valid: float, test: float, per_class: int) -> None:
    data = manifest(np.random.default_rng(0).permutation(np.arange(60 * per_class) % 60))
    config = FoldsConfig(k=1, valid_fraction=valid, test_fraction=test)
    fold = make_folds(data, config)
    for side, fraction in ((0, valid), (HELD_OUT, test), (TRAIN_ONLY, 1 - valid - test)):
        counts = np.bincount(data.labels[fold == side], minlength=60)
        assert np.abs(counts - fraction * per_class).max() <= 2
        if fraction == 0:
            assert counts.sum() == 0
        else:
            assert counts.min() >= 1
            if per_class == 100:  # else the one row that each side must have weighs more
                assert counts.sum() == pytest.approx(fraction * len(data))


def test_fixed_split_of_the_smallest_classes() -> None:
    data = manifest([0, 0, 0, 1, 1, 1])
    fold = make_folds(data, FoldsConfig(k=1, valid_fraction=0.5, test_fraction=0.4))
    for label in (0, 1):
        assert sorted(fold[data.labels == label]) == [HELD_OUT, TRAIN_ONLY, 0]
    (found,) = problems(manifest([0, 0, 1, 1]), FoldsConfig(k=1, test_fraction=0.1))
    assert "fewer images than 3 sides of the split (k: 1): class 0 (2), class 1 (2)" in found


@pytest.mark.parametrize(("valid", "test"), [(0.2, 0.0), (0.15, 0.1), (0.4, 0.3)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fixed_group_split_comes_close(valid: float, test: float, seed: int) -> None:
    data = grouped(n_groups=200, seed=seed)
    fold = make_folds(data, FoldsConfig(k=1, valid_fraction=valid, test_fraction=test, seed=seed))
    assert_no_group_is_torn(data, fold)
    assert data.groups is not None
    group_sides = np.array([s for _, s in set(zip(data.groups, fold.tolist(), strict=True))])
    for side, fraction in ((0, valid), (HELD_OUT, test), (TRAIN_ONLY, 1 - valid - test)):
        assert np.mean(fold == side) == pytest.approx(fraction, abs=0.03)
        assert np.mean(group_sides == side) == pytest.approx(fraction, abs=0.06)
        counts = np.bincount(data.labels[fold == side], minlength=4) / np.bincount(data.labels)
        np.testing.assert_allclose(counts, fraction, atol=0.06)


def test_a_giant_group_stays_in_training() -> None:
    data = manifest([0, 1] * 100, ["giant"] * 150 + [f"g{i // 2}" for i in range(50)])
    fold = make_folds(data, FoldsConfig(k=1, valid_fraction=0.1))
    assert (fold[:150] == TRAIN_ONLY).all()
    assert 2 * 2 <= (fold == 0).sum() <= 2 * 5  # 2 to 5 of the 26 groups


def test_every_side_gets_one_of_very_few_groups() -> None:
    data = manifest([0, 1] * 9, [f"g{i // 6}" for i in range(18)])
    config = FoldsConfig(k=1, valid_fraction=0.05, test_fraction=0.05)
    fold = make_folds(data, config)
    assert set(fold.tolist()) == {TRAIN_ONLY, 0, HELD_OUT}
    assert_no_group_is_torn(data, fold)


# --- a given column


def test_given_folds() -> None:
    data = manifest([0, 1, 0, 1], given=["1", "0", "0", "1"])
    fold = make_folds(data, FoldsConfig(k=2, column="part"))
    assert fold.tolist() == [1, 0, 0, 1]
    words = manifest([0, 1, 0, 1], given=["train", "train", "valid", "test"])
    fold = make_folds(words, FoldsConfig(k=1, column="part"))
    assert fold.tolist() == [TRAIN_ONLY, TRAIN_ONLY, 0, HELD_OUT]


def test_wrong_folds_are_named_with_their_lines() -> None:
    data = replace(manifest([0, 1, 0, 1], given=["0", "x", "1", "y"]), lines=(2, 4, 5, 7))
    (found,) = problems(data, FoldsConfig(k=2, column="part"))
    assert "2 rows have 'x', 'y' (line 4, 7); allowed with folds.k: 2: 0 .. 1" in found


@pytest.mark.parametrize(
    ("k", "given", "expected"),
    [
        (
            2,
            ["0", "1", "2", "0.0"],
            "part: 2 rows have '0.0', '2'; allowed with folds.k: 2: 0 .. 1",
        ),
        (
            1,
            ["train", "valid", "0", "Test"],
            "2 rows have '0', 'Test'; allowed with folds.k: 1: tr",
        ),
        (3, ["0", "0", "1", "1"], "no rows in fold 2; lower folds.k or correct the fold column"),
        (1, ["train"] * 4, "no rows in fold 0"),
        (2, ["0", "1", "0", "1"], "fold 0 held out, no row is left to train on for class 0"),
        (1, ["train", "valid", "train", "valid"], "no row is left to train on for class 1"),
        (2, None, "has no such column"),
    ],
)
def test_wrong_given_folds(k: int, given: list[str] | None, expected: str) -> None:
    data = manifest([0, 1, 0, 1], given=given)
    assert expected in "\n".join(problems(data, FoldsConfig(k=k, column="part")))


def test_all_problems_of_given_folds_come_at_once() -> None:
    data = manifest([0, 0, 1, 1], groups=["a", "b", "c", "c"], given=["0", "0", "1", "3"])
    found = problems(data, FoldsConfig(k=4, column="part"))
    assert len(found) == 3
    assert "no rows in fold 2" in found[0]
    assert "with fold 0 held out, no row is left to train on for class 0" in found[1]
    assert "groups that lie in several folds: c" in found[2]


def test_a_class_in_one_fold_only_because_of_its_groups() -> None:
    data = manifest([0] * 6 + [1] * 2, given=["0", "1", "0", "1", "0", "1", "1", "1"])
    (found,) = problems(data, FoldsConfig(k=2, column="part"))
    assert "with fold 1 held out, no row is left to train on for class 1" in found


# --- folds.csv


def test_csv_text_and_hash() -> None:
    data = Manifest(
        image_root=Path("x"),
        image_paths=("a, b.jpg", '고양이 "1".jpg', "c\nd.jpg"),
        labels=np.array([1, 0, 1]),
        classes=("고양이", "x,y"),
        groups=None,
        given_folds=None,
    )
    text = folds_csv(data, np.array([0, TRAIN_ONLY, HELD_OUT]))
    assert text == (
        "image_path,target,group,fold\n"
        '"a, b.jpg","x,y",,0\n'
        '"고양이 ""1"".jpg",고양이,,-1\n'
        '"c\nd.jpg","x,y",,-2\n'
    )
    assert folds_hash(text) == hashlib.sha256(text.encode()).hexdigest()
    table = read_folds(text)
    assert table.image_paths == data.image_paths
    assert table.targets == ("x,y", "고양이", "x,y")
    assert table.groups is None
    assert table.fold.tolist() == [0, -1, -2]
    assert table.hash == folds_hash(text)


def test_round_trip_with_groups_and_another_csv_reader() -> None:
    data = grouped(20)
    fold = make_folds(data, FoldsConfig(k=3))
    text = folds_csv(data, fold)
    table = read_folds(text)
    assert table.groups == data.groups
    np.testing.assert_array_equal(table.fold, fold)
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["target"] for row in rows] == list(table.targets)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "the header should be image_path,target,group,fold"),
        ("image_path,fold\na,0\n", "the header should be"),
        ("image_path,target,group,fold\na,b,,x\na,b,0\n", "row 1, 2 should have four cells"),
    ],
)
def test_read_folds_refuses_other_tables(text: str, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        read_folds(text)
