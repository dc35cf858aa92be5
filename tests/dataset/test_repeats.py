"""Repeated folds: each repeat a split as a single one is, and all of them different, as those of
scikit-learn's RepeatedStratifiedKFold are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.model_selection import RepeatedStratifiedKFold

from foldrace.config.load import parse_mapping
from foldrace.config.schema import FoldsConfig
from foldrace.core.errors import DataError
from foldrace.dataset.audit import audit
from foldrace.dataset.duplicates import near_copies
from foldrace.dataset.folds import (
    fold_warnings,
    folds_csv,
    make_folds,
    parts_of,
    read_folds,
)
from tests.dataset.test_folds import assert_no_group_is_torn, grouped, manifest, problems

K, REPEATS = 5, 4
CONFIG = FoldsConfig(k=K, repeats=REPEATS)
LABELS = np.random.default_rng(3).choice(4, 400, p=[0.5, 0.3, 0.15, 0.05])


def of_sklearn(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """(R, n) with each repeat's own folds from 0 on."""
    splitter = RepeatedStratifiedKFold(n_splits=K, n_repeats=REPEATS, random_state=1)
    found = np.empty((REPEATS, len(labels)), dtype=np.int64)
    for i, (_, held) in enumerate(splitter.split(labels, labels)):
        found[i // K, held] = i % K
    return found


def counts(split: NDArray[np.int64], labels: NDArray[np.int64]) -> list[list[int]]:
    """Rows of each class by fold, each class's sorted."""
    table = [np.bincount(split[labels == c], minlength=K) for c in range(int(labels.max()) + 1)]
    return [sorted(row.tolist()) for row in table]


def share_together(splits: NDArray[np.int64]) -> float:
    """Of the pairs of rows that the first repeat puts into one fold, those that others do, too."""
    together = splits[:, :, None] == splits[:, None, :]
    pairs = together[0] & ~np.eye(splits.shape[1], dtype=bool)
    return float(together[1:, pairs].mean())


def test_each_repeat_is_a_stratified_partition_and_all_differ() -> None:
    found = make_folds(manifest(LABELS), CONFIG)
    assert found.shape == (REPEATS, len(LABELS))
    own = found - K * np.arange(REPEATS)[:, None]
    assert all(sorted(set(split)) == list(range(K)) for split in own.tolist())
    reference = of_sklearn(LABELS)
    for ours, theirs in zip(own, reference, strict=True):
        assert counts(ours, LABELS) == counts(theirs, LABELS)
    assert share_together(own) == pytest.approx(share_together(reference), abs=0.01)
    assert not list(fold_warnings(manifest(LABELS), found))


def test_the_first_repeat_is_the_split_without_repeats() -> None:
    """So is each of more repeats: further ones change nothing of those before."""
    for data in (manifest(LABELS), grouped()):
        found = make_folds(data, CONFIG)
        np.testing.assert_array_equal(found[0], make_folds(data, FoldsConfig(k=K)))
        fewer = make_folds(data, FoldsConfig(k=K, repeats=2))
        np.testing.assert_array_equal(found[:2], fewer)
        next_seed = make_folds(data, FoldsConfig(k=K, seed=43))
        assert (found[1] - K != next_seed).any()


@pytest.mark.parametrize("sizes", ["even", "all different", "a few large ones"])
def test_groups_are_kept_together_and_divided_anew(sizes: str) -> None:
    """Groups that all have sizes of their own would be dealt alike whatever the seed."""
    rows = {
        "even": np.full(60, 5),
        "all different": np.arange(1, 61),
        "a few large ones": np.r_[np.full(55, 2), [30, 28, 25, 22, 20]],
    }[sizes]
    labels = np.repeat(np.arange(60) % 3, rows)
    data = manifest(labels, np.repeat([f"g{i}" for i in range(60)], rows).tolist())
    found = make_folds(data, CONFIG)
    own = found - K * np.arange(REPEATS)[:, None]
    for split in own:
        assert_no_group_is_torn(data, split)
        assert np.bincount(split).max() <= 1.15 * len(labels) / K
        spread, least = ([np.ptp(row) for row in counts(s, labels)] for s in (split, own[0]))
        assert sum(spread) <= sum(least) + 0.05 * len(
            labels
        )  # large groups of one class are what they are
    first_rows = np.cumsum(rows) - rows
    assert share_together(own[:, first_rows]) < 0.35  # by chance: 0.19
    assert not list(fold_warnings(data, found))


def test_repeats_that_are_alike_and_large_folds_are_warned_of() -> None:
    labels = np.tile([0, 1], 30)
    data = manifest(labels, np.repeat([f"g{i}" for i in range(5)], 12).tolist())
    [warning] = fold_warnings(data, make_folds(data, CONFIG))
    assert str(warning).startswith("folds.repeats: 3 of 4 repeats divide the rows as another one")
    large = np.repeat(np.arange(10), [120] + 9 * [20])
    data = manifest(np.arange(300) % 2, [f"g{i}" for i in large])
    [warning] = fold_warnings(data, make_folds(data, FoldsConfig(k=5, repeats=2)))
    assert "fold 0 (" in warning.message and "the largest group, g0, has 120" in warning.message
    assert sum(name in warning.message for name in ("fold 5", "fold 6", "fold 7", "fold 8")) <= 1


def test_classes_too_small_for_a_repeat() -> None:
    found = problems(manifest([0, 0, 0, 1]), FoldsConfig(k=2, repeats=2))
    assert found == [
        "folds: classes with fewer images than folds.k: 2: class 1 (1); add images, remove the "
        "class or lower folds.k"
    ]


def test_folds_csv_has_a_column_a_repeat() -> None:
    data = grouped(20)
    found = make_folds(data, FoldsConfig(k=3, repeats=3))
    text = folds_csv(data, found)
    assert text.splitlines()[0] == "image_path,target,group,fold,fold_r1,fold_r2"
    table = read_folds(text)
    np.testing.assert_array_equal(table.by_repeat, found)
    assert (table.k, table.repeats, table.count) == (3, 3, 9)
    for fold in range(9):
        np.testing.assert_array_equal(table.rows_of(fold), np.flatnonzero(found[fold // 3] == fold))
        np.testing.assert_array_equal(table.split_of(fold), found[fold // 3])
    single = make_folds(data, FoldsConfig(k=3))
    assert folds_csv(data, single) == "".join(
        ",".join(line.split(",")[:4]) + "\n" for line in text.splitlines()
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("image_path,target,group,fold,fold_r2\na,b,,0,1\n", "the header should be"),
        ("image_path,target,group,fold,fold_r1\na,b,,0\n", "row 1 should have 5 cells"),
        ("image_path,target,group,fold,fold_r1\na,b,,0,x\n", "row 1 should have 5 cells"),
        (
            "image_path,target,group,fold,fold_r1\na,b,,0,2\nc,d,,1,1\n",
            "fold_r1 should have the folds 2 to 3",
        ),
    ],
)
def test_damaged_tables_are_refused(text: str, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        read_folds(text)


def test_copies_count_where_any_repeat_divides_them(tmp_path: Path) -> None:
    """Rows 0 and 1 are copies in one fold of the first repeat, and in two of the second."""
    from concurrent.futures import ThreadPoolExecutor

    from PIL import Image

    from foldrace.dataset.similarity import scan_images

    noise = np.random.default_rng(0).integers(0, 255, (5, 24, 24, 3)).astype(np.uint8)
    for i, picture in enumerate((0, 0, 1, 2, 3)):
        Image.fromarray(noise[picture]).save(tmp_path / f"{i}.jpg")
    data = manifest([0, 0, 0, 1, 1])
    data = type(data)(tmp_path, data.image_paths, data.labels, data.classes, None, None)
    folds = np.array([[0, 0, 1, 0, 1], [2, 3, 2, 3, 2]])
    np.testing.assert_array_equal(parts_of(folds[0]), folds[0])
    parts = parts_of(folds)  # rows 1 and 3 are divided by neither repeat, nor are 2 and 4
    assert len(set(parts.tolist())) == 3 and (parts[1], parts[2]) == (parts[3], parts[4])
    infos = scan_images(data, 1)
    with ThreadPoolExecutor(1) as pool:
        found = near_copies(data, infos, parts_of(folds), None, [], pool)
    assert {row.image_path for row in found.rows} == {"0.jpg", "1.jpg"}
    warnings = [str(problem) for problem in audit(data, folds, None, 1).warnings]
    assert any("identical files in different folds: 0.jpg = 1.jpg" in text for text in warnings)
    alone = [str(problem) for problem in audit(data, folds[0], None, 1).warnings]
    assert not any("identical files" in text for text in alone)


@pytest.mark.parametrize(
    ("folds", "expected"),
    [
        ({"repeats": 0}, "folds.repeats: got 0; should be greater than or equal to 1"),
        ({"repeats": -1}, "folds.repeats: got -1; should be greater than or equal to 1"),
        ({"repeats": 2.5}, "folds.repeats: got 2.5; should be a valid integer"),
        ({"repeats": "a"}, 'folds.repeats: got "a"; should be a valid integer'),
        ({"repeats": 2, "k": 1}, "repeats: 2 goes with k of 2 or more, not with k: 1"),
        ({"repeats": 2, "column": "part"}, "not with column: part, which gives one split"),
    ],
)
def test_values_that_cannot_be(folds: dict[str, object], expected: str) -> None:
    raw = {"name": "x", "data": {"train": "t.csv"}, "search": {"backbones": ["timm/x"]}}
    parsed = parse_mapping({**raw, "folds": folds}, "sweep.yaml", Path.cwd())
    assert any(expected in str(problem) for problem in parsed.problems)


def test_a_smoke_run_has_few_repeats() -> None:
    raw = {"name": "x", "data": {"train": "t.csv"}, "search": {"backbones": ["timm/x"]}}
    for repeats, expected in ((1, 1), (2, 2), (9, 2)):
        folds = {"folds": {"k": 5, "repeats": repeats}}
        parsed = parse_mapping({**raw, **folds}, "sweep.yaml", Path.cwd(), smoke=True).require()
        assert (parsed.folds.k, parsed.folds.repeats) == (2, expected)
