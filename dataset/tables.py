"""Sources of rows: CSV tables as people have them, and folders or zips of images.

Takes the paths that the config names, gives a `Table` or a folder, and adds to a list of problems.
`read_table` is ours, not pandas': a message names the line of the user's file, and names of images
may hold bytes that are not UTF-8, which pandas cannot.
"""

from __future__ import annotations

import csv
import io
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from unicodedata import normalize

from foldrace.core.errors import DataError, Problem, closest, listing
from foldrace.dataset.archive import unpack
from foldrace.dataset.images import IMAGE_SUFFIXES, has_image_suffix

_ROOT_SAMPLE = 50  # so many paths tell whether a wrapping folder has to be left out


@dataclass(frozen=True)
class Table:
    """A CSV as text: no cell is a number or missing ('NA' and '01' stay as they are)."""

    name: str
    folder: Path
    header: tuple[str, ...]
    """Cells of the first line as they are."""
    columns: tuple[str, ...]
    """Names of the columns as they are compared, see `clean`."""
    rows: tuple[list[str], ...]
    lines: tuple[int, ...]
    """Line where each row begins, as an editor counts."""

    def column(self, name: str, key: str, problems: list[Problem]) -> list[str]:
        """The column's cells, all filled; [] and a problem where that cannot be."""
        count = self.columns.count(clean(name))
        if count != 1:
            near = closest(name, self.columns, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            state = f"has no column {name!r}" if count == 0 else f"has {count} columns {name!r}"
            message = f"{state}; columns: {listing(self.columns)}{hint}. Set {key}"
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
        """The column's cells with `/` between the parts of a path, none above the folder."""
        paths = [path.replace("\\", "/") for path in self.column(column, key, problems)]
        outside = [
            f"line {line}: {path}"
            for line, path in zip(self.lines, paths, strict=False)
            if posixpath.normpath(path).split("/")[0] == ".."
        ]
        if outside:
            message = f"paths lead out of the image folder: {listing(outside)}; make them absolute"
            advice = "or name the folder above in the config"
            problems.append(Problem(self.name, f"{message}, {advice}"))
        return paths


Records = list[tuple[int, list[str]]]
"""Line and cells of each record of a table, the header first."""


def read_table(path: Path, name: str, problems: list[Problem]) -> Table | None:
    """The table in a file, by its reader in `READERS`.

    None, and problems with their lines, where it is unsound. `name` is what messages call it.
    """
    read = READERS.get(path.suffix.lower(), _csv_records)  # a CSV may have any name
    records = read(path, name, problems)
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
    rows = [(line, cells) for line, cells in records[1:] if len(cells) == len(header)]
    return Table(
        name=name,
        folder=path.parent,
        header=tuple(header),
        columns=tuple(clean(cell) for cell in header),
        rows=tuple(cells for _, cells in rows),
        lines=tuple(line for line, _ in rows),
    )


def _csv_records(path: Path, name: str, problems: list[Problem]) -> Records | None:
    text = _decode(path, name, problems)
    if text is None:
        return None
    records: Records = []
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    start = 1
    try:
        for cells in reader:
            if cells:  # an empty line gives an empty record
                records.append((start, cells))
            start = reader.line_num + 1
    except csv.Error as error:
        message = f'line {start} is not valid CSV: {error}; put values with , or " in quotes'
        problems.append(Problem(name, message))
        return None
    return records


READERS: dict[str, Callable[[Path, str, list[Problem]], Records | None]] = {".csv": _csv_records}
"""Readers of users' tables by suffix; one that fails adds problems and gives None."""

TABLE_KINDS = " or ".join(READERS)


def is_table(path: Path) -> bool:
    """True for the name of a file that `read_table` reads."""
    return path.suffix.lower() in READERS


def clean(cell: str) -> str:
    """A name as it is compared: macOS writes Hangul decomposed (NFD), others composed (NFC)."""
    return normalize("NFC", cell.strip())


def twice(items: Iterable[str]) -> list[str]:
    """The items that occur more than once."""
    return [item for item, count in Counter(items).items() if count > 1]


def read_source(key: str, value: str, problems: list[Problem]) -> Table | Path | None:
    """A table, or the only table in a zip; else the folder of images."""
    path = Path(value)
    if is_table(path) and path.is_file():
        return read_table(path, value, problems)
    folder = open_folder(key, value, problems, kinds=f"a {TABLE_KINDS}, a folder or a .zip")
    if folder is None or path.is_dir():
        return folder
    tables = sorted(p for p in folder.rglob("*.*") if is_table(p) and not p.name.startswith("."))
    if not tables:
        return folder
    names = [str(table.relative_to(folder)) for table in tables]
    if len(tables) > 1:
        message = f"holds {len(tables)} tables: {listing(names)}; unpack it and set {key} to one"
        problems.append(Problem(value, message))
        return None
    return read_table(tables[0], f"{names[0]} in {value}", problems)


def open_folder(
    key: str, value: str, problems: list[Problem], kinds: str = "a folder or a .zip"
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
        problems.append(Problem(key, f"{value} is of no known kind; allowed: {kinds}"))
        return None
    try:
        return unpack(path)
    except DataError as error:
        problems.extend(error.problems)
        return None


def on_disk(root: Path, written: str) -> Path:
    """The file of that name, whichever Unicode form the disk has for each of its parts."""
    path = root / written
    if written.isascii() or os.path.exists(path):  # Path.exists raises for a name too long
        return path
    found = root
    for part in PurePosixPath(written).parts:
        forms = (part, normalize("NFC", part), normalize("NFD", part))
        found = next((found / f for f in forms if os.path.exists(found / f)), found / part)
    return found


def inner_folder(folder: Path) -> Path | None:
    """The only folder in `folder`, or None where there are images or others beside it."""
    visible = [p for p in folder.iterdir() if not p.name.startswith((".", "__MACOSX"))]
    folders = [p for p in visible if p.is_dir()]
    images = any(p.suffix.lower() in IMAGE_SUFFIXES for p in visible if not p.is_dir())
    return folders[0] if len(folders) == 1 and not images else None


def find_image_root(folder: Path, paths: Sequence[str]) -> Path:
    """`folder`, or the one folder wrapped in it when only from there paths lead to files.

    Ids without a suffix lead to the image of that name.
    """
    sample = paths[:: len(paths) // _ROOT_SAMPLE + 1]
    root: Path | None = folder
    while root is not None:
        completed = complete_suffixes(root, sample)
        if any(os.path.exists(on_disk(root, path)) for path in completed):
            return root
        root = inner_folder(root)
    return folder


def complete_suffixes(root: Path, paths: Sequence[str]) -> tuple[str, ...]:
    """The paths; where one names no image file but the stem of exactly one, that file's path."""
    folders: dict[str, dict[str, list[str]]] = {}

    def completed(path: str) -> str:
        if has_image_suffix(path):
            return path
        parent, stem = posixpath.split(path)
        if parent not in folders:
            folders[parent] = _images_by_stem(on_disk(root, parent))
        names = folders[parent].get(clean(stem), [])
        return posixpath.join(parent, names[0]) if len(names) == 1 else path

    return tuple(map(completed, paths))


def _images_by_stem(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    if folder.is_dir():
        for name in sorted(os.listdir(folder)):
            if has_image_suffix(name):
                found.setdefault(clean(posixpath.splitext(name)[0]), []).append(name)
    return found


def _decode(path: Path, name: str, problems: list[Problem]) -> str | None:
    try:
        data = path.read_bytes()
    except OSError as error:
        problems.append(Problem(name, f"cannot be read: {error}"))
        return None
    for encoding in ("utf-8-sig", "cp949"):  # Korean Excel saves CP949
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    problems.append(Problem(name, "is neither UTF-8 nor CP949 text; save it as CSV UTF-8"))
    return None
