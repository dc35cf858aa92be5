"""What a user's lists change of the training rows: excluded images, other labels, merged classes.

Takes the paths and labels of all rows and the config's `data` section, gives labels and the rows
that stay; and gives a merged class's probability back to its classes.
"""

from __future__ import annotations

import json
import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foldrace.config.schema import DataConfig
from foldrace.config.texts import load_json
from foldrace.core.errors import Problem, did_you_mean, listing
from foldrace.core.opening import file_fault
from foldrace.dataset.images import natural_key
from foldrace.dataset.left_out import LISTED_TWICE, LeftOut
from foldrace.dataset.tables import Table, clean, read_labels, read_table

MERGED = "merged_classes.json"
_EXCLUDED = "excluded"

Merged = Mapping[str, Mapping[str, int]]
"""Merged class -> each of its own classes -> number of its training rows."""


@dataclass(frozen=True)
class Curated:
    """The rows as the lists leave them."""

    names: tuple[str, ...]
    """Label of every row, (n,), also of those that do not stay."""
    kept: NDArray[np.int64]
    """Rows that stay, ascending."""
    left_out: tuple[LeftOut, ...]
    merged: Merged
    notes: tuple[Problem, ...]
    """What the lists have changed, for people."""


def curate(
    root: Path,
    paths: Sequence[str],
    names: Sequence[str],
    data: DataConfig,
    problems: list[Problem],
) -> Curated:
    """Apply `duplicates: drop` to rows of one path, `exclude`, `fixes` and `merge_classes`.

    `root` is the folder that relative paths start from. Adds to `problems` what a list names and
    the training data do not have.
    """
    labels, notes = list(names), list[Problem]()
    left_out: dict[int, LeftOut] = {}
    if data.duplicates == "drop":
        left_out |= _listed_twice(paths, names)
    row_of = {_compared(root, path): row for row, path in enumerate(paths)}
    rows_of_stem = _stems(row_of)
    for row in _rows("data.exclude", data.exclude, data, (root, row_of, rows_of_stem), problems):
        left_out[row] = LeftOut(paths[row], "training", _EXCLUDED)
    fixed = _fixes(data, labels, (root, row_of, rows_of_stem), problems)
    changed = [row for row, name in fixed.items() if labels[row] != name]
    if fixed:
        shown = listing((f"{paths[r]}: {labels[r]} -> {fixed[r]}" for r in changed), 5)
        notes.append(
            Problem(
                "data.fixes", f"{len(changed):,} label{'s' * (len(changed) != 1)} changed: {shown}"
            )
        )
    for row in changed:
        labels[row] = fixed[row]
    kept = np.array([row for row in range(len(paths)) if row not in left_out], dtype=np.int64)
    merged = _merged(data, Counter(labels[row] for row in kept), problems)
    name_of = {own: name for name, owns in merged.items() for own in owns}
    for name, owns in merged.items():
        parts = ", ".join(f"{own} ({count:,} images)" for own, count in owns.items())
        notes.append(Problem("data.merge_classes", f"{name} is {parts}"))
    labels = [name_of.get(label, label) for label in labels]
    if kept.size and len(set(names)) > 1 and len({labels[row] for row in kept}) < 2:
        message = "leave one class alone; needed: at least 2"
        problems.append(Problem("data.exclude, data.merge_classes", message))
    out = tuple(left_out[row] for row in sorted(left_out))
    return Curated(tuple(labels), kept, out, merged, tuple(notes))


def own_classes(classes: Iterable[str], merged: Merged) -> tuple[str, ...]:
    """The classes that a submission has: in place of a merged class those that it is made of."""
    own = [part for name in classes for part in merged.get(name, (name,))]
    return tuple(sorted(own, key=natural_key)) if merged else tuple(own)


def split_merged(
    prob: NDArray[np.float64], classes: Sequence[str], merged: Merged
) -> NDArray[np.float64]:
    """(n, C') probabilities of `own_classes`, from (n, C) of `classes`; rows keep their sum.

    A merged class's probability is divided as its training rows were.
    """
    if not merged:
        return prob
    column: dict[str, NDArray[np.float64]] = {}
    for i, name in enumerate(classes):
        owns = merged.get(name, {name: 1})
        total = sum(owns.values())
        column |= {own: prob[:, i] * (count / total) for own, count in owns.items()}
    return np.stack([column[own] for own in own_classes(classes, merged)], axis=1)


def merged_json(merged: Merged) -> bytes:
    """The content of the run folder's `merged_classes.json`."""
    return json.dumps(merged, indent=1, ensure_ascii=False).encode(errors="surrogateescape")


def read_merged(data: bytes) -> Merged:
    """What `merged_json` wrote; raises ValueError for anything else."""
    found = load_json(data.decode(errors="surrogateescape"))
    parts = list(found.values()) if isinstance(found, dict) else [None]
    if not all(isinstance(own, dict) and own and _are_counts(own.values()) for own in parts):
        raise ValueError("should be {merged class: {class: number of its training rows}}")
    return found  # type: ignore[no-any-return]


def _are_counts(values: Iterable[object]) -> bool:
    return all(isinstance(v, int) and v >= 0 for v in values) and any(values)


Index = tuple[Path, Mapping[str, int], Mapping[str, list[int]]]
"""Folder of the images; row by compared path; rows by compared path without its suffix."""


def _compared(root: Path, path: str) -> str:
    """A path as it is compared: relative to the images' folder where it lies there."""
    plain = posixpath.normpath(clean(path).replace("\\", "/"))
    home = root.as_posix().rstrip("/") + "/"
    return plain.removeprefix(home) if posixpath.isabs(plain) else plain


def _stems(row_of: Mapping[str, int]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for path, row in row_of.items():
        rows.setdefault(posixpath.splitext(path)[0], []).append(row)
    return rows


def _listed_twice(paths: Sequence[str], names: Sequence[str]) -> dict[int, LeftOut]:
    """All rows but the first of one path and label; all of them where the labels differ."""
    rows: dict[str, list[int]] = {}
    for row, path in enumerate(paths):
        rows.setdefault(posixpath.normpath(clean(path)), []).append(row)
    found = {}
    for same in rows.values():
        labels = list(dict.fromkeys(names[row] for row in same))
        detail = "" if len(labels) == 1 else f"with the labels {', '.join(labels)}"
        for row in same[1 if len(labels) == 1 else 0 :]:
            found[row] = LeftOut(paths[row], "training", LISTED_TWICE, detail)
    return found


def _table(
    key: str, path: str | None, data: DataConfig, problems: list[Problem]
) -> tuple[Table, list[str]] | None:
    """A list's table and its paths."""
    if path is None:
        return None
    fault = file_fault(Path(path))
    if fault is not None:
        problems.append(Problem(key, f"{path} {fault}; needed: a table of image paths"))
        return None
    table = read_table(Path(path), path, problems)
    if table is None:
        return None
    known = (data.image_column, "image_path")
    only = table.columns[0] if len(table.columns) == 1 else data.image_column
    column = next((name for name in known if clean(name) in table.columns), only)
    return table, table.column(column, "data.image_column", problems)


def _rows(
    key: str, path: str | None, data: DataConfig, index: Index, problems: list[Problem]
) -> list[int]:
    """Row of each path that the list names, in its order; [] where there is no list."""
    read = _table(key, path, data, problems)
    return [] if read is None else _found(key, read[0], read[1], index, problems)


def _found(
    key: str, table: Table, paths: Sequence[str], index: Index, problems: list[Problem]
) -> list[int]:
    root, row_of, rows_of_stem = index
    rows, unknown = [], []
    for line, path in zip(table.lines, paths, strict=False):
        compared = _compared(root, path)
        stems = rows_of_stem.get(compared, [])
        row = row_of.get(compared, stems[0] if len(stems) == 1 else -1)
        rows.append(row)
        if row < 0:
            unknown.append(f"{path} (line {line})")
    if unknown:
        message = f"{key} names images that data.train does not have: {listing(unknown)}"
        problems.append(Problem(table.name, f"{message}; write paths as data.train has them"))
        return []
    return rows


def _label_column(table: Table, data: DataConfig) -> str | tuple[str, ...]:
    """The config's; where the training table's was found by what is in it, the other of two."""
    column = data.label_column
    if isinstance(column, str) and clean(column) not in table.columns and len(table.columns) == 2:
        others = [name for name in table.columns if name not in (data.image_column, "image_path")]
        return others[-1]
    return column


def _fixes(
    data: DataConfig, names: Sequence[str], index: Index, problems: list[Problem]
) -> dict[int, str]:
    """Row -> the label that `data.fixes` gives it."""
    read = _table("data.fixes", data.fixes, data, problems)
    if read is None:
        return {}
    table, paths = read
    rows = _found("data.fixes", table, paths, index, problems)
    labels = read_labels(table, _label_column(table, data), [], problems)
    known = set(names)
    strange = [label for label in dict.fromkeys(labels) if label and label not in known]
    if strange:
        hint = f"{did_you_mean(strange[0], sorted(known))}classes: {listing(sorted(known))}"
        message = f"has labels that no training image has: {listing(strange)}; {hint}"
        problems.append(Problem(table.name, message))
        return {}
    fixed: dict[int, str] = {}
    for row, label in zip(rows, labels, strict=False):
        if fixed.setdefault(row, label) != label:
            message = f"gives one image two labels: {paths[rows.index(row)]}"
            problems.append(Problem(table.name, message))
    return fixed


def _merged(data: DataConfig, counts: Mapping[str, int], problems: list[Problem]) -> Merged:
    merged: dict[str, dict[str, int]] = {}
    taken: set[str] = set()
    for name, written in data.merge_classes.items():
        key, owns = f"data.merge_classes.{name}", [clean(own) for own in written]
        unknown = [own for own in owns if own not in counts]
        if unknown:
            hint = did_you_mean(unknown[0], counts)
            message = f"no training image has the class {listing(unknown)}; {hint}"
            problems.append(Problem(key, f"{message}classes: {listing(sorted(counts))}"))
        twice = [own for own in owns if own in taken or owns.count(own) > 1]
        if twice:
            problems.append(Problem(key, f"{listing(dict.fromkeys(twice))} is merged twice"))
        if clean(name) in counts and clean(name) not in owns:
            message = "is a class of its own; name it in the list, or give another name"
            problems.append(Problem(key, message))
        if len(owns) < 2:
            problems.append(Problem(key, f"needs at least 2 classes, got {listing(owns)}"))
        if not clean(name) or clean(name) in merged:
            state = "is there twice" if clean(name) else "is no name"
            problems.append(Problem(key, f"{state}; give each list a name of its own"))
        taken.update(owns)
        merged[clean(name)] = {own: counts.get(own, 0) for own in owns}
    return merged
