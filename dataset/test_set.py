"""The test images, and the form that their submission must have.

Takes the config's `data` section (a CSV, a folder or a zip of images; a sample submission), gives
an `ImageSet`, or a DataError with every problem. Ids and columns are matched whatever their
Unicode form and the spaces around them, and kept as the sample writes them.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from foldrace.config.schema import DataConfig
from foldrace.core.errors import DataError, Problem, listing
from foldrace.dataset.images import find_files
from foldrace.dataset.left_out import LeftOut, left_out_lines, unknown_kinds
from foldrace.dataset.tables import (
    TABLE_KINDS,
    Table,
    clean,
    complete_suffixes,
    find_image_root,
    inner_folder,
    on_disk,
    open_folder,
    read_source,
    read_table,
    twice,
)


@dataclass(frozen=True)
class ImageSet:
    """The test images, in the order of the sample submission where there is one."""

    image_root: Path
    image_paths: tuple[str, ...]
    ids: tuple[str, ...]
    """Ids exactly as the sample writes them, else the test CSV; else the files' names."""
    id_column: str
    class_columns: tuple[str, ...]
    """The classes, in the order of the sample's columns where it has one for each."""
    header: tuple[str, ...]
    """First line of the submission exactly as the sample writes it (spaces, Unicode form):
    `id_column` and `class_columns`, or in the label form `id_column` and one column for labels."""
    labels: bool = False
    """True where the sample asks for the most probable class, not for probabilities."""
    table: str | None = None
    """The CSV that the images come from, as messages name it."""
    lines: tuple[int, ...] | None = None
    """Line where each row begins in `table`, as an editor counts."""
    left_out: tuple[LeftOut, ...] = ()
    """Files in the folder that are no test image, and why."""

    def __len__(self) -> int:
        return len(self.image_paths)

    def file(self, row: int) -> Path:
        """Path of a row's image on this machine."""
        return on_disk(self.image_root, self.image_paths[row])


def read_test_set(data: DataConfig, classes: Sequence[str]) -> ImageSet | None:
    """The test rows, or None where the config names none; DataError with every problem."""
    if data.test is None:
        return None
    problems: list[Problem] = []
    sample = _read_sample(data, classes, problems)
    source = read_source("data.test", data.test, problems)
    found = None
    if isinstance(source, Table):
        found = _from_table(source, data, classes, sample, problems)
    elif source is not None:
        found = _from_folder(source, data, classes, sample, problems)
    if found is not None and sample is not None and not problems:
        found = _in_sample_order(found, sample, problems)
    if found is not None and problems:  # they may be why images are missing
        problems.extend(left_out_lines(found.left_out))
    if found is None or problems:
        raise DataError(problems)
    return found


def _read_sample(data: DataConfig, classes: Sequence[str], problems: list[Problem]) -> Table | None:
    value = data.sample_submission
    if value is None:
        return None
    if not Path(value).is_file():
        problems.append(
            Problem("data.sample_submission", f"{value} is no file; needed: a {TABLE_KINDS}")
        )
        return None
    sample = read_table(Path(value), value, problems)
    if sample is None:
        return None
    columns = sample.columns[1:]
    if _asks_for_labels(sample, classes):
        return sample
    for message, names in (
        (
            "columns that are no class of the training data",
            [c for c in columns if c not in classes],
        ),
        ("training classes without a column", [c for c in classes if c not in columns]),
        ("columns that are there twice", twice(columns)),
    ):
        if names:
            advice = "it needs the id column, then one column per class, or one that holds classes"
            problems.append(Problem(value, f"{message}: {listing(names)}; {advice}"))
    return sample


def _asks_for_labels(sample: Table, classes: Sequence[str]) -> bool:
    """True where one column beside the ids, which is no class's, holds classes or nothing."""
    columns = sample.columns[1:]
    if len(columns) != 1 or columns[0] in classes:
        return False
    return all(clean(cell) in ("", *classes) for row in sample.rows for cell in row[1:])


def _from_table(
    table: Table,
    data: DataConfig,
    classes: Sequence[str],
    sample: Table | None,
    problems: list[Problem],
) -> ImageSet | None:
    id_column = data.test_id_column or table.columns[0]
    if data.test_id_column is None and sample is not None and sample.columns[0] in table.columns:
        id_column = sample.columns[0]
    ids = table.column(id_column, "data.test_id_column", problems)
    image_column = data.test_image_column or data.image_column
    paths = table.paths(image_column, "data.test_image_column", problems)
    folder: Path | None = table.folder
    if data.test_images is not None:
        folder = open_folder("data.test_images", data.test_images, problems)
    if repeated := twice(map(clean, ids)):
        message = f"ids that are there twice: {listing(repeated)}; give every row its own"
        problems.append(Problem(table.name, message))
    if folder is None or problems:
        return None
    root = find_image_root(folder, paths)
    return ImageSet(
        image_root=root,
        image_paths=complete_suffixes(root, paths),
        ids=tuple(ids),
        id_column=id_column,
        class_columns=tuple(classes),
        header=(id_column, *classes),
        table=table.name,
        lines=table.lines,
    )


def _from_folder(
    folder: Path,
    data: DataConfig,
    classes: Sequence[str],
    sample: Table | None,
    problems: list[Problem],
) -> ImageSet | None:
    while (inner := inner_folder(folder)) is not None:
        folder = inner
    files = find_files(folder)
    paths = files.images
    if data.test_images is not None:
        message = f"is {data.test_images!r}, but data.test is a folder of images; remove this key"
        problems.append(Problem("data.test_images", message))
    if not paths:
        problems.append(Problem("data.test", f"{data.test} holds no images"))
    ids = [posixpath.basename(path) for path in paths]
    if sample is not None:
        wanted = {clean(row[0]) for row in sample.rows}
        stems = [posixpath.splitext(name)[0] for name in ids]
        if len(wanted.intersection(map(clean, stems))) > len(wanted.intersection(map(clean, ids))):
            ids = stems
    if repeated := twice(map(clean, ids)):
        message = (
            f"several images would have one id: {listing(repeated)}; use a CSV of ids and paths"
        )
        problems.append(Problem(f"data.test: {data.test}", message))
    id_column = data.test_id_column or "id"
    return ImageSet(
        image_root=folder,
        image_paths=paths,
        ids=tuple(ids),
        id_column=id_column,
        class_columns=tuple(classes),
        header=(id_column, *classes),
        left_out=unknown_kinds(files.others, "test"),
    )


def _in_sample_order(found: ImageSet, sample: Table, problems: list[Problem]) -> ImageSet:
    ids = sample.column(sample.columns[0], "data.sample_submission", problems)
    row_of = {clean(name): row for row, name in enumerate(found.ids)}
    asked = {clean(name) for name in ids}
    for message, names in (
        ("ids that are there twice", twice(map(clean, ids))),
        ("ids without a test image", [i for i in ids if clean(i) not in row_of]),
        ("test images without an id in it", [i for i in found.ids if clean(i) not in asked]),
    ):
        if names:
            advice = "the sample needs exactly one row per test image (data.test)"
            problems.append(Problem(sample.name, f"{message}: {listing(names)}; {advice}"))
    if problems:
        return found
    rows = [row_of[clean(name)] for name in ids]
    labels = _asks_for_labels(sample, found.class_columns)
    return replace(
        found,
        image_paths=tuple(found.image_paths[row] for row in rows),
        ids=tuple(ids),
        id_column=sample.columns[0],
        class_columns=found.class_columns if labels else sample.columns[1:],
        header=sample.header,
        labels=labels,
        lines=None if found.lines is None else tuple(found.lines[row] for row in rows),
    )
