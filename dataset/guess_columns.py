"""A guess at what the columns of a user's table are: images, labels, groups, folds.

Takes a `Table` and the images that lie around it, gives the config's keys for it, or problems that
list the possibilities and the key that decides.
"""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from foldrace.core.errors import Problem, listing, plain_name
from foldrace.dataset.archive import member_names, unpack
from foldrace.dataset.images import find_images, has_image_suffix
from foldrace.dataset.tables import Table, clean, find_image_root

_LABELS = frozenset(("target", "label", "class", "category", "y"))
_GROUPS = frozenset(
    ("group", "patient", "subject", "person", "participant", "vehicle", "animal", "individual",
     "case", "study", "session", "scene", "video", "sequence", "specimen")
)  # fmt: skip
_FOLDS = frozenset(("fold", "kfold", "cvfold", "split"))
_SIDES = {"train", "valid", "test"}
_SAMPLE = 1000  # rows that tell which column names images
_MOST_FOLDS = 100
_ROWS_PER_GROUP = 2.0  # on average: with fewer, a column of groups is one of ids

Place = tuple[Path, str]
"""A folder or zip, and the folder in it that paths start from ('' for itself)."""


class ImageIndex:
    """Images in a folder and in the zips that lie in it, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._by_name: dict[str, list[tuple[Path, str]]] = {}
        for path in find_images(folder):
            self._add(folder, path)
        for archive in sorted(folder.glob("*.[zZ][iI][pP]")):
            for path in filter(has_image_suffix, member_names(archive)):
                self._add(archive, path)

    def _add(self, home: Path, path: str) -> None:
        name = clean(posixpath.basename(path))
        for key in (name, posixpath.splitext(name)[0]):
            self._by_name.setdefault(key, []).append((home, path))

    def places(self, written: str) -> Iterator[Place]:
        """The places from which a path, or an id without a suffix, leads to an image."""
        wanted = clean(posixpath.normpath(written.strip().replace("\\", "/")))
        if posixpath.isabs(wanted) and os.path.exists(written.strip()):
            yield self.folder, ""  # wherever the paths of a table start from
        for home, path in self._by_name.get(posixpath.basename(wanted), ()):
            end = clean(path)
            if not has_image_suffix(wanted):
                end = posixpath.splitext(end)[0]
            if end == wanted or end.endswith(f"/{wanted}"):
                yield home, path[: len(end) - len(wanted)].rstrip("/")


@dataclass
class Columns:
    """The config's keys for one table, and what is told about them."""

    image_column: str | None = None
    images: str | None = None
    """Folder or zip that the paths start from; None: the table's folder."""
    label_column: str | None = None
    group_column: str | None = None
    fold_column: str | None = None
    folds: int | None = None
    """Number of folds in that column; 1: a fixed split."""
    notes: list[str] = field(default_factory=list)


def find_image_column(
    table: Table, index: ImageIndex, role: str, given: str | None, problems: list[Problem]
) -> Columns:
    """The column of images and the folder or zip that its paths start from.

    `role` is train or test: a folder of that name wins where several hold images of these names.
    `given`: the column that the user named. No column is no problem here.
    """
    columns = Columns()
    best: tuple[float, bool, Counter[Place]] = (0.0, False, Counter())
    rows = table.rows[:: len(table.rows) // _SAMPLE + 1]
    for i, name in enumerate(table.columns):
        if given is not None and name != clean(given):
            continue
        places: Counter[Place] = Counter()
        for row in rows:
            places.update(set(index.places(row[i])))
        share = max(places.values(), default=0) / max(len(rows), 1)
        written = all(has_image_suffix(row[i]) for row in rows)
        if share >= 0.5 and (share, written) > best[:2]:
            best, columns.image_column = (share, written, places), name
    if columns.image_column is not None:
        places = best[2]
        most = max(places.values())
        paths = [row[table.columns.index(columns.image_column)] for row in rows]
        likely = _preferred([p for p, n in places.items() if n == most], role, index.folder)
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
        columns.label_column = str(given["label_column"])
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
) -> str | None:
    cells = {name: _cells(table, name) for name in others}
    of_classes = [n for n in others if set(cells[n]) == set(classes) or [n] == list(classes)]
    one_hot = _one_hot(cells)
    likely = [n for n in others if _may_be_labels(cells[n]) and n not in one_hot]
    named = [name for name in others if _word(name) in _LABELS]
    free = [name for name in likely if _word(name) not in _GROUPS | _FOLDS]
    for found in (of_classes, [n for n in named if n in likely], named, free, likely):
        if found:
            break
    if not found:
        advice = "write one column with the class names instead"
        hint = f". {listing(one_hot, 6)} are one-hot: {advice}" if one_hot else ""
        problems.append(
            Problem(
                table.name,
                f"no column holds labels (a few values, each in many rows); columns: "
                f"{listing(table.columns)}{hint}; name it: --set data.label_column=NAME",
            )
        )
        return None
    if len(found) > 1:
        first = cells[found[0]]
        if any(not _same_partition(first, cells[name]) for name in found[1:]):
            shown = listing(f"{name} ({len(set(cells[name]))} values)" for name in found)
            problems.append(
                Problem(
                    table.name,
                    f"each of these columns may hold the labels: {shown}; choose: "
                    f"--set data.label_column={found[0]}",
                )
            )
            return None
        words = [name for name in found if not all(map(_is_number, cells[name]))]
        same = ", ".join(found)
        found = words or found
        columns.notes.append(f"columns {same} say the same: {found[0]} has the class names")
    return found[0]


def _find_folds(table: Table, columns: Columns, others: Sequence[str]) -> None:
    for name in others:
        if _word(name) not in _FOLDS:
            continue
        values = set(_cells(table, name))
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
    labels = _cells(table, columns.label_column or "")
    found: list[str] = []
    for name in others:
        cells = _cells(table, name)
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
        groups = len(set(_cells(table, found[0])))
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
    return not all(_is_number(v) for v in values) or all(v.lstrip("-").isdigit() for v in values)


def _one_hot(cells: Mapping[str, Sequence[str]]) -> list[str]:
    """Columns of 0 and 1 that together have one 1 in each row; none where there are no such."""
    binary = [
        name
        for name, column in cells.items()
        if all(map(_is_number, column)) and {float(v) for v in column} == {0.0, 1.0}
    ]
    rows = zip(*(cells[name] for name in binary), strict=True)
    one_each = all(sum(map(float, row)) == 1 for row in rows)
    return binary if len(binary) > 1 and one_each else []


def _same_partition(left: Sequence[str], right: Sequence[str]) -> bool:
    pairs = set(zip(left, right, strict=False))
    return len(pairs) == len(set(left)) == len(set(right))


def _cells(table: Table, name: str) -> list[str]:
    if name not in table.columns:
        return []
    index = table.columns.index(name)
    return [clean(row[index]) for row in table.rows]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _word(name: str) -> str:
    """A column's name as the sets above have it: `Patient_ID` -> patient, `labels` -> label."""
    word = plain_name(name)
    for end in ("id", "name", "no", "number"):
        word = word.removesuffix(end) if len(word) > len(end) else word
    return word if word in _LABELS | _GROUPS | _FOLDS else word.removesuffix("s")


def _preferred(places: Sequence[Place], role: str, folder: Path) -> list[Place]:
    """The places that suit the table best; several where nothing tells them apart."""
    other = {"train": "test", "test": "train"}[role]

    def rank(place: Place) -> tuple[bool, bool, bool]:
        home, root = place
        path = f"{home.name if home != folder else ''}/{root}".casefold()
        return role not in path, other in path, home != folder  # a folder before its own zip

    best = min(map(rank, places))
    return sorted(place for place in places if rank(place) == best)


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
