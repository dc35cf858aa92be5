"""A guess at a user's files: training images, test images and sample submission, without a config.

Takes a folder, a zip or a table, gives the keys of the config's sections `data` and `folds`, or a
DataError that lists what is missing, or possible, with the key that decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from foldrace.core.errors import DataError, Problem, listing
from foldrace.dataset.archive import member_names, unpack
from foldrace.dataset.guess_columns import (
    Columns,
    find_image_column,
    find_labels,
    likely_labels,
    shown_column,
)
from foldrace.dataset.image_paths import ImageIndex
from foldrace.dataset.images import find_images, has_image_suffix
from foldrace.dataset.places import is_sample, is_truth, of_test, split_of, title
from foldrace.dataset.readers import TABLE_KINDS, is_table
from foldrace.dataset.tables import (
    SPLIT_NAMES,
    Table,
    inner_folder,
    own_table,
    read_table,
)


@dataclass
class DataGuess:
    """Keys of the config's sections, with absolute paths, and what was seen on the way."""

    data: dict[str, object] = field(default_factory=dict)
    folds: dict[str, object] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """Lines for the user: what was taken for what, and what was left out."""


def is_data(path: Path) -> bool:
    """True for what holds data itself and is no config: a folder, a zip or a table."""
    return path.is_dir() or path.suffix.lower() == ".zip" or is_table(path)


def guess_data(source: Path, given: Mapping[str, object]) -> DataGuess:
    """The keys for a folder, a zip or a table.

    `given`: keys of the section `data` that the user has set, and `fold_column`; they decide.
    Raises DataError with every problem.
    """
    if not source.exists():
        raise DataError.single(str(source), "does not exist")
    problems: list[Problem] = []
    source = source.absolute()
    guess = DataGuess()
    if source.is_dir():
        _Search(source, given, guess, problems).run()
    elif is_table(source):
        alone = {"train": source, "test": None, "sample_submission": None, **given}
        _Search(source.parent, alone, guess, problems).run()
    elif _holds_more_than_classes(source):
        folder = unpack(source)
        guess.notes.append(f"{source.name} is unpacked to {folder}")
        _Search(folder, given, guess, problems).run()
    else:
        guess.data["train"] = str(source)
        guess.notes.append(f"training images: {source.name}, a folder per class")
    if problems:
        raise DataError(problems)
    return guess


def image_names(path: Path) -> list[str]:
    """Paths of the images in a folder or a zip."""
    if path.is_dir():
        return find_images(path)
    return [name for name in member_names(path) if has_image_suffix(name)]


def class_folders(paths: Iterable[str]) -> list[str]:
    """Names of the folders that the images lie in, without folders that wrap all of them.

    Empty where images lie beside folders, or in one folder alone.
    """
    parts = [path.split("/") for path in paths]
    while parts and len({p[0] for p in parts}) == 1 and all(len(p) > 2 for p in parts):
        parts = [p[1:] for p in parts]
    names = {p[0] for p in parts}
    return sorted(names) if len(names) > 1 and all(len(p) > 1 for p in parts) else []


def _holds_more_than_classes(archive: Path) -> bool:
    """True where a zip holds tables, or folders for training and test."""
    names = member_names(archive)
    classes = class_folders(filter(has_image_suffix, names))
    return any(is_table(Path(name)) for name in names) or not _are_classes(classes)


def _are_classes(names: Sequence[str]) -> bool:
    """False where folders are named after splits of the data; a class may be called train."""
    splits = {name.casefold() for name in names} & SPLIT_NAMES
    return splits <= {"train"} and (not splits or len(names) > 2)


class _Search:
    """One folder, looked through for the files of a data set or a competition."""

    def __init__(
        self,
        folder: Path,
        given: Mapping[str, object],
        guess: DataGuess,
        problems: list[Problem],
    ) -> None:
        self._given, self._guess, self._problems = given, guess, problems
        self._folder, entries = _unwrapped(folder)
        self._tables = [path for path in entries if path.is_file() and is_table(path)]
        self._parts = [p for p in entries if p.is_dir() or p.suffix.lower() == ".zip"]
        self._images: dict[Path, list[str]] = {}
        self._indices: dict[Path, ImageIndex] = {}
        for part in self._parts:
            if (own := own_table(part)) is not None:
                self._tables.append(own)
            elif part.is_dir() and not self._images_of(part):  # csv/ beside images/
                self._tables += sorted(filter(is_table, part.iterdir()))

    def run(self) -> None:
        """Fill the guess, or add problems."""
        sample = self._sample()
        if self._train_table(sample) is None and not self._problems:
            self._train_folder()
        if not self._problems:
            self._test(sample)

    def _sample(self) -> Table | None:
        """The sample submission."""
        if "sample_submission" in self._given:
            path = self._given["sample_submission"]
            return self._read(Path(str(path)).absolute()) if path is not None else None
        named = [t for t in self._tables if "sample" in t.stem.casefold()]
        named = named or [t for t in self._tables if "submission" in t.stem.casefold()]
        path = self._only("data.sample_submission", "sample submission", named)
        if path is None:
            return None
        self._guess.data["sample_submission"] = str(path)
        self._guess.notes.append(f"sample submission: {path.name}")
        return self._read(path)

    def _train_table(self, sample: Table | None) -> Path | None:
        """The table of the training images, with its columns."""
        found = self._tables_of_images()
        classes = sample.columns[1:] if sample is not None else ()
        named = [path for path in found if split_of(title(path)) == "train"] or list(found)
        path = self._only("data.train", "training table", self._labelled(named, found, classes))
        table = None if path is None or self._problems else self._read(path)
        if path is None or table is None:
            return None
        columns = found[path]
        find_labels(table, columns, classes, self._given, self._problems)
        keys: dict[str, object] = {
            "train": str(path),
            "train_images": columns.images,
            "image_column": columns.image_column,
            "label_column": columns.label_column,
            "group_column": columns.group_column,
        }
        if isinstance(columns.label_column, tuple):
            keys["label_column"] = [*columns.label_column]
        self._guess.data |= {key: value for key, value in keys.items() if value is not None}
        if columns.fold_column is not None:
            self._guess.folds = {"k": columns.folds, "column": columns.fold_column}
        where = f" in {Path(columns.images).name}" if columns.images else ""
        self._guess.notes.append(
            f"training images: {self._shown(path)}, images in column {columns.image_column}{where}"
            f", labels in {shown_column(columns.label_column)}"
        )
        self._guess.notes += columns.notes
        return path

    def _labelled(
        self, paths: Sequence[Path], found: Mapping[Path, Columns], classes: Sequence[str]
    ) -> list[Path]:
        """Of several tables the only one that surely has labels; else all."""
        sure = []
        for path in paths if len(paths) > 1 else ():
            table = self._read(path)
            names = [] if table is None else [*table.columns]
            others = [name for name in names if name != found[path].image_column]
            if table is not None and likely_labels(table, others, classes, sure=True):
                sure.append(path)
        if len(sure) != 1:
            return [*paths]
        for path in paths:
            if path not in sure:
                self._guess.notes.append(f"{path.name} is not used: {sure[0].name} has the labels")
        return sure

    def _tables_of_images(self) -> dict[Path, Columns]:
        """The table that the user names, or those that may be of the training images."""
        given = self._given.get("train")
        if given is not None:
            path = Path(str(given)).absolute()
            if not is_table(path):
                return {}
            columns = self._columns(path, "train")
            if not self._problems and columns.image_column is None:
                self._no_image_column(path)
            return {path: columns}
        tables = [t for t in self._tables if not is_sample(t) and not of_test(t)]
        for path in tables:
            if split_of(title(path)) == "val" and len(tables) > 1:
                tables = [t for t in tables if t != path]
                note = f"{self._shown(path)} is not used: the folds are made of the training images"
                self._guess.notes.append(note)
        found = {path: self._columns(path, "train") for path in tables}
        for path in tables:
            if found[path].image_column is None:
                del found[path]
                self._guess.notes.append(
                    f"{path.name} is not used: no column of it names images here"
                )
        return found

    def _train_folder(self) -> None:
        """A folder or zip with one folder per class."""
        if "train" in self._given:
            return
        by_class = [part for part in self._parts if class_folders(self._images_of(part))]
        named = [part for part in by_class if split_of(part.name) == "train"]
        own = class_folders(self._images_of(self._folder))
        if not named and len(own) > len(by_class) and _are_classes(own):
            self._take_classes(self._folder, own)
            return
        others = [part for part in by_class if split_of(part.name) is None]
        path = self._only("data.train", "folder or zip of class folders", named or others)
        if path is not None:
            self._take_classes(path, class_folders(self._images_of(path)))
        elif not self._problems:
            there = [p.name for p in (*self._tables, *self._parts)] or ["nothing"]
            self._problems.append(
                Problem(
                    str(self._folder),
                    "holds no labelled images; needed: one folder of images per class, or a table "
                    f"({TABLE_KINDS}) with a column of image files and one of labels; there is "
                    f"{listing(there)}. Name it: --set data.train=PATH",
                )
            )

    def _take_classes(self, path: Path, classes: Sequence[str]) -> None:
        self._guess.data["train"] = str(path)
        self._guess.notes.append(f"training images: {path.name}, {len(classes)} folders of classes")
        for part in self._parts:
            if split_of(part.name) == "val" and path != self._folder:
                self._guess.notes.append(
                    f"{part.name} is not used: the folds are made of {path.name} alone"
                )

    def _test(self, sample: Table | None) -> None:
        """The test images: a table, a folder or a zip."""
        if "test" in self._given:
            self._given_test()
            return
        tables = {
            path: self._columns(path, "test")
            for path in self._tables
            if of_test(path) and not is_truth(path) and not is_sample(path)
        }
        for path in self._tables:
            if is_truth(path) and of_test(path):
                self._guess.notes.append(f"{path.name} is not used: it looks like the test labels")
        tables = {path: columns for path, columns in tables.items() if columns.image_column}
        chosen = self._only("data.test", "test table", list(tables))
        if chosen is not None:
            self._take_test_table(chosen, tables[chosen])
        elif not self._problems:
            named = [p for p in self._parts if split_of(p.name) == "test"]
            named = [p for p in named if self._images_of(p)]
            chosen = self._only("data.test", "folder or zip of test images", named)
            if chosen is not None:
                self._guess.data["test"] = str(chosen)
                count = len(self._images_of(chosen))
                self._guess.notes.append(f"test images: {chosen.name}, {count:,} images")
        if chosen is None and sample is not None and not self._problems:
            self._problems.append(
                Problem(
                    sample.name,
                    "is a sample submission, but there are no test images (a table, folder or zip "
                    "named test...); name them: --set data.test=PATH, or go without a submission: "
                    "--set data.sample_submission=null",
                )
            )

    def _given_test(self) -> None:
        value = self._given["test"]
        path = None if value is None else Path(str(value)).absolute()
        if path is not None and is_table(path):
            columns = self._columns(path, "test")
            if columns.image_column is None:
                self._no_image_column(path)
            else:
                self._take_test_table(path, columns)

    def _take_test_table(self, path: Path, columns: Columns) -> None:
        keys = {
            "test": str(path),
            "test_images": columns.images,
            "test_image_column": columns.image_column,
        }
        self._guess.data |= {key: value for key, value in keys.items() if value is not None}
        where = f" in {Path(columns.images).name}" if columns.images else ""
        self._guess.notes.append(
            f"test images: {self._shown(path)}, images in column {columns.image_column}{where}"
        )

    def _columns(self, path: Path, role: str) -> Columns:
        table = self._read(path)
        if table is None:
            return Columns()
        key = "image_column" if role == "train" else "test_image_column"
        named, images = self._given.get(key), self._given.get(f"{role}_images")
        folder = path.parent if self._images_of(path.parent) else self._folder
        folder = folder if images is None else Path(str(images)).absolute()
        index = self._index(folder if folder.is_dir() else unpack(folder))
        name = None if named is None else str(named)
        columns = find_image_column(table, index, role, name, self._problems)
        columns.image_column = columns.image_column or name  # the checks tell what is missing
        columns.images = columns.images if images is None else None
        return columns

    def _no_image_column(self, path: Path) -> None:
        self._problems.append(
            Problem(
                str(path),
                f"no column names image files below {path.parent} or in a zip there; give the "
                "folder that its paths start from: --set data.train_images=FOLDER",
            )
        )

    def _only(self, key: str, what: str, paths: Sequence[Path]) -> Path | None:
        """The only path, or that of the plainest name; a problem where several are left."""
        names = ("train", "training", "test", "testing", "sample_submission")
        plain = [path for path in paths if path.stem.casefold() in names]
        unzipped = [path for path in plain if path.is_dir()]  # beside the zip that it came from
        for found in (paths, plain, unzipped):
            if len(found) == 1:
                return found[0]
        if paths:
            listed = listing(path.name for path in paths)
            message = f"each may be the {what}: {listed}; choose: --set {key}={paths[0]}"
            self._problems.append(Problem(str(self._folder), message))
        return None

    def _shown(self, path: Path) -> str:
        return (
            str(path.relative_to(self._folder)) if path.is_relative_to(self._folder) else path.name
        )

    def _read(self, path: Path) -> Table | None:
        encoding = self._given.get("encoding")
        return read_table(
            path, str(path), self._problems, None if encoding is None else str(encoding)
        )

    def _index(self, folder: Path) -> ImageIndex:
        if folder not in self._indices:
            self._indices[folder] = ImageIndex(folder)
        return self._indices[folder]

    def _images_of(self, path: Path) -> list[str]:
        if path not in self._images:
            self._images[path] = image_names(path)
        return self._images[path]


def _unwrapped(folder: Path) -> tuple[Path, list[Path]]:
    """The folder, or the one that is wrapped in it, and what lies there."""
    while True:
        entries = sorted(p for p in folder.iterdir() if not p.name.startswith((".", "__MACOSX")))
        inner = inner_folder(folder)
        files = any(p.is_file() and (is_table(p) or p.suffix.lower() == ".zip") for p in entries)
        if inner is None or files or not any(p.is_dir() for p in inner.iterdir()):
            return folder, entries
        folder = inner
