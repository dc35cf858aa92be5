"""The training images with their labels, as all other rooms see them.

Takes the config's `data` section (a CSV, a folder per class, or a zip of either), gives a
`Manifest`, or a DataError with every problem.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from foldrace.config.schema import DataConfig
from foldrace.core.errors import DataError, Problem, listing
from foldrace.dataset.archive import name_notes
from foldrace.dataset.curation import Merged, curate
from foldrace.dataset.guess_columns import named_images, named_labels
from foldrace.dataset.image_paths import find_paths, on_disk
from foldrace.dataset.images import find_files, natural_key
from foldrace.dataset.left_out import LeftOut, left_out_lines, unknown_kinds
from foldrace.dataset.tables import (
    SPLIT_NAMES,
    Table,
    clean,
    inner_folder,
    open_folder,
    part_notes,
    read_labels,
    read_source,
    split_part,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Manifest:
    """The labelled images, one row each, in the order of the table."""

    image_root: Path
    image_paths: tuple[str, ...]
    """Paths as written, but with `/`: relative to `image_root`, or absolute."""
    labels: NDArray[np.int64]
    """Index into `classes` of each row, (n,)."""
    classes: tuple[str, ...]
    groups: tuple[str, ...] | None
    given_folds: tuple[str, ...] | None
    table: str | None = None
    """The CSV that the rows come from, as messages name it."""
    lines: tuple[int, ...] | None = None
    """Line where each row begins in `table`, as an editor counts."""
    readings: tuple[str, ...] = ()
    """Lines for the user: what was taken for what."""
    left_out: tuple[LeftOut, ...] = ()
    """What is no row, and why."""
    merged: Merged = field(default_factory=dict)
    """Classes that are made of others."""
    notes: tuple[Problem, ...] = ()
    """What the user's lists have changed."""

    def __len__(self) -> int:
        return len(self.image_paths)

    def file(self, row: int) -> Path:
        """Path of a row's image on this machine."""
        return on_disk(self.image_root, self.image_paths[row])

    def chosen(self, rows: NDArray[np.int64], left_out: Iterable[LeftOut] = ()) -> Manifest:
        """These rows alone, with the same classes; `left_out` says why where it is news."""

        def of(column: tuple[T, ...] | None) -> tuple[T, ...] | None:
            return None if column is None else tuple(column[row] for row in rows)

        return replace(
            self,
            image_paths=tuple(self.image_paths[row] for row in rows),
            labels=self.labels[rows],
            groups=of(self.groups),
            given_folds=of(self.given_folds),
            lines=of(self.lines),
            left_out=(*self.left_out, *left_out),
        )


def read_manifest(data: DataConfig, fold_column: str | None = None) -> Manifest:
    """The training rows; raises DataError with every problem."""
    manifest, problems = scan_manifest(data, fold_column)
    if manifest is None or problems:
        raise DataError(problems)
    return manifest


def scan_manifest(
    data: DataConfig, fold_column: str | None = None
) -> tuple[Manifest | None, list[Problem]]:
    """The training rows and every problem; None where there are no images to read.

    Where labels are wrong it still gives the images, so that an audit can find their faults too; a
    row without a label has the class ''.
    """
    problems: list[Problem] = []
    source = read_source("data.train", data.train, problems, data.encoding)
    manifest = None
    if isinstance(source, Table):
        manifest = _from_table(source, data, fold_column, problems)
    elif source is not None:
        manifest = _from_folders(source, data, fold_column, problems)
    if manifest is not None and data.encoding is None:
        said = name_notes(manifest.image_root, data.train_images or data.train)
        manifest = replace(manifest, readings=(*said, *manifest.readings))
    if manifest is not None:
        manifest = _curated(manifest, data, problems)
    if manifest is not None and data.max_per_class is not None:
        manifest = _first_of_each_class(manifest, data.max_per_class)
    return manifest, problems


def _from_table(
    table: Table, data: DataConfig, fold_column: str | None, problems: list[Problem]
) -> Manifest | None:
    folder: Path | None = table.folder
    if data.train_images is not None:
        folder = open_folder("data.train_images", data.train_images, problems, data.encoding)
    image_column, notes = named_images(table, data.image_column, folder or table.folder, "train")
    paths = table.paths(image_column, "data.image_column", problems)
    images_known = not problems
    taken = (image_column, data.group_column, fold_column)
    label_column = named_labels(table, data.label_column, taken, notes, problems)
    names = read_labels(table, label_column, notes, problems) if label_column else []
    groups = given = None
    if data.group_column is not None:
        groups = table.column(data.group_column, "data.group_column", problems) or None
    if fold_column is not None:
        given = table.column(fold_column, "folds.column", problems) or None
    if names:
        problems.extend(_too_few_classes(table.name, names))
    if paths and names and data.duplicates != "drop":
        problems.extend(_repeated(table, paths, names))
    if folder is None or not images_known:
        return None
    names = names or [""] * len(paths)
    found = find_paths(table, paths, folder, "train", problems)
    manifest = _manifest(found.root, found.paths, names)
    return replace(
        manifest,
        groups=_cleaned(groups),
        given_folds=_cleaned(given),
        table=table.name,
        lines=table.lines,
        readings=(*table.notes, *notes, *found.notes),
    )


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
    part = split_part(folder, "data.train")
    notes = part_notes("data.train", folder, part)
    folder = part
    inner = inner_folder(folder)
    while inner is not None and any(p.is_dir() for p in inner.iterdir()):
        folder, inner = inner, inner_folder(inner)
    found = find_files(folder)
    paths = found.images
    loose = [path for path in paths if "/" not in path]
    names = [clean(path.split("/")[0]) for path in paths if "/" in path]
    problems.extend(_folder_problems(folder, data.train, loose, set(names)))
    packed = [path for path in found.others if path.lower().endswith(".zip")]
    if packed and not paths:
        message = f"holds no image, but {listing(packed)}; unpack it and set data.train to one"
        problems.append(Problem(data.train, message))
        return None
    problems.extend(_too_few_classes(data.train, names))
    left_out = unknown_kinds(found.others, "training")
    if problems:  # they may be why images are missing
        problems.extend(left_out_lines(left_out))
    if loose:
        return None
    made = _manifest(folder, paths, names)
    return replace(made, readings=notes, left_out=left_out)


def ordered_classes(names: Iterable[str]) -> tuple[str, ...]:
    """The classes of these labels in the order of every array's columns."""
    return tuple(sorted(set(names), key=natural_key))


def _manifest(root: Path, paths: Sequence[str], names: Sequence[str]) -> Manifest:
    classes, labels = _coded(names)
    return Manifest(root, tuple(paths), labels, classes, groups=None, given_folds=None)


def _coded(names: Sequence[str]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """The classes in order, and each label's place among them, (n,)."""
    classes = ordered_classes(names)
    index = {name: i for i, name in enumerate(classes)}
    return classes, np.array([index[name] for name in names], dtype=np.int64)


def _curated(manifest: Manifest, data: DataConfig, problems: list[Problem]) -> Manifest:
    """The rows as the user's lists leave them, see `curate`."""
    lists = (data.exclude, data.fixes, data.merge_classes or None)
    if lists == (None, None, None) and data.duplicates != "drop":
        return manifest
    names = [manifest.classes[label] for label in manifest.labels]
    found = curate(manifest.image_root, manifest.image_paths, names, data, problems)
    if not len(found.kept):
        problems.append(Problem("data.exclude", "leaves no training image"))
        return manifest
    kept = manifest.chosen(found.kept, found.left_out)
    classes, labels = _coded([found.names[row] for row in found.kept])
    return replace(kept, labels=labels, classes=classes, merged=found.merged, notes=found.notes)


def _first_of_each_class(manifest: Manifest, count: int) -> Manifest:
    """The first `count` rows of each class, in the order of the table."""
    by_class = [np.flatnonzero(manifest.labels == c)[:count] for c in range(len(manifest.classes))]
    return manifest.chosen(np.sort(np.concatenate(by_class)))


def _cleaned(cells: Iterable[str] | None) -> tuple[str, ...] | None:
    return None if cells is None else tuple(clean(cell) for cell in cells)


def _repeated(table: Table, paths: Sequence[str], names: Sequence[str]) -> Iterator[Problem]:
    rows: dict[str, list[int]] = {}
    for row, path in enumerate(paths):
        rows.setdefault(posixpath.normpath(clean(path)), []).append(row)
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
        yield Problem(table.name, f"{message} one (data.duplicates: drop keeps none)")
    if same:
        message = f"the same image twice: {listing(same)}; keep one row of each"
        yield Problem(table.name, f"{message} (as data.duplicates: drop does)")


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
    folders = {clean(p.name) for p in folder.iterdir() if p.is_dir() and p.name[0] != "."}
    empty = sorted(folders - classes - {"__MACOSX"}, key=natural_key)
    if empty and classes:
        yield Problem(where, f"class folders without images: {listing(empty)}; remove them")
    if len(classes) > 1 and {name.lower() for name in classes} <= SPLIT_NAMES:
        names = ", ".join(sorted(classes))
        yield Problem(where, f"the class folders are called {names}: set data.train to one of them")
