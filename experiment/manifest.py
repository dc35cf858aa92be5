"""The training table and the test set, as the rest of the house sees them.

Takes the config's `data` section (a CSV, a folder per class, or a zip of either; a sample
submission), gives a `Manifest` and an `ImageSet`, or a DataError with every problem.
"""

from __future__ import annotations

import csv
import io
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from experiment.archive import listing, unpack
from experiment.config import DataConfig, closest
from experiment.errors import DataError, Problem
from experiment.images import IMAGE_SUFFIXES, find_images, natural_key

_SPLITS = frozenset(("train", "training", "valid", "validation", "val", "test", "testing"))
_ROOT_SAMPLE = 50  # so many paths tell whether a wrapping folder has to be left out


@dataclass(frozen=True)
class Manifest:
    """The labelled images, one row each, in the order of the table."""

    image_root: Path
    image_paths: tuple[str, ...]
    """As written, but with `/`: relative to `image_root`, or absolute."""
    labels: NDArray[np.int64]
    """(n,) indices into `classes`."""
    classes: tuple[str, ...]
    groups: tuple[str, ...] | None
    given_folds: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.image_paths)

    def file(self, row: int) -> Path:
        return _on_disk(self.image_root, self.image_paths[row])


@dataclass(frozen=True)
class ImageSet:
    """The test images, in the order of the sample submission where there is one."""

    image_root: Path
    image_paths: tuple[str, ...]
    ids: tuple[str, ...]
    id_column: str
    class_columns: tuple[str, ...]
    """The submission's columns: the classes, in the sample's order."""

    def __len__(self) -> int:
        return len(self.image_paths)

    def file(self, row: int) -> Path:
        return _on_disk(self.image_root, self.image_paths[row])


def read_manifest(data: DataConfig, fold_column: str | None = None) -> Manifest:
    """The training rows; raises DataError with every problem."""
    problems: list[Problem] = []
    source = _open_source("data.train", data.train, problems)
    manifest = None
    if isinstance(source, _Table):
        manifest = _from_table(source, data, fold_column, problems)
    elif source is not None:
        manifest = _from_folders(source, data, fold_column, problems)
    if manifest is None or problems:
        raise DataError(problems)
    return manifest


def read_test_set(data: DataConfig, classes: Sequence[str]) -> ImageSet | None:
    """The test rows, or None where the config names no test set; raises DataError with every
    problem."""
    if data.test is None:
        return None
    problems: list[Problem] = []
    sample = _read_sample(data, classes, problems)
    source = _open_source("data.test", data.test, problems)
    found = None
    if isinstance(source, _Table):
        found = _test_table(source, data, sample, problems)
    elif source is not None:
        found = _test_folder(source, data, sample, problems)
    if found is not None and not problems:
        found = replace(found, class_columns=tuple(classes))
        found = found if sample is None else _in_sample_order(found, sample, problems)
    if found is None or problems:
        raise DataError(problems)
    return found


# --- tables -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """A CSV as text: nothing is a number, nothing is missing ('NA' and '01' stay as they are)."""

    name: str
    folder: Path
    columns: tuple[str, ...]
    rows: tuple[list[str], ...]
    lines: tuple[int, ...]
    """Where each row begins, as an editor counts."""

    def column(self, name: str, key: str, problems: list[Problem]) -> list[str]:
        """The column's cells, all filled; [] and a problem where that cannot be."""
        count = self.columns.count(_text(name))
        if count != 1:
            near = closest(name, self.columns, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            state = f"has no column {name!r}" if count == 0 else f"has {count} columns {name!r}"
            message = f"{state}; columns: {listing(self.columns)}{hint}. Set {key}"
            problems.append(Problem(self.name, message))
            return []
        index = self.columns.index(_text(name))
        cells = [row[index] for row in self.rows]
        empty = [line for line, cell in zip(self.lines, cells, strict=True) if not cell.strip()]
        if empty:
            message = f"column {name!r} is empty in line {listing(empty)}; fill in or remove them"
            problems.append(Problem(self.name, message))
        return cells


def _read_table(path: Path, name: str, problems: list[Problem]) -> _Table | None:
    text = _decode(path, name, problems)
    records: list[list[str]] = []
    lines: list[int] = []
    reader = csv.reader(io.StringIO(text or "", newline=""), strict=True)
    start = 1
    try:
        for record in reader:
            if record:  # an empty line gives an empty record
                records.append(record)
                lines.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        message = f'line {start} is not valid CSV: {error}; put values with , or " in quotes'
        problems.append(Problem(name, message))
        return None
    if len(records) < 2:
        if text is not None:
            problems.append(Problem(name, "has no rows; needed: a header line and one per image"))
        return None
    width = len(records[0])
    odd = [line for line, record in zip(lines, records, strict=True) if len(record) != width]
    if odd:
        message = f"the header has {width} cells, line {listing(odd)} not; quote values with commas"
        problems.append(Problem(name, message))
    kept = [(r, n) for r, n in zip(records, lines, strict=True) if len(r) == width][1:]
    columns = tuple(_text(cell) for cell in records[0])
    return _Table(name, path.parent, columns, tuple(r for r, _ in kept), tuple(n for _, n in kept))


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


def _text(cell: str) -> str:
    """A name as compared: macOS writes Hangul decomposed (NFD), others composed (NFC)."""
    return normalize("NFC", cell.strip())


# --- files and folders --------------------------------------------------------------------------


def _open_source(key: str, value: str, problems: list[Problem]) -> _Table | Path | None:
    """A CSV, or the only CSV in a zip, as a table; else the folder of images."""
    path = Path(value)
    if path.suffix.lower() == ".csv" and path.is_file():
        return _read_table(path, value, problems)
    folder = _open_folder(key, value, problems, kinds="a .csv, a folder or a .zip")
    if folder is None or path.is_dir():
        return folder
    tables = sorted(p for p in folder.rglob("*.[cC][sS][vV]") if not p.name.startswith("."))
    if not tables:
        return folder
    names = [str(table.relative_to(folder)) for table in tables]
    if len(tables) > 1:
        message = f"holds {len(tables)} CSV files: {listing(names)}; unpack it and set {key} to one"
        problems.append(Problem(value, message))
        return None
    return _read_table(tables[0], f"{names[0]} in {value}", problems)


def _open_folder(
    key: str, value: str, problems: list[Problem], kinds: str = "a folder or a .zip"
) -> Path | None:
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


def _on_disk(root: Path, written: str) -> Path:
    """The file of that name, whichever Unicode form the disk has for each of its parts."""
    path = root / written
    if written.isascii() or path.exists():
        return path
    found = root
    for part in PurePosixPath(written).parts:
        forms = (part, normalize("NFC", part), normalize("NFD", part))
        found = next((found / form for form in forms if (found / form).exists()), found / part)
    return found


def _inner_folder(folder: Path) -> Path | None:
    """The only folder in `folder`, where there are no images beside it."""
    visible = [p for p in folder.iterdir() if not p.name.startswith((".", "__MACOSX"))]
    folders = [p for p in visible if p.is_dir()]
    images = any(p.suffix.lower() in IMAGE_SUFFIXES for p in visible if not p.is_dir())
    return folders[0] if len(folders) == 1 and not images else None


def _image_root(folder: Path, paths: Sequence[str]) -> Path:
    """`folder`, or the one folder wrapped in it when only from there paths lead to files."""
    sample = paths[:: len(paths) // _ROOT_SAMPLE + 1]
    root: Path | None = folder
    while root is not None:
        if any(_on_disk(root, path).exists() for path in sample):
            return root
        root = _inner_folder(root)
    return folder


# --- training rows --------------------------------------------------------------------------------


def _from_table(
    table: _Table, data: DataConfig, fold_column: str | None, problems: list[Problem]
) -> Manifest | None:
    folder: Path | None = table.folder
    if data.train_images is not None:
        folder = _open_folder("data.train_images", data.train_images, problems)
    paths = _paths(table, data.image_column, "data.image_column", problems)
    names = table.column(data.label_column, "data.label_column", problems)
    groups = given = None
    if data.group_column is not None:
        groups = table.column(data.group_column, "data.group_column", problems)
    if fold_column is not None:
        given = table.column(fold_column, "folds.column", problems)
    names = [_text(name) for name in names]
    if names:
        problems.extend(_too_few_classes(table.name, names))
    if paths and names:
        problems.extend(_repeated(table, paths, names))
    if folder is None or problems:
        return None
    return _manifest(_image_root(folder, paths), paths, names, _texts(groups), _texts(given))


def _from_folders(
    folder: Path, data: DataConfig, fold_column: str | None, problems: list[Problem]
) -> Manifest | None:
    for key, value in (
        ("data.train_images", data.train_images),
        ("data.group_column", data.group_column),
        ("folds.column", fold_column),
    ):
        if value is not None:
            message = f"is {value!r}, but data.train has no CSV, only folders; remove this key"
            problems.append(Problem(key, message))
    inner = _inner_folder(folder)
    while inner is not None and any(p.is_dir() for p in inner.iterdir()):
        folder, inner = inner, _inner_folder(inner)
    paths = find_images(folder)
    loose = [path for path in paths if "/" not in path]
    names = [_text(path.split("/")[0]) for path in paths if "/" in path]
    problems.extend(_folder_problems(folder, data.train, loose, set(names)))
    problems.extend(_too_few_classes(data.train, names))
    return None if problems else _manifest(folder, paths, names, None, None)


def _manifest(
    root: Path,
    paths: Sequence[str],
    names: Sequence[str],
    groups: tuple[str, ...] | None,
    given: tuple[str, ...] | None,
) -> Manifest:
    classes = tuple(sorted(set(names), key=natural_key))
    index = {name: i for i, name in enumerate(classes)}
    labels = np.array([index[name] for name in names], dtype=np.int64)
    return Manifest(root, tuple(paths), labels, classes, groups, given)


def _texts(cells: Iterable[str] | None) -> tuple[str, ...] | None:
    return None if cells is None else tuple(_text(cell) for cell in cells)


def _paths(table: _Table, column: str, key: str, problems: list[Problem]) -> list[str]:
    paths = [path.replace("\\", "/") for path in table.column(column, key, problems)]
    outside = [
        f"line {line}: {path}"
        for line, path in zip(table.lines, paths, strict=False)
        if posixpath.normpath(path).split("/")[0] == ".."
    ]
    if outside:
        message = f"paths lead out of the image folder: {listing(outside)}; make them absolute"
        problems.append(Problem(table.name, f"{message}, or name the folder above in the config"))
    return paths


def _repeated(table: _Table, paths: Sequence[str], names: Sequence[str]) -> Iterator[Problem]:
    rows: dict[str, list[int]] = {}
    for row, path in enumerate(paths):
        rows.setdefault(posixpath.normpath(_text(path)), []).append(row)
    same: list[str] = []
    conflicting: list[str] = []
    for same_rows in rows.values():
        labels = list(dict.fromkeys(names[row] for row in same_rows))
        if len(same_rows) > 1 and paths[same_rows[0]].strip():
            lines = " and ".join(str(table.lines[row]) for row in same_rows)
            shown = f"{paths[same_rows[0]]} (lines {lines}: {', '.join(labels)})"
            (same if len(labels) == 1 else conflicting).append(shown)
    if conflicting:
        message = f"the same image with different labels: {listing(conflicting)}; keep the right"
        yield Problem(table.name, f"{message} one")
    if same:
        yield Problem(table.name, f"the same image twice: {listing(same)}; keep one row of each")


def _too_few_classes(where: str, names: Iterable[str]) -> Iterator[Problem]:
    classes = sorted(set(names) - {""})
    if len(classes) < 2:
        found = f"only the class {classes[0]!r}" if classes else "no labelled image"
        yield Problem(
            where,
            f"holds {found}; needed: at least 2 classes (a column of labels, or "
            "one folder of images per class)",
        )


def _folder_problems(
    folder: Path, where: str, loose: Sequence[str], classes: set[str]
) -> Iterator[Problem]:
    if loose:
        message = f"images beside the class folders: {listing(loose)}; move them into one"
        yield Problem(where, message)
    folders = {_text(p.name) for p in folder.iterdir() if p.is_dir() and p.name[0] != "."}
    empty = sorted(folders - classes - {"__MACOSX"}, key=natural_key)
    if empty and classes:
        yield Problem(where, f"class folders without images: {listing(empty)}; remove them")
    if len(classes) > 1 and {name.lower() for name in classes} <= _SPLITS:
        names = ", ".join(sorted(classes))
        yield Problem(where, f"the class folders are called {names}: set data.train to one of them")


# --- test rows ------------------------------------------------------------------------------------


def _read_sample(
    data: DataConfig, classes: Sequence[str], problems: list[Problem]
) -> _Table | None:
    value = data.sample_submission
    if value is None:
        return None
    if not Path(value).is_file():
        problems.append(Problem("data.sample_submission", f"{value} is no file; needed: a .csv"))
        return None
    sample = _read_table(Path(value), value, problems)
    if sample is None:
        return None
    columns = sample.columns[1:]
    for message, names in (
        (
            "columns that are no class of the training data",
            [c for c in columns if c not in classes],
        ),
        ("training classes without a column", [c for c in classes if c not in columns]),
        ("columns that are there twice", _twice(columns)),
    ):
        if names:
            advice = "it needs the id column, then one column per class"
            problems.append(Problem(value, f"{message}: {listing(names)}; {advice}"))
    return sample


def _twice(items: Iterable[str]) -> list[str]:
    return [item for item, count in Counter(items).items() if count > 1]


def _test_table(
    table: _Table, data: DataConfig, sample: _Table | None, problems: list[Problem]
) -> ImageSet | None:
    id_column = data.test_id_column or table.columns[0]
    if data.test_id_column is None and sample is not None and sample.columns[0] in table.columns:
        id_column = sample.columns[0]
    ids = table.column(id_column, "data.test_id_column", problems)
    image_column = data.test_image_column or data.image_column
    paths = _paths(table, image_column, "data.test_image_column", problems)
    folder: Path | None = table.folder
    if data.test_images is not None:
        folder = _open_folder("data.test_images", data.test_images, problems)
    if twice := _twice(map(_text, ids)):
        message = f"ids that are there twice: {listing(twice)}; give every row its own"
        problems.append(Problem(table.name, message))
    if folder is None or problems:
        return None
    return ImageSet(_image_root(folder, paths), tuple(paths), tuple(ids), id_column, ())


def _test_folder(
    folder: Path, data: DataConfig, sample: _Table | None, problems: list[Problem]
) -> ImageSet | None:
    while (inner := _inner_folder(folder)) is not None:
        folder = inner
    paths = find_images(folder)
    if data.test_images is not None:
        message = f"is {data.test_images!r}, but data.test is a folder of images; remove this key"
        problems.append(Problem("data.test_images", message))
    if not paths:
        problems.append(Problem("data.test", f"{data.test} holds no images"))
    ids = [posixpath.basename(path) for path in paths]
    if sample is not None:
        wanted = {_text(row[0]) for row in sample.rows}
        stems = [posixpath.splitext(name)[0] for name in ids]
        if len(wanted.intersection(map(_text, stems))) > len(wanted.intersection(map(_text, ids))):
            ids = stems
    if twice := _twice(map(_text, ids)):
        message = f"several images would have one id: {listing(twice)}; use a CSV of ids and paths"
        problems.append(Problem(f"data.test: {data.test}", message))
    return ImageSet(folder, tuple(paths), tuple(ids), data.test_id_column or "id", ())


def _in_sample_order(found: ImageSet, sample: _Table, problems: list[Problem]) -> ImageSet:
    ids = sample.column(sample.columns[0], "data.sample_submission", problems)
    row_of = {_text(name): row for row, name in enumerate(found.ids)}
    asked = {_text(name) for name in ids}
    for message, names in (
        ("ids that are there twice", _twice(map(_text, ids))),
        ("ids without a test image", [i for i in ids if _text(i) not in row_of]),
        ("test images without an id in it", [i for i in found.ids if _text(i) not in asked]),
    ):
        if names:
            advice = "the sample needs exactly one row per test image (data.test)"
            problems.append(Problem(sample.name, f"{message}: {listing(names)}; {advice}"))
    if problems:
        return found
    paths = tuple(found.image_paths[row_of[_text(name)]] for name in ids)
    columns = sample.columns
    return ImageSet(found.image_root, paths, tuple(ids), columns[0], columns[1:])
