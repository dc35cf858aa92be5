"""The fold of each training row, in each repeat: decided once, written to folds.csv, hashed.

Takes a `Manifest` and the config's `folds` section, gives an array of folds and the CSV's text,
or a DataError with every problem. The same seed gives the same folds everywhere. A fold has the
number of the fold trial that scores it: those of repeat r are r·k .. r·k + k-1.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from foldrace.config.schema import FoldsConfig
from foldrace.core.errors import DataError, Problem, listing
from foldrace.dataset.balance import deal_groups, deal_rows
from foldrace.dataset.manifest import Manifest

TRAIN_ONLY = -1  # k: 1: trained on, never scored
HELD_OUT = -2  # k: 1 with test_fraction: seen by no trial
HEADER = ("image_path", "target", "group", "fold")
"""Further repeats follow: `fold_r1`, `fold_r2`, ..."""

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
    """Fold of each row in the first repeat, (n,); with k: 1 also TRAIN_ONLY and HELD_OUT."""
    hash: str
    """SHA-256 of the file, in hex."""
    later: tuple[NDArray[np.int64], ...] = ()
    """The same of each further repeat."""

    @property
    def repeats(self) -> int:
        """Number R of repeats."""
        return 1 + len(self.later)

    @property
    def k(self) -> int:
        """Number of folds of one repeat."""
        return int(self.fold.max()) + 1

    @property
    def count(self) -> int:
        """Number of folds of all repeats, each of which one fold trial scores."""
        return self.k * self.repeats

    @cached_property
    def by_repeat(self) -> NDArray[np.int64]:
        """(R, n) `fold` and `later`."""
        return np.stack([self.fold, *self.later])

    @cached_property
    def group_numbers(self) -> NDArray[np.int64] | None:
        """(n,) number of each row's group, in the order of their first rows; None without any."""
        return None if self.groups is None else _first_seen(self.groups)

    def repeat_of(self, fold: int) -> int:
        """The repeat that a fold is of, 0 .. R-1."""
        return fold // self.k if self.later else 0

    def split_of(self, fold: int) -> NDArray[np.int64]:
        """(n,) fold of each row in the repeat that this fold is of."""
        return (self.fold, *self.later)[self.repeat_of(fold)]

    def rows_of(self, fold: int) -> NDArray[np.int64]:
        """(m,) rows that the trial of this fold scores, ascending."""
        return np.flatnonzero(self.split_of(fold) == fold)

    def training_rows(self, fold: int) -> NDArray[np.int64]:
        """(m,) rows that the trial of this fold trains on, ascending."""
        split = self.split_of(fold)
        return np.flatnonzero((split != fold) & (split != HELD_OUT))

    def folds_of(self, repeat: int) -> range:
        """The folds of one repeat."""
        return range(repeat * self.k, (repeat + 1) * self.k)


def make_folds(manifest: Manifest, config: FoldsConfig) -> NDArray[np.int64]:
    """Fold of each row, (n,), 0 .. k-1, with R repeats (R, n); DataError with every problem.

    With k: 1, 0 marks the validation rows, beside TRAIN_ONLY and HELD_OUT.
    """
    if config.column is not None:
        splits = [_folds_of_column(manifest, config)]
    else:
        problems = list(_small_class_problem(manifest, config))
        if problems:
            raise DataError(problems)
        if config.k == 1:
            splits = [_fixed_split(manifest, config)]
        else:
            splits = [_k_folds(manifest, config, repeat) for repeat in range(config.repeats)]
    problems = []
    for repeat, split in enumerate(splits):
        problems += _split_problems(manifest, split, config.k, repeat * config.k)
    if problems:
        raise DataError(problems)
    if config.repeats == 1:
        return splits[0]
    return np.stack([split + repeat * config.k for repeat, split in enumerate(splits)])


def fold_warnings(manifest: Manifest, fold: NDArray[np.int64]) -> Iterator[Problem]:
    """Warnings of folds that score far more rows than the others, and of repeats that are alike.

    `fold` as `make_folds` gives it.
    """
    splits = np.atleast_2d(fold)
    sizes = np.bincount(splits[splits >= 0])
    large = np.flatnonzero(sizes > _LARGE * sizes.mean())
    if len(large):
        times = (
            f"fold {f} ({sizes[f]:,} rows, {sizes[f] / sizes.mean():.1f} times)" for f in large
        )
        message = f"folds of more than {_LARGE:g} times the mean size: {listing(times)}"
        if manifest.groups is not None:
            counts = Counter(manifest.groups)
            group, rows = counts.most_common(1)[0]
            message += f"; the largest group, {group}, has {rows:,} of {len(manifest):,} rows"
        yield Problem("folds", f"{message}; the losses of such folds weigh most")
    different = {_first_seen(split.tolist()).tobytes() for split in splits if len(splits) > 1}
    if alike := len(different) and len(splits) - len(different):
        message = f"{alike} of {len(splits)} repeats divide the rows as another one does"
        few = "rows" if manifest.groups is None else "groups"
        yield Problem("folds.repeats", f"{message}: there are few {few}; lower folds.repeats")


def _first_seen(values: Iterable[Hashable]) -> NDArray[np.int64]:
    """Number of each value, (n,), in the order of their first places."""
    number: dict[Hashable, int] = {}
    return np.array([number.setdefault(value, len(number)) for value in values], dtype=np.int64)


def parts_of(fold: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n,) a number that two rows share where no repeat divides them; `fold` as by `make_folds`."""
    if fold.ndim == 1:
        return fold
    return np.unique(fold, axis=1, return_inverse=True)[1].reshape(-1)


def folds_csv(manifest: Manifest, fold: NDArray[np.int64]) -> str:
    """The text of folds.csv: RFC 4180, but with a line feed alone at line ends.

    `fold` as `make_folds` gives it.

    With csv, not pandas, which can neither write nor read file names that are not UTF-8.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    splits = np.atleast_2d(fold).tolist()
    writer.writerow(_header(len(splits)))
    groups = manifest.groups or ("",) * len(manifest)
    targets = (manifest.classes[label] for label in manifest.labels)
    writer.writerows(zip(manifest.image_paths, targets, groups, *splits, strict=True))
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
    repeats = len(rows[0]) - len(HEADER) + 1 if rows else 0
    if repeats < 1 or tuple(rows[0]) != _header(repeats):
        raise DataError.single("folds.csv", f"the header should be {','.join(HEADER)}")
    odd = [
        i
        for i, row in enumerate(rows[1:], 1)
        if len(row) != len(rows[0]) or not all(map(_is_int, row[3:]))
    ]
    if odd:
        cells = "four" if repeats == 1 else str(len(rows[0]))
        last = "the last one a fold" if repeats == 1 else "from the fourth on folds"
        message = f"row {listing(odd)} should have {cells} cells, {last} (-2 to 999)"
        raise DataError.single("folds.csv", message)
    paths, targets, groups, *splits = (
        zip(*rows[1:], strict=True) if rows[1:] else ((),) * len(rows[0])
    )
    first, *later = (np.array([int(f) for f in split], dtype=np.int64) for split in splits)
    k = int(first.max(initial=-1)) + 1
    for repeat, split in enumerate(later, 1):
        if len(np.setdiff1d(split, np.arange(repeat * k, (repeat + 1) * k))):
            message = f"fold_r{repeat} should have the folds {repeat * k} to {(repeat + 1) * k - 1}"
            raise DataError.single("folds.csv", message)
    return FoldTable(
        image_paths=paths,
        targets=targets,
        groups=groups if any(groups) else None,
        fold=first,
        hash=folds_hash(csv_text),
        later=tuple(later),
    )


def _header(repeats: int) -> tuple[str, ...]:
    return (*HEADER, *(f"fold_r{repeat}" for repeat in range(1, repeats)))


def _is_int(text: str) -> bool:
    """True for a fold's number: what is read back as folds is counted up to the highest one."""
    return re.fullmatch("-[12]|[0-9]{1,3}", text) is not None


def _k_folds(manifest: Manifest, config: FoldsConfig, repeat: int) -> NDArray[np.int64]:
    seed = config.seed
    if repeat:  # not seed + 1, which would be the next seed's first split
        seed = int(np.random.SeedSequence((seed, repeat)).generate_state(1)[0])
    if manifest.groups is None:
        return deal_rows(manifest.labels, config.k, seed)
    group = _first_seen(manifest.groups)
    size = np.bincount(group) / len(group)
    even = np.full(config.k, 1 / config.k)
    rng = np.random.default_rng(seed)
    return deal_groups(group, manifest.labels, size, even, rng, mixed=repeat > 0)[group]


def _fixed_split(manifest: Manifest, config: FoldsConfig) -> NDArray[np.int64]:
    rng = np.random.default_rng(config.seed)
    valid, test = config.valid_fraction, config.test_fraction
    if manifest.groups is None:
        return _split_rows(manifest.labels, valid, test, rng)
    group = _first_seen(manifest.groups)
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
        labels = np.unique(_first_seen(manifest.groups) * n_classes + labels) % n_classes
    counts = np.bincount(labels, minlength=n_classes)
    small = [f"{manifest.classes[c]} ({counts[c]})" for c in np.flatnonzero(counts < need)]
    if small:
        kind = "images" if manifest.groups is None else "groups"
        sides = f"folds.k: {config.k}" if config.k > 1 else f"{need} sides of the split (k: 1)"
        advice = f"add {kind}, remove the class" + (" or lower folds.k" if config.k > 1 else "")
        message = f"classes with fewer {kind} than {sides}: {listing(small)}; {advice}"
        yield Problem("folds", message)


def _split_problems(
    manifest: Manifest, fold: NDArray[np.int64], k: int, first: int
) -> Iterator[Problem]:
    """What is wrong with a split (n,) into 0 .. k-1, whose folds are numbered from `first` on."""
    n_classes = len(manifest.classes)
    seen = fold != HELD_OUT
    pair = (fold[seen] - TRAIN_ONLY) * n_classes + manifest.labels[seen]
    counts = np.bincount(pair, minlength=(k + 1) * n_classes).reshape(k + 1, n_classes)
    rows, total = counts[1:], counts.sum(axis=0)  # (k, C): those that each fold scores
    empty = [f for f in range(k) if not rows[f].any()]
    if empty:
        named = listing(first + f for f in empty)
        message = f"no rows in fold {named}" + (" (valid)" if k == 1 else "")
        yield Problem("folds", f"{message}; lower folds.k or correct the fold column")
    for f in range(k):
        lost = [manifest.classes[c] for c in np.flatnonzero(total == rows[f])]
        if lost and f not in empty:
            message = (
                f"with fold {first + f} held out, no row is left to train on for {listing(lost)}"
            )
            yield Problem("folds", f"{message}; spread these classes over more folds or groups")
    if manifest.groups is not None:
        group = _first_seen(manifest.groups)
        of_group = np.empty(int(group.max()) + 1, dtype=np.int64)
        of_group[group] = fold
        names = (manifest.groups[row] for row in np.flatnonzero(of_group[group] != fold))
        if torn := list(dict.fromkeys(names)):
            message = f"groups that lie in several folds: {listing(torn)}"
            yield Problem("folds", f"{message}; correct the fold column or the group column")
