"""A guess at what the columns of a user's table are: images, labels, groups, folds.

Takes a `Table` and the images that lie around it, gives the config's keys for it, or problems that
list the possibilities and the key that decides.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from foldrace.config.schema import DataConfig
from foldrace.core.errors import Problem, listing
from foldrace.core.synonyms import plain_name
from foldrace.dataset.archive import unpack
from foldrace.dataset.image_paths import ImageIndex, Place, find_image_root, preferred
from foldrace.dataset.images import has_image_suffix
from foldrace.dataset.tables import (
    WHOLE_NUMBER,
    Table,
    bit,
    clean,
    is_number,
    read_labels,
)

_LABELS = frozenset(("target", "label", "class", "category", "y"))
_GROUPS = frozenset(
    ("group", "patient", "subject", "person", "participant", "vehicle", "animal", "individual",
     "case", "study", "session", "scene", "video", "sequence", "specimen")
)  # fmt: skip
_FOLDS = frozenset(("fold", "kfold", "cvfold", "split"))
_SIDES = {"train", "valid", "test"}
_SAMPLE = 1000  # rows that tell which column names images
_MOST_FOLDS = 100
_KEYS = {"train": "image_column", "test": "test_image_column"}
_ROWS_PER_GROUP = 2.0  # on average: with fewer, a column of groups is one of ids


@dataclass
class Columns:
    """The config's keys for one table, and what is told about them."""

    image_column: str | None = None
    images: str | None = None
    """Folder or zip that the paths start from; None: the table's folder."""
    label_column: str | tuple[str, ...] | None = None
    """A tuple: one-hot columns."""
    group_column: str | None = None
    fold_column: str | None = None
    folds: int | None = None
    """Number of folds in that column; 1: a fixed split."""
    notes: list[str] = field(default_factory=list)


def named_images(table: Table, named: str, folder: Path, role: str) -> tuple[str, list[str]]:
    """The column of images that a config names, and what is told of it.

    Where it names none, and there is none of the usual name: the one whose cells lead to images.
    """
    if clean(named) in table.columns or named != DataConfig.model_fields["image_column"].default:
        return named, []
    found = find_image_column(table, ImageIndex(folder), role, None, []).image_column
    if found is None:
        return named, []
    return found, [f"{table.name}: images in column {found} (data.{_KEYS[role]})"]


def named_labels(
    table: Table,
    named: str | tuple[str, ...],
    others: Sequence[str | None],
    notes: list[str],
    problems: list[Problem],
) -> str | tuple[str, ...] | None:
    """The columns of labels that a config names; where it names none, the likely ones.

    `others`: columns that hold something else. None, and a problem, where several are as likely.
    """
    default = DataConfig.model_fields["label_column"].default
    if named != default or clean(default) in table.columns:
        return named
    free = [name for name in dict.fromkeys(table.columns) if name not in others]
    if not likely_labels(table, free, ()):
        return named
    columns = Columns()
    found = _label_column(table, free, (), columns, problems)
    if found is not None:
        where = shown_column(found)
        notes += [*columns.notes, f"{table.name}: labels in {where} (data.label_column)"]
    return found


def find_image_column(
    table: Table, index: ImageIndex, role: str, given: str | None, problems: list[Problem]
) -> Columns:
    """The column of images and the folder or zip that its paths start from.

    `role` is train or test: a folder of that name wins where several hold images of these names.
    `given`: the column that the user named. No column is no problem here.
    """
    columns = Columns()
    rows = table.rows[:: len(table.rows) // _SAMPLE + 1]
    names = [n for n in table.columns if given is None or n == clean(given)]
    best = _image_places(table, index, names, rows, numbers=False)
    best = best or _image_places(table, index, names, rows, numbers=True)
    if best is not None:
        columns.image_column, places = best
        most = max(places.values())
        paths = [row[table.columns.index(columns.image_column)] for row in rows]
        likely = preferred([p for p, n in places.items() if n == most], role, index.folder)
        if len(likely) > 1:
            names = [_shown(place) for place in likely]
            problems.append(
                Problem(
                    table.name,
                    f"the images of column {columns.image_column!r} lie in each of "
                    f"{listing(names)}; choose: --set data.{role}_images={names[0]}",
                )
            )
        columns.images = _image_key(likely[0], table.folder, paths)
    return columns


def _image_places(
    table: Table,
    index: ImageIndex,
    names: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: bool,
) -> tuple[str, Counter[Place]] | None:
    """The column of these that leads to most images, and how many from each place; or None."""
    best: tuple[float, bool] = (0.0, False)
    found = None
    for name in names:
        cells = [row[table.columns.index(name)] for row in rows]
        places = Counter(place for cell in cells for place in set(index.places(cell, numbers)))
        share = max(places.values(), default=0) / max(len(rows), 1)
        written = all(map(has_image_suffix, cells))
        if share >= 0.5 and (share, written) > best:
            best, found = (share, written), (name, places)
    return found


def find_labels(
    table: Table,
    columns: Columns,
    classes: Sequence[str],
    given: Mapping[str, object],
    problems: list[Problem],
) -> None:
    """Add the columns of labels, groups and folds to `columns`, which has that of the images.

    `classes`: the sample submission's columns beside the ids, or nothing; `given`: the user's keys
    of the config's section `data`, and `fold_column`.
    """
    others = [name for name in dict.fromkeys(table.columns) if name != columns.image_column]
    if "fold_column" not in given:
        _find_folds(table, columns, others)
    others = [name for name in others if name != columns.fold_column]
    if "label_column" in given:
        label = given["label_column"]
        columns.label_column = tuple(map(str, label)) if isinstance(label, list) else str(label)
    else:
        columns.label_column = _label_column(table, others, classes, columns, problems)
    if columns.label_column is not None and "group_column" not in given:
        others = [name for name in others if name != columns.label_column]
        _find_groups(table, columns, others, problems)


def _label_column(
    table: Table,
    others: Sequence[str],
    classes: Sequence[str],
    columns: Columns,
    problems: list[Problem],
) -> str | tuple[str, ...] | None:
    found = likely_labels(table, others, classes)
    if not found:
        problems.append(
            Problem(
                table.name,
                f"no column holds labels (a few values, each in many rows); columns: "
                f"{listing(table.columns)}; name it: --set data.label_column=NAME",
            )
        )
        return None
    if len(found) > 1:
        names = [name for name in found if isinstance(name, str)]
        first = table.cells(names[0])
        if len(names) < len(found) or any(
            not _same_partition(first, table.cells(name)) for name in names[1:]
        ):
            shown = listing(_with_count(table, name) for name in found)
            problems.append(
                Problem(
                    table.name,
                    f"each of these columns may hold the labels: {shown}; choose: "
                    f"--set data.label_column={names[0]}",
                )
            )
            return None
        words = [name for name in names if not all(map(is_number, table.cells(name)))]
        same = ", ".join(names)
        found = [*words, *names]
        columns.notes.append(f"columns {same} say the same: {found[0]} has the class names")
    return found[0]


def likely_labels(
    table: Table, others: Sequence[str], classes: Sequence[str], sure: bool = False
) -> list[str | tuple[str, ...]]:
    """The columns that may hold the labels; one-hot columns, as a tuple, are one.

    `classes`: the sample submission's columns beside the ids, or nothing; `sure`: leave out those
    that only look as if they might.
    """
    cells = {name: table.cells(name) for name in others}
    of_classes = [n for n in others if set(cells[n]) == set(classes) or [n] == list(classes)]
    one_hot = _one_hot(cells)
    likely = [n for n in others if _may_be_labels(cells[n]) and n not in one_hot]
    named = [name for name in others if _word(name) in _LABELS]
    free = [name for name in likely if _word(name) not in _GROUPS | _FOLDS]
    lone = [one_hot] if one_hot else []
    of_sample = lone if set(classes) == set(one_hot) else []
    either: list[str | tuple[str, ...]] = [*free, *lone]
    found: tuple[Sequence[str | tuple[str, ...]], ...]
    found = (of_classes, of_sample, [n for n in named if n in likely])
    found += ([] if free else lone,) if sure else (named, either, likely)
    return next(([*names] for names in found if names), [])


def shown_column(name: str | tuple[str, ...] | None) -> str:
    """The column of labels as messages name it."""
    return (
        f"columns [{listing(name, 6)}] (one-hot)" if isinstance(name, tuple) else f"column {name}"
    )


def _with_count(table: Table, name: str | tuple[str, ...]) -> str:
    if isinstance(name, tuple):
        return shown_column(name)
    return f"{name} ({len(set(table.cells(name)))} values)"


def _find_folds(table: Table, columns: Columns, others: Sequence[str]) -> None:
    for name in others:
        if _word(name) not in _FOLDS:
            continue
        values = set(table.cells(name))
        numbers = {str(k) for k in range(len(values))}
        if values == numbers and 2 <= len(values) <= _MOST_FOLDS:
            columns.fold_column, columns.folds = name, len(values)
        elif {"train", "valid"} <= values <= _SIDES:
            columns.fold_column, columns.folds = name, 1
        if columns.fold_column is not None:
            columns.notes.append(f"column {name} gives the folds")
            return


def _find_groups(
    table: Table, columns: Columns, others: Sequence[str], problems: list[Problem]
) -> None:
    labels = read_labels(table, columns.label_column or "", [], [])
    found: list[str] = []
    for name in others:
        cells = table.cells(name)
        groups = len(set(cells))
        if _word(name) not in _GROUPS or "" in cells or groups < 2:
            continue
        if len(cells) < _ROWS_PER_GROUP * groups:
            continue
        lone = [c for c, members in _groups_of_classes(labels, cells).items() if len(members) < 2]
        if lone:
            columns.notes.append(
                f"column {name} is not taken for groups: all rows of {listing(lone, 3)} are in one"
            )
            continue
        found.append(name)
    if len(found) > 1:
        problems.append(
            Problem(
                table.name,
                f"each of these columns may hold groups that must not be torn by folds: "
                f"{listing(found)}; choose: --set data.group_column={found[0]}, or null for none",
            )
        )
    elif found:
        columns.group_column = found[0]
        groups = len(set(table.cells(found[0])))
        columns.notes.append(
            f"column {found[0]} has {groups:,} groups of {len(table.rows) / groups:.1f} rows, and "
            "no fold tears one (--set data.group_column=null: folds may)"
        )


def _groups_of_classes(labels: Sequence[str], cells: Sequence[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for label, group in zip(labels, cells, strict=False):
        found.setdefault(label, set()).add(group)
    return found


def _may_be_labels(cells: Sequence[str]) -> bool:
    """True for a few values, each in two rows or more on average, and no measured numbers."""
    values = set(cells)
    if not 2 <= len(values) <= len(cells) / 2 or "" in values:
        return False
    whole = all(re.fullmatch(WHOLE_NUMBER, value) for value in values)
    return whole or not all(is_number(value) for value in values)


def _one_hot(cells: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Columns of 0 and 1 that together have one 1 in each row; none where there are no such.

    A class without an image has a column of 0 alone.
    """
    bits = {name: [bit(cell) for cell in column] for name, column in cells.items()}
    binary = {name: column for name, column in bits.items() if None not in column}
    used = [name for name, column in binary.items() if 1 in column]
    one_each = all(sum(map(bool, row)) == 1 for row in zip(*binary.values(), strict=True))
    return tuple(binary) if len(used) > 1 and one_each else ()


def _same_partition(left: Sequence[str], right: Sequence[str]) -> bool:
    pairs = set(zip(left, right, strict=False))
    return len(pairs) == len(set(left)) == len(set(right))


def _word(name: str) -> str:
    """A column's name as the sets above have it: `Patient_ID` -> patient, `labels` -> label."""
    word = plain_name(name)
    for end in ("id", "name", "no", "number"):
        word = word.removesuffix(end) if len(word) > len(end) else word
    return word if word in _LABELS | _GROUPS | _FOLDS else word.removesuffix("s")


def _shown(place: Place) -> str:
    return str(place[0] / place[1])


def _image_key(place: Place, folder: Path, paths: Sequence[str]) -> str | None:
    """The value of `train_images` or `test_images` for a place; None: the table's own folder."""
    home, root = place
    if home.is_dir():
        return None if home / root == folder else str(home / root)
    unpacked = unpack(home)
    # The reader looks through folders that wrap everything; another root within a zip has no name.
    return (
        str(home) if find_image_root(unpacked, paths) == unpacked / root else str(unpacked / root)
    )
