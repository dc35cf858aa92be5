"""The fold of each training row: decided once, written to folds.csv, hashed.

Takes a `Manifest` and the config's `folds` section, gives an array of folds and the CSV's text,
or a DataError with every problem. The same seed gives the same folds everywhere.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foldrace.config.schema import FoldsConfig
from foldrace.core.errors import DataError, Problem, listing
from foldrace.dataset.balance import deal_groups, deal_rows
from foldrace.dataset.manifest import Manifest

TRAIN_ONLY = -1  # k: 1: trained on, never scored
HELD_OUT = -2  # k: 1 with test_fraction: seen by no trial
HEADER = ("image_path", "target", "group", "fold")

_WORDS = {"train": TRAIN_ONLY, "valid": 0, "test": HELD_OUT}
_SIDES = (TRAIN_ONLY, 0, HELD_OUT)
_LARGE = 1.5  # times the mean, beyond which a fold's size is warned of


@dataclass(frozen=True)
class FoldTable:
    """The table in folds.csv."""

    image_paths: tuple[str, ...]
    targets: tuple[str, ...]
    groups: tuple[str, ...] | None
    fold: NDArray[np.int64]
    """Fold of each row, (n,); with k: 1 also TRAIN_ONLY and HELD_OUT."""
    hash: str
    """SHA-256 of the file, in hex."""


def make_folds(manifest: Manifest, config: FoldsConfig) -> NDArray[np.int64]:
    """Fold of each row, (n,), 0 .. k-1; raises DataError with every problem.

    With k: 1, 0 marks the validation rows, beside TRAIN_ONLY and HELD_OUT.
    """
    if config.column is not None:
        fold = _folds_of_column(manifest, config)
    else:
        problems = list(_small_class_problem(manifest, config))
        if problems:
            raise DataError(problems)
        fold = _fixed_split(manifest, config) if config.k == 1 else _k_folds(manifest, config)
    problems = list(_split_problems(manifest, fold, config.k))
    if problems:
        raise DataError(problems)
    return fold


def fold_warnings(manifest: Manifest, fold: NDArray[np.int64]) -> Iterator[Problem]:
    """The warning of folds that score far more rows than the others."""
    sizes = np.bincount(fold[fold >= 0])
    large = np.flatnonzero(sizes > _LARGE * sizes.mean())
    if len(large):
        times = (
            f"fold {f} ({sizes[f]:,} rows, {sizes[f] / sizes.mean():.1f} times)" for f in large
        )
        message = f"folds of more than {_LARGE:g} times the mean size: {listing(times)}"
        if manifest.groups is not None:
            counts = Counter(manifest.groups)
            group, rows = counts.most_common(1)[0]
            message += f"; the largest group, {group}, has {rows:,} of {len(fold):,} rows"
        yield Problem("folds", f"{message}; the losses of such folds weigh most")


def folds_csv(manifest: Manifest, fold: NDArray[np.int64]) -> str:
    """The text of folds.csv: RFC 4180, but with a line feed alone at line ends.

    With csv, not pandas, which can neither write nor read file names that are not UTF-8.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    groups = manifest.groups or ("",) * len(manifest)
    targets = (manifest.classes[label] for label in manifest.labels)
    writer.writerows(zip(manifest.image_paths, targets, groups, fold.tolist(), strict=True))
    return text.getvalue()


def folds_hash(csv_text: str) -> str:
    """SHA-256 of the text as UTF-8, in hex."""
    return hashlib.sha256(csv_text.encode("utf-8", "surrogateescape")).hexdigest()


def read_folds(csv_text: str) -> FoldTable:
    """The table that `folds_csv` wrote; raises DataError for any other text."""
    try:
        rows = [row for row in csv.reader(io.StringIO(csv_text, newline="")) if row]
    except csv.Error as error:
        raise DataError.single("folds.csv", f"is no CSV: {error}") from error
    if not rows or tuple(rows[0]) != HEADER:
        raise DataError.single("folds.csv", f"the header should be {','.join(HEADER)}")
    odd = [i for i, row in enumerate(rows[1:], 1) if len(row) != 4 or not _is_int(row[3])]
    if odd:
        message = f"row {listing(odd)} should have four cells, the last one a fold (-2 to 999)"
        raise DataError.single("folds.csv", message)
    paths, targets, groups, fold = zip(*rows[1:], strict=True) if rows[1:] else ((), (), (), ())
    return FoldTable(
        image_paths=paths,
        targets=targets,
        groups=groups if any(groups) else None,
        fold=np.array([int(f) for f in fold], dtype=np.int64),
        hash=folds_hash(csv_text),
    )


def _is_int(text: str) -> bool:
    """True for a fold's number: what is read back as folds is counted up to the highest one."""
    return re.fullmatch("-[12]|[0-9]{1,3}", text) is not None


def _k_folds(manifest: Manifest, config: FoldsConfig) -> NDArray[np.int64]:
    if manifest.groups is None:
        return deal_rows(manifest.labels, config.k, config.seed)
    group = _group_numbers(manifest.groups)
    size = np.bincount(group) / len(group)
    even = np.full(config.k, 1 / config.k)
    rng = np.random.default_rng(config.seed)
    return deal_groups(group, manifest.labels, size, even, rng)[group]


def _group_numbers(groups: Sequence[str]) -> NDArray[np.int64]:
    """Number of each row's group, (n,), in the order of their first rows."""
    number: dict[str, int] = {}
    return np.array([number.setdefault(group, len(number)) for group in groups], dtype=np.int64)


def _fixed_split(manifest: Manifest, config: FoldsConfig) -> NDArray[np.int64]:
    rng = np.random.default_rng(config.seed)
    valid, test = config.valid_fraction, config.test_fraction
    if manifest.groups is None:
        return _split_rows(manifest.labels, valid, test, rng)
    group = _group_numbers(manifest.groups)
    count = int(group.max()) + 1
    fractions = np.array([1 - valid - test, valid, test][: 3 if test > 0 else 2])
    side = deal_groups(group, manifest.labels, np.full(count, 1 / count), fractions, rng)
    return np.array(_SIDES, dtype=np.int64)[side][group]


def _split_rows(
    labels: NDArray[np.int64], valid: float, test: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Sides (n,) with each class's fractions to within a row, and one row of it at least."""
    fold = np.full(len(labels), TRAIN_ONLY, dtype=np.int64)
    ends = np.cumsum(np.bincount(labels))
    quota_valid = np.diff(np.rint(ends * valid), prepend=0)  # rounding does not add up over classes
    quota_test = np.diff(np.rint(ends * test), prepend=0)
    of_class = np.split(np.argsort(labels, kind="stable"), ends[:-1])
    for rows, n_valid, n_test in zip(of_class, quota_valid, quota_test, strict=True):
        rows = rng.permutation(rows)
        n_test = min(max(int(n_test), 1), len(rows) - 2) if test > 0 else 0
        n_valid = min(max(int(n_valid), 1), len(rows) - 1 - n_test)
        fold[rows[:n_valid]] = 0
        fold[rows[n_valid : n_valid + n_test]] = HELD_OUT
    return fold


def _folds_of_column(manifest: Manifest, config: FoldsConfig) -> NDArray[np.int64]:
    where = f"folds.column: {config.column}"
    if manifest.given_folds is None:
        message = "data.train has no such column, or it was not read; use a CSV that has it"
        raise DataError.single(where, message)
    allowed = _WORDS if config.k == 1 else {str(k): k for k in range(config.k)}
    wrong = sorted(set(manifest.given_folds) - set(allowed))
    if wrong:
        rows = [row for row, value in enumerate(manifest.given_folds) if value not in allowed]
        lines = manifest.lines
        at = "" if lines is None else f" (line {listing(lines[row] for row in rows)})"
        shown = listing(repr(value) for value in wrong)
        words = "train, valid, test" if config.k == 1 else f"0 .. {config.k - 1}"
        message = f"{len(rows):,} rows have {shown}{at}; allowed with folds.k: {config.k}: {words}"
        raise DataError.single(where, message)
    return np.array([allowed[value] for value in manifest.given_folds], dtype=np.int64)


def _small_class_problem(manifest: Manifest, config: FoldsConfig) -> Iterator[Problem]:
    """The problem of classes that cannot be on every side of the split."""
    need = config.k if config.k > 1 else 2 + (config.test_fraction > 0)
    n_classes, labels = len(manifest.classes), manifest.labels
    if manifest.groups is not None:  # each group once for each of its classes
        labels = np.unique(_group_numbers(manifest.groups) * n_classes + labels) % n_classes
    counts = np.bincount(labels, minlength=n_classes)
    small = [f"{manifest.classes[c]} ({counts[c]})" for c in np.flatnonzero(counts < need)]
    if small:
        kind = "images" if manifest.groups is None else "groups"
        sides = f"folds.k: {config.k}" if config.k > 1 else f"{need} sides of the split (k: 1)"
        advice = f"add {kind}, remove the class" + (" or lower folds.k" if config.k > 1 else "")
        message = f"classes with fewer {kind} than {sides}: {listing(small)}; {advice}"
        yield Problem("folds", message)


def _split_problems(manifest: Manifest, fold: NDArray[np.int64], k: int) -> Iterator[Problem]:
    n_classes = len(manifest.classes)
    seen = fold != HELD_OUT
    pair = (fold[seen] - TRAIN_ONLY) * n_classes + manifest.labels[seen]
    counts = np.bincount(pair, minlength=(k + 1) * n_classes).reshape(k + 1, n_classes)
    rows, total = counts[1:], counts.sum(axis=0)  # (k, C): those that each fold scores
    empty = [f for f in range(k) if not rows[f].any()]
    if empty:
        message = f"no rows in fold {listing(empty)}" + (" (valid)" if k == 1 else "")
        yield Problem("folds", f"{message}; lower folds.k or correct the fold column")
    for f in range(k):
        lost = [manifest.classes[c] for c in np.flatnonzero(total == rows[f])]
        if lost and f not in empty:
            message = f"with fold {f} held out, no row is left to train on for {listing(lost)}"
            yield Problem("folds", f"{message}; spread these classes over more folds or groups")
    if manifest.groups is not None:
        group = _group_numbers(manifest.groups)
        of_group = np.empty(int(group.max()) + 1, dtype=np.int64)
        of_group[group] = fold
        names = (manifest.groups[row] for row in np.flatnonzero(of_group[group] != fold))
        if torn := list(dict.fromkeys(names)):
            message = f"groups that lie in several folds: {listing(torn)}"
            yield Problem("folds", f"{message}; correct the fold column or the group column")
