"""The fold of each training row: decided once, written to folds.csv, hashed.

Takes a `Manifest` and the config's `folds` section, gives an array of folds and the CSV's text,
or a DataError with every problem. The same seed gives the same folds everywhere.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foldrace.config.schema import FoldsConfig
from foldrace.core.errors import DataError, Problem, listing
from foldrace.dataset.manifest import Manifest

TRAIN_ONLY = -1  # k: 1: trained on, never scored
HELD_OUT = -2  # k: 1 with test_fraction: seen by no trial
HEADER = ("image_path", "target", "group", "fold")

_WORDS = {"train": TRAIN_ONLY, "valid": 0, "test": HELD_OUT}
_SIDES = (TRAIN_ONLY, 0, HELD_OUT)


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
    rows = [row for row in csv.reader(io.StringIO(csv_text, newline="")) if row]
    if not rows or tuple(rows[0]) != HEADER:
        raise DataError.single("folds.csv", f"the header should be {','.join(HEADER)}")
    odd = [i for i, row in enumerate(rows[1:], 1) if len(row) != 4 or not _is_int(row[3])]
    if odd:
        message = f"row {listing(odd)} should have four cells, the last one a whole number"
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
    return text.removeprefix("-").isascii() and text.removeprefix("-").isdigit()


def _k_folds(manifest: Manifest, config: FoldsConfig) -> NDArray[np.int64]:
    # Here, since every worker process imports this file, and most never make folds: 2 s less.
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    grouped = manifest.groups is not None
    splitter = (StratifiedGroupKFold if grouped else StratifiedKFold)(
        n_splits=config.k, shuffle=True, random_state=config.seed % 2**32
    )
    fold = np.full(len(manifest), -1, dtype=np.int64)
    splits = splitter.split(np.zeros(len(manifest)), manifest.labels, manifest.groups)
    for k, (_, rows) in enumerate(splits):
        fold[rows] = k
    return fold


def _fixed_split(manifest: Manifest, config: FoldsConfig) -> NDArray[np.int64]:
    rng = np.random.default_rng(config.seed)
    if manifest.groups is None:
        return _split_rows(manifest.labels, config.valid_fraction, config.test_fraction, rng)
    return _split_groups(manifest, config.valid_fraction, config.test_fraction, rng)


def _split_rows(
    labels: NDArray[np.int64], valid: float, test: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Sides (n,) with each class's fractions to within a row, and one row of it at least."""
    fold = np.full(len(labels), TRAIN_ONLY, dtype=np.int64)
    ends = np.cumsum(np.bincount(labels))
    quota_valid = np.diff(np.rint(ends * valid), prepend=0)  # rounding does not add up over classes
    quota_test = np.diff(np.rint(ends * test), prepend=0)
    for label, (n_valid, n_test) in enumerate(zip(quota_valid, quota_test, strict=True)):
        rows = rng.permutation(np.flatnonzero(labels == label))
        n_test = min(max(int(n_test), 1), len(rows) - 2) if test > 0 else 0
        n_valid = min(max(int(n_valid), 1), len(rows) - 1 - n_test)
        fold[rows[:n_valid]] = 0
        fold[rows[n_valid : n_valid + n_test]] = HELD_OUT
    return fold


def _split_groups(
    manifest: Manifest, valid: float, test: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Sides (n,) of whole groups, the largest first, each to the side that lacks it most.

    As in StratifiedGroupKFold. The balance counts each class's rows, and as much the groups.
    """
    names, group = np.unique(np.array(manifest.groups), return_inverse=True)
    n_classes = len(manifest.classes)
    share = np.zeros((len(names), n_classes + 1))  # (G, C + 1), each column sums to 1
    np.add.at(share, (group, manifest.labels), 1 / np.bincount(manifest.labels)[manifest.labels])
    share[:, n_classes] = 1 / len(names)
    weight = np.append(np.full(n_classes, 1 / n_classes), 1.0)  # (C + 1,)
    target = np.array([1 - valid - test, valid, test][: 3 if test > 0 else 2])[:, None]  # (S, 1)
    lacking = np.repeat(target, n_classes + 1, axis=1)  # (S, C + 1)
    side = np.zeros(len(names), dtype=np.int64)
    order = rng.permutation(len(names))
    for g in order[np.argsort(-np.bincount(group)[order], kind="stable")]:
        # lowers the most sum_s |lacking_s|^2 / target_s
        side[g] = np.argmax(((lacking - share[g] / 2) / target) @ (share[g] * weight))
        lacking[side[g]] -= share[g]
    for s in range(len(target)):  # of very few groups, a small side may have got none
        if not (side == s).any():
            side[next(g for g in order[::-1] if (side == side[g]).sum() > 1)] = s
    return np.array(_SIDES, dtype=np.int64)[side][group]


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
    units = np.arange(len(manifest)) if manifest.groups is None else np.array(manifest.groups)
    small = []
    for label, name in enumerate(manifest.classes):
        count = len(np.unique(units[manifest.labels == label]))
        if count < need:
            small.append(f"{name} ({count})")
    if small:
        kind = "images" if manifest.groups is None else "groups"
        sides = f"folds.k: {config.k}" if config.k > 1 else f"{need} sides of the split (k: 1)"
        advice = f"add {kind}, remove the class" + (" or lower folds.k" if config.k > 1 else "")
        message = f"classes with fewer {kind} than {sides}: {listing(small)}; {advice}"
        yield Problem("folds", message)


def _split_problems(manifest: Manifest, fold: NDArray[np.int64], k: int) -> Iterator[Problem]:
    empty = [f for f in range(k) if not (fold == f).any()]
    if empty:
        message = f"no rows in fold {listing(empty)}" + (" (valid)" if k == 1 else "")
        yield Problem("folds", f"{message}; lower folds.k or correct the fold column")
    n_classes = len(manifest.classes)
    for f in range(k):
        train = np.bincount(manifest.labels[(fold != f) & (fold != HELD_OUT)], minlength=n_classes)
        lost = [manifest.classes[c] for c in np.flatnonzero(train == 0)]
        if lost and f not in empty:
            message = f"with fold {f} held out, no row is left to train on for {listing(lost)}"
            yield Problem("folds", f"{message}; spread these classes over more folds or groups")
    if manifest.groups is not None:
        sides: dict[str, set[int]] = {}
        for group, f in zip(manifest.groups, fold.tolist(), strict=True):
            sides.setdefault(group, set()).add(f)
        torn = [group for group, folds in sides.items() if len(folds) > 1]
        if torn:
            message = f"groups that lie in several folds: {listing(torn)}"
            yield Problem("folds", f"{message}; correct the fold column or the group column")
