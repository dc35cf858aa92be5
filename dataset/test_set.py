"""The test images, and the form that their submission must have.

Takes the config's `data` section (a CSV, a folder or a zip of images; a sample submission), gives
an `ImageSet`, or a DataError with every problem. Ids and columns are matched whatever their
Unicode form and the spaces around them, and kept as the sample writes them.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from foldrace.config.schema import DataConfig
from foldrace.core.errors import DataError, Problem, listing
from foldrace.core.opening import file_fault
from foldrace.dataset.archive import name_notes
from foldrace.dataset.guess_columns import named_images
from foldrace.dataset.image_paths import find_paths, on_disk
from foldrace.dataset.images import find_files
from foldrace.dataset.left_out import LeftOut, left_out_lines, unknown_kinds
from foldrace.dataset.readers import TABLE_KINDS
from foldrace.dataset.submission_form import (
    SubmissionForm,
    form_of_sample,
    form_without_sample,
    match_ids,
    stem,
)
from foldrace.dataset.tables import (
    Table,
    clean,
    inner_folder,
    open_folder,
    part_notes,
    read_source,
    read_table,
    split_part,
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
    form: SubmissionForm
    table: str | None = None
    """The CSV that the images come from, as messages name it."""
    lines: tuple[int, ...] | None = None
    """Line where each row begins in `table`, as an editor counts."""
    readings: tuple[str, ...] = ()
    """Lines for the user: what was taken for what."""
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
        if data.sample_submission is not None:
            raise DataError.single(
                f"data.sample_submission: {data.sample_submission}",
                "there is no data.test, so that nothing would be submitted; set data.test to the "
                "table, folder or zip of the test images, or remove data.sample_submission",
            )
        return None
    problems: list[Problem] = []
    sample = _read_sample(data, problems)
    form = None if sample is None else form_of_sample(sample, data, classes, problems)
    source = read_source("data.test", data.test, problems, data.encoding)
    found = None
    if isinstance(source, Table):
        found = _from_table(source, data, classes, sample, problems)
    elif source is not None:
        found = _from_folder(source, data, classes, problems)
    if found is not None and sample is not None and form is not None and not problems:
        found = _in_sample_order(found, sample, form, problems)
    if found is not None and problems:  # they may be why images are missing
        problems.extend(left_out_lines(found.left_out))
    if found is None or problems:
        raise DataError(problems)
    said = name_notes(found.image_root, data.test_images or data.test) if not data.encoding else []
    return replace(found, readings=(*said, *found.readings))


def _read_sample(data: DataConfig, problems: list[Problem]) -> Table | None:
    value = data.sample_submission
    if value is None:
        return None
    fault = file_fault(Path(value))
    if fault is not None:
        message = f"{value} {fault}; needed: a {TABLE_KINDS}"
        problems.append(Problem("data.sample_submission", message))
        return None
    return read_table(Path(value), value, problems, data.encoding)


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
    folder: Path | None = table.folder
    if data.test_images is not None:
        folder = open_folder("data.test_images", data.test_images, problems, data.encoding)
    image_column, notes = _image_column(table, data, folder or table.folder)
    paths = table.paths(image_column, "data.test_image_column", problems)
    if repeated := twice(map(clean, ids)):
        message = f"ids that are there twice: {listing(repeated)}; give every row its own"
        problems.append(Problem(table.name, message))
    if folder is None or problems:
        return None
    files = find_paths(table, paths, folder, "test", problems)
    return ImageSet(
        image_root=files.root,
        image_paths=files.paths,
        ids=tuple(ids),
        id_column=id_column,
        form=form_without_sample(data, classes, id_column, problems),
        table=table.name,
        lines=table.lines,
        readings=(*table.notes, *notes, *files.notes),
    )


def _image_column(table: Table, data: DataConfig, folder: Path) -> tuple[str, list[str]]:
    """The column of image paths: the config's, that of the training table, or the likely one."""
    named = data.test_image_column or data.image_column
    if data.test_image_column is not None or clean(named) in table.columns:
        return named, []
    default = DataConfig.model_fields["image_column"].default
    found, notes = named_images(table, default, folder, "test")
    return (found, notes) if notes else (named, [])


def _from_folder(
    folder: Path, data: DataConfig, classes: Sequence[str], problems: list[Problem]
) -> ImageSet | None:
    part = split_part(folder, "data.test")
    notes = part_notes("data.test", folder, part)
    folder = part
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
    if twice(map(clean, ids)):
        ids = list(paths)
        notes = (*notes, f"data.test: ids are paths such as {ids[0]}: several files have one name")
    id_column = data.test_id_column or "id"
    return ImageSet(
        image_root=folder,
        image_paths=paths,
        ids=tuple(ids),
        id_column=id_column,
        form=form_without_sample(data, classes, id_column, problems),
        readings=notes,
        left_out=unknown_kinds(files.others, "test"),
    )


def _in_sample_order(
    found: ImageSet, sample: Table, form: SubmissionForm, problems: list[Problem]
) -> ImageSet:
    """The images in the sample's order, with its ids and its form."""
    id_column = sample.columns[form.id_at]
    ids = sample.column(id_column, "data.sample_submission", problems)
    own = list(form.images) or ids
    files = [found.file(row).as_posix() for row in range(len(found))]
    rows, way = match_ids(own, found.ids, files)
    if not rows:
        problems += _unmatched(sample, own, found)
    if problems:
        return found
    values = 1 if form.kind != "probabilities" else len(form.class_columns)
    end = form.value_at + values
    frames = tuple((*row[: form.value_at], *row[end:]) for row in sample.rows)
    notes = [f"{sample.name}: ids matched by {way}"] if way else []
    return replace(
        found,
        image_paths=tuple(found.image_paths[row] for row in rows),
        ids=tuple(own),
        id_column=id_column,
        form=replace(form, frames=frames),
        lines=None if found.lines is None else tuple(found.lines[row] for row in rows),
        readings=(*found.readings, *sample.notes, *notes),
    )


def _share(key: Callable[[str], str], one: Iterable[str], other: Iterable[str]) -> bool:
    """True where some names of both are the same by this key."""
    return not set(map(key, one)).isdisjoint(map(key, other))


def _unmatched(sample: Table, ids: Sequence[str], found: ImageSet) -> Iterator[Problem]:
    key = next((key for key in (clean, stem) if _share(key, ids, found.ids)), clean)
    known, asked = set(map(key, found.ids)), set(map(key, ids))
    example = f"; its ids look like {ids[0]!r}, the images' like {found.ids[0]!r}"
    for message, names in (
        ("ids that are there twice", twice(map(clean, ids))),
        ("ids without a test image", [i for i in ids if key(i) not in known]),
        ("test images without an id in it", [i for i in found.ids if key(i) not in asked]),
    ):
        if names:
            advice = "the sample needs exactly one row per test image (data.test)"
            text = f"{message}: {listing(names)}; {advice}"
            yield Problem(sample.name, text + (example if not known & asked else ""))
