"""Sources of rows: tables as people have them, and folders or zips of images.

Takes the paths that the config names, gives a `Table` or a folder, and adds to a list of problems.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from unicodedata import normalize

from foldrace.core.errors import DataError, Problem, listing
from foldrace.core.opening import file_fault
from foldrace.core.synonyms import closest
from foldrace.dataset.archive import unpack
from foldrace.dataset.images import has_image_suffix, holds_image
from foldrace.dataset.readers import TABLE_KINDS, TableFile, is_table, read_records

OWN_TABLES = tuple(
    f"{stem}{suffix}"
    for stem in ("metadata", "_classes")
    for suffix in (".csv", ".jsonl", ".parquet")
)
"""Tables of the images that they lie among, as Hugging Face and Roboflow write them."""
WHOLE_NUMBER = r"-?\d+(\.0+)?"
"""A whole number, also as pandas writes it beside missing ones."""
SPLIT_NAMES = frozenset(("train", "training", "valid", "validation", "val", "test", "testing"))


@dataclass(frozen=True)
class Table:
    """A table as text: no cell is a number or missing ('NA' and '01' stay as they are)."""

    name: str
    folder: Path
    header: tuple[str, ...]
    """Cells of the first line as they are."""
    columns: tuple[str, ...]
    """Names of the columns as they are compared, see `clean`."""
    rows: tuple[list[str], ...]
    lines: tuple[int, ...]
    """Line where each row begins, as an editor counts; of a Parquet file the row's number."""
    delimiter: str = ","
    """What stands between the cells, where it is text."""
    notes: tuple[str, ...] = ()
    """Lines for the user: how it was read."""

    def column(self, name: str, key: str, problems: list[Problem]) -> list[str]:
        """The column's cells, all filled; [] and a problem where that cannot be."""
        count = self.columns.count(clean(name))
        if count != 1:
            near = closest(name, self.columns, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            found = f"columns: {listing(self.columns)}"
            message = f"has no column {name!r}; {found}{hint}. Set {key}"
            if count > 1:
                message = f"has {count} columns {name!r}; {found}; rename or remove all but one"
            problems.append(Problem(self.name, message))
            return []
        index = self.columns.index(clean(name))
        cells = [row[index] for row in self.rows]
        empty = [line for line, cell in zip(self.lines, cells, strict=True) if not cell.strip()]
        if empty:
            message = f"column {name!r} is empty in line {listing(empty)}; fill in or remove them"
            problems.append(Problem(self.name, message))
        return cells

    def paths(self, column: str, key: str, problems: list[Problem]) -> list[str]:
        """The column's cells with `/` between the parts of a path."""
        return [path.replace("\\", "/") for path in self.column(column, key, problems)]

    def cells(self, name: str) -> list[str]:
        """The column's cells as they are compared; [] where there is no such column."""
        if name not in self.columns:
            return []
        index = self.columns.index(name)
        return [clean(row[index]) for row in self.rows]


def read_table(
    path: Path, name: str, problems: list[Problem], encoding: str | None = None
) -> Table | None:
    """The table in a file, by its reader in `READERS`.

    None, and problems with their lines, where it is unsound. `name` is what messages call it,
    `encoding` the user's for text that is not UTF-8.
    """
    file = TableFile(path, name, encoding, problems)
    records = read_records(file)
    if records is None:
        return None
    if len(records) < 2:
        problems.append(Problem(name, "has no rows; needed: a header line and one per image"))
        return None
    _, header = records[0]
    odd = [line for line, cells in records if len(cells) != len(header)]
    if odd:
        message = f"the header has {len(header)} cells, but these lines have another number: "
        problems.append(Problem(name, f"{message}{listing(odd)}; quote values with commas"))
    again = [line for line, cells in records[1:] if cells == header]
    if again:  # tables that were joined as they are
        file.notes.append(f"{name}: the header stands again in line {listing(again)}; left out")
    whole = [(line, cells) for line, cells in records[1:] if len(cells) == len(header)]
    rows = [(line, cells) for line, cells in whole if cells != header]
    return Table(
        name=name,
        folder=path.parent,
        header=tuple(header),
        columns=tuple(clean(cell) for cell in header),
        rows=tuple(cells for _, cells in rows),
        lines=tuple(line for line, _ in rows),
        delimiter=file.delimiter,
        notes=tuple(file.notes),
    )


def clean(cell: str) -> str:
    """A name as it is compared: macOS writes Hangul decomposed (NFD), others composed (NFC)."""
    return normalize("NFC", cell.strip())


def twice(items: Iterable[str]) -> list[str]:
    """The items that occur more than once."""
    return [item for item, count in Counter(items).items() if count > 1]


def read_source(
    key: str, value: str, problems: list[Problem], encoding: str | None = None
) -> Table | Path | None:
    """A table, or the only table in a zip; else the folder of images.

    Of a folder with parts for training and test the one that `key` is about; of a folder with a
    table of its own (`OWN_TABLES`) that table.
    """
    path = Path(value)
    if path.is_file() and (is_table(path) or path.suffix.lower() == ".txt"):
        return read_table(path, value, problems, encoding)
    kinds = f"a {TABLE_KINDS}, a folder or a .zip"
    folder = open_folder(key, value, problems, encoding, kinds)
    if folder is None:
        return None
    part = split_part(folder, key)
    own = own_table(part)
    if own is not None:
        table = read_table(own, f"{own.relative_to(folder)} in {value}", problems, encoding)
        return table and replace(table, notes=(*part_notes(key, folder, part), *table.notes))
    if path.is_dir():
        return folder
    tables = sorted(p for p in folder.rglob("*.*") if is_table(p) and not p.name.startswith("."))
    if not tables:
        return folder
    names = [str(table.relative_to(folder)) for table in tables]
    if len(tables) > 1:
        message = f"holds {len(tables)} tables: {listing(names)}; unpack it and set {key} to one"
        problems.append(Problem(value, message))
        return None
    return read_table(tables[0], f"{names[0]} in {value}", problems, encoding)


def read_labels(
    table: Table, column: str | Sequence[str], notes: list[str], problems: list[Problem]
) -> list[str]:
    """The class of each row; whole numbers lose their `.0`, which a note tells.

    Of one-hot columns the name of the one with the 1. [] and problems where that cannot be.
    """
    if not isinstance(column, str):
        return _one_hot_labels(table, column, problems)
    names = [clean(name) for name in table.column(column, "data.label_column", problems)]
    if any("." in n for n in names) and all(re.fullmatch(WHOLE_NUMBER, n) for n in names):
        whole = [name.split(".")[0] for name in names]
        first = next(i for i, name in enumerate(names) if "." in name)
        notes.append(f"{table.name}: label {names[first]} is read as {whole[first]}, and so on")
        return whole
    return names


def _one_hot_labels(table: Table, columns: Sequence[str], problems: list[Problem]) -> list[str]:
    before = len(problems)
    cells = [table.column(name, "data.label_column", problems) for name in columns]
    if len(problems) > before:
        return []
    rows = [[bit(cell) for cell in row] for row in zip(*cells, strict=True)]
    for message, odd in (
        ("cells that are neither 0 nor 1", [None in row for row in rows]),
        ("no class", [None not in row and sum(map(bool, row)) == 0 for row in rows]),
        (
            "several classes, where only one can be predicted (no multi-label)",
            [None not in row and sum(map(bool, row)) > 1 for row in rows],
        ),
    ):
        lines = [line for line, is_odd in zip(table.lines, odd, strict=True) if is_odd]
        if lines:
            listed = f"{listing(columns, 6)} have {message}: line {listing(lines)}"
            problems.append(Problem(table.name, f"the one-hot columns {listed}"))
    if len(problems) > before:
        return []
    return [clean(columns[row.index(1)]) for row in rows]


def bit(cell: str) -> int | None:
    """0 or 1; None for anything else."""
    text = cell.strip().casefold()
    if text in ("true", "false"):
        return int(text == "true")
    return int(float(text)) if is_number(text) and float(text) in (0.0, 1.0) else None


def is_number(text: str) -> bool:
    """True for the text of a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def own_table(folder: Path) -> Path | None:
    """The table that a folder of images brings along, or None."""
    return next((folder / name for name in OWN_TABLES if (folder / name).is_file()), None)


def split_part(folder: Path, key: str) -> Path:
    """The subfolder for training, or test, of a folder that is divided so; else the folder.

    Folders that wrap everything are looked through, and the one of several with all images, where
    its own folders are the classes.
    """
    parts = {part.name.casefold(): part for part in _folders(folder)}
    if len(parts) == 1 and own_table(folder) is None:
        [part] = parts.values()
        inner = split_part(part, key)
        return folder if inner == part else inner
    if len(parts) < 2 or own_table(folder) is not None:
        return folder
    if parts.keys() <= SPLIT_NAMES:
        word = "test" if key == "data.test" else "train"
        named = [part for name, part in parts.items() if name.startswith(word)]
        return named[0] if len(named) == 1 else folder
    filled = list(islice((part for part in parts.values() if holds_image(part)), 2))
    if len(filled) != 1 or _has_images(folder):
        return folder
    classes = filter(holds_image, _folders(filled[0]))
    return filled[0] if len(list(islice(classes, 2))) == 2 else folder


def open_folder(
    key: str,
    value: str,
    problems: list[Problem],
    encoding: str | None = None,
    kinds: str = "a folder or a .zip",
) -> Path | None:
    """The folder of that path, or with the content of that zip; None and a problem where none."""
    path = Path(value)
    if path.is_dir():
        return path
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = closest(path.name, siblings)
        hint = f"; there are {listing(near)}" if near else ""
        problems.append(Problem(key, f"{value} does not exist{hint}"))
        return None
    if path.suffix.lower() != ".zip":
        fault = file_fault(path) or "is of no known kind"
        problems.append(Problem(key, f"{value} {fault}; allowed: {kinds}"))
        return None
    try:
        return unpack(path, encoding)
    except DataError as error:
        problems.extend(error.problems)
        return None


def inner_folder(folder: Path) -> Path | None:
    """The only folder in `folder`, or None where there are images or others beside it."""
    folders = _folders(folder)
    return folders[0] if len(folders) == 1 and not _has_images(folder) else None


def part_notes(key: str, folder: Path, part: Path) -> tuple[str, ...]:
    """The line that says which part of a folder is taken, where it is one."""
    others = sorted(p.name for p in part.parent.iterdir() if p.is_dir() and p != part)
    note = f"{key}: {part.name} of {folder.name}, not {listing(others)}; name another part itself"
    return () if part == folder else (note,)


def _has_images(folder: Path) -> bool:
    """True where images lie right in the folder."""
    return any(has_image_suffix(entry.name) and not entry.is_dir() for entry in _visible(folder))


def _folders(folder: Path) -> list[Path]:
    return [folder / entry.name for entry in _visible(folder) if entry.is_dir()]


def _visible(folder: Path) -> Iterator[os.DirEntry[str]]:
    """What lies in the folder; by its entries, since there may be 100,000 files."""
    return (e for e in os.scandir(folder) if not e.name.startswith((".", "__MACOSX")))
