"""The form of a submission: classes, a probability of each or of one, a row for each or many.

Takes a sample submission, the classes and the user's `data.submission`, gives a `SubmissionForm`
that says itself in words, or adds problems that name the key which decides.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Literal

from foldrace.config.schema import DataConfig
from foldrace.core.errors import Problem, listing
from foldrace.core.synonyms import did_you_mean
from foldrace.dataset.images import has_image_suffix
from foldrace.dataset.tables import (
    WHOLE_NUMBER,
    Table,
    clean,
    is_number,
    twice,
)

Kind = Literal["labels", "probabilities", "probability_of", "long"]

_EMPTY = frozenset(("", "nan", "na", "n/a", "<na>", "none", "null", "nil", "-", "--", "?", "x"))
"""Cells that hold a place open, in small letters."""
_YES = frozenset(("1", "true", "yes", "y", "positive", "pos"))
"""Of two classes the one that a column of numbers is about."""
_INDEX = ("", "unnamed: 0", "index")
"""Headers of a column of row numbers, as pandas writes it."""
_CHOICES = "labels, probabilities or {probability_of: <class>}"


@dataclass(frozen=True)
class SubmissionForm:
    """What is written for each image, and around it."""

    kind: Kind = "probabilities"
    of: str | None = None
    """probability_of: the class."""
    header: tuple[str, ...] = ()
    """First line exactly as the sample has it (spaces, Unicode form)."""
    delimiter: str = ","
    """What stands between the cells, as in the sample."""
    id_at: int = 0
    """Position of the column of ids; a column of row numbers may stand before it."""
    class_columns: tuple[str, ...] = ()
    """The classes, in the order of the sample's columns where it has one for each."""
    frames: tuple[tuple[str, ...], ...] = ()
    """The sample's cells of each row without those that are predicted; () without a sample."""
    value_at: int = 1
    """Position of the first cell that is predicted."""
    long_rows: tuple[tuple[int, str], ...] = ()
    """long: image and class of each row."""
    images: tuple[str, ...] = ()
    """long: the ids of the images."""
    reason: str = ""
    """Why it was taken where the sample alone does not say it."""

    def __str__(self) -> str:
        column = repr(self.header[self.value_at].strip())
        text = {
            "labels": f"the most probable class in column {column} (data.submission: labels)",
            "probabilities": f"probabilities of {len(self.class_columns)} classes, a column each",
            "probability_of": f"the probability of class {self.of!r} in column {column}",
            "long": f"a row for each image and class, its probability in column {column}",
        }[self.kind]
        return text + (f"; {self.reason}" if self.reason else "")


def form_without_sample(
    data: DataConfig, classes: Sequence[str], id_column: str, problems: list[Problem]
) -> SubmissionForm:
    """The form that the user sets, else probabilities."""
    kind, of = _given(data, classes, problems)
    label = data.label_column if isinstance(data.label_column, str) else "label"
    columns = {"labels": (label,), "probability_of": (of or "",)}.get(kind or "", tuple(classes))
    header = (id_column, *columns)
    return SubmissionForm(kind or "probabilities", of, header, class_columns=tuple(classes))


def form_of_sample(
    sample: Table, data: DataConfig, classes: Sequence[str], problems: list[Problem]
) -> SubmissionForm | None:
    """The form of a sample submission, without its rows; None and problems where it is none."""
    id_at = _id_position(sample, classes)
    names = sample.columns[id_at + 1 :]
    before = len(problems)
    form = SubmissionForm(
        header=sample.header,
        delimiter=sample.delimiter,
        id_at=id_at,
        value_at=id_at + 1,
        class_columns=tuple(classes),
    )
    kind, of = _given(data, classes, problems)
    if not names:
        problems.append(Problem(sample.name, f"has no column beside {sample.columns[0]!r}"))
    if len(problems) > before:
        return None
    if kind in (None, "probabilities"):
        long = _long_form(sample, form, classes)
        if long is not None:
            return long
        matched = match_classes(names, classes)
        if matched is not None:
            columns = tuple(matched)
            told = "" if columns == names else f"{names[0]!r} is class {columns[0]!r}, and so on"
            return replace(form, class_columns=columns, reason=told)
    lone_class = kind is None and len(classes) > 2 and names[0] in classes
    if kind == "probabilities" or len(names) > 1 or lone_class:
        problems += _no_columns_of_classes(sample, names, classes, kind)
        return None
    if kind is None:
        kind, of, reason = _of_one_column(sample, form, data, classes, problems)
        form = replace(form, reason=reason)
    return replace(form, kind=kind, of=of) if kind is not None else None


def match_classes(names: Sequence[str], classes: Sequence[str]) -> list[str] | None:
    """The class that each name stands for, where they stand for each class once; else None.

    Capitals, a beginning or an end that all names share (`prob_cat`) make no difference.
    """
    if len(names) != len(classes):
        return None
    for form in (str, str.casefold, lambda name: name.removesuffix(".0")):
        wanted = {form(name): name for name in classes}
        for shorter in _without_affixes([form(name) for name in names]):
            if len(wanted) == len(classes) and sorted(shorter) == sorted(wanted):
                return [wanted[name] for name in shorter]
    return None


def match_ids(
    ids: Sequence[str], known: Sequence[str], files: Sequence[str]
) -> tuple[list[int], str]:
    """Row of each id of a sample among the test images' ids, and how they were matched.

    `files`: the images' paths. Ids may be paths, with more or fewer folders, with or without
    suffix or zeros. [] where not each one has its partner.
    """
    depth = max((len(PurePosixPath(name).parts) for name in ids), default=1)

    def end(file: str) -> str:
        return "/".join(PurePosixPath(_path(file)).parts[-depth:])

    for way, of_sample, names, of_image in (
        ("", clean, known, clean),
        ("paths", _path, files, end),
        ("ids without suffix", stem, known, stem),
        ("file names without suffix", _base, files, _base),
        ("numbers", _number, known, _number),
        ("numbers of the files", _number, files, _number),
    ):
        mine = [of_sample(name) for name in ids]
        row_of = {of_image(name): row for row, name in enumerate(names)}
        if len(mine) == len(names) == len(row_of) and set(mine) == row_of.keys():
            return [row_of[name] for name in mine], way
    return [], ""


def _given(
    data: DataConfig, classes: Sequence[str], problems: list[Problem]
) -> tuple[Kind | None, str | None]:
    """The user's form and class."""
    match data.submission:
        case {"probability_of": name}:
            if clean(name) not in classes:
                message = f"got {name!r}; {did_you_mean(name, classes)}allowed: {listing(classes)}"
                problems.append(Problem("data.submission: probability_of", message))
            return "probability_of", clean(name)
        case "labels":
            return "labels", None
        case "probabilities":
            return "probabilities", None
    return None, None


def _id_position(sample: Table, classes: Sequence[str]) -> int:
    """Position of the column of ids: the second where row numbers stand before it."""
    if len(sample.columns) < 3 or sample.columns[0].casefold() not in _INDEX:
        return 0
    numbers, second = sample.cells(sample.columns[0]), sample.cells(sample.columns[1])
    counted = all(re.fullmatch(WHOLE_NUMBER, number) for number in numbers)
    return int(counted and len(set(second)) == len(second) and sample.columns[1] not in classes)


def _long_form(
    sample: Table, form: SubmissionForm, classes: Sequence[str]
) -> SubmissionForm | None:
    """The long form: a row for each image and class.

    Another column names the class, or the id ends with it (`im7_cat`).
    """
    names = sample.columns[form.id_at + 1 :]
    ids = sample.cells(sample.columns[form.id_at])
    if len(ids) % len(classes) or len(names) not in (1, 2):
        return None
    if len(names) == 1:
        known = frozenset(classes)
        pairs = [_divided(name, known) for name in ids]
        return _with_rows(form, pairs, form.value_at, classes)
    for name, other in (names, names[::-1]):
        pairs = list(zip(ids, sample.cells(name), strict=True))
        long = _with_rows(form, pairs, sample.columns.index(other), classes)
        if long is not None:
            return long
    return None


def _with_rows(
    form: SubmissionForm, pairs: Sequence[tuple[str, str]], value_at: int, classes: Sequence[str]
) -> SubmissionForm | None:
    """The long form of these images and classes, where each image has each class once."""
    images = {image: row for row, image in enumerate(dict.fromkeys(i for i, _ in pairs))}
    once = len({*pairs}) == len(pairs) == len(images) * len(classes)
    if not once or {name for _, name in pairs} != {*classes}:
        return None
    rows = tuple((images[image], name) for image, name in pairs)
    return replace(form, kind="long", value_at=value_at, long_rows=rows, images=tuple(images))


def _divided(name: str, classes: Collection[str]) -> tuple[str, str]:
    """An id's image, and the class that it ends with; '' where with none."""
    for mark in re.finditer(r"[_\-.:|/]", name):
        if name[mark.end() :] in classes:
            return name[: mark.start()], name[mark.end() :]
    return name, ""


def _of_one_column(
    sample: Table,
    form: SubmissionForm,
    data: DataConfig,
    classes: Sequence[str],
    problems: list[Problem],
) -> tuple[Kind | None, str | None, str]:
    """Labels or the probability of one class, by what one column of the sample holds."""
    name = sample.columns[form.value_at]
    cells = {cell for cell in sample.cells(name) if cell.casefold() not in _EMPTY - {*classes}}
    two = len(classes) == 2
    other = "data.submission: labels writes classes"
    if two and name in classes:
        return "probability_of", name, f"by the column's name; {other}"
    if cells <= {*classes}:
        if two and {*classes} == {"0", "1"} and len(cells) == 1:
            reason = f"guessed, since the sample has {cells.pop()} in each row; {other}"
            return "probability_of", "1", reason
        return "labels", None, ""
    numbers = all(map(is_number, cells))
    holds_place = len(cells) == 1 and (not numbers or float(min(cells)) == 0)
    label = data.label_column if isinstance(data.label_column, str) else None
    if two and numbers and not (holds_place and name == label):
        positive = [c for c in classes if c.casefold() in _YES]
        if len(positive) == 1:
            return "probability_of", positive[0], f"the sample has numbers; {other}"
        message = (
            f"column {name!r} holds numbers: of which class are they the probability? Set "
            f"data.submission: {{probability_of: {classes[1]}}}, or of {classes[0]}; "
            f"data.submission: labels writes classes"
        )
        problems.append(Problem(sample.name, message))
        return None, None, ""
    if holds_place:
        return "labels", None, f"the sample has {cells.pop()!r} in each row"
    unknown = sorted(cells - {*classes})
    message = (
        f"column {name!r} holds what is no class of the training data: {listing(unknown, 6)}; "
        f"classes: {listing(classes, 6)}. Set data.submission: {_CHOICES}"
    )
    problems.append(Problem(sample.name, message))
    return None, None, ""


def _no_columns_of_classes(
    sample: Table, names: Sequence[str], classes: Sequence[str], kind: Kind | None
) -> Iterator[Problem]:
    if kind not in (None, "probabilities"):
        message = f"has {len(names)} columns beside the ids: {listing(names, 6)}"
        yield Problem(sample.name, f"{message}; data.submission: {kind} fills one column")
        return
    unknown = [name for name in names if name not in classes]
    if len(unknown) == len(names) > 1:
        yield Problem(
            sample.name,
            f"has {len(names)} columns beside the ids, and none is called like a class: "
            f"{listing(names, 6)}; classes: {listing(classes, 6)}. Several labels of an image, or "
            "several targets, cannot be predicted: it needs one column per class, or one",
        )
        return
    for message, odd in (
        ("columns that are no class of the training data", unknown),
        ("training classes without a column", [c for c in classes if c not in names]),
        ("columns that are there twice", twice(names)),
    ):
        if odd:
            advice = "it needs the id column, then one column per class, or one that holds classes"
            yield Problem(sample.name, f"{message}: {listing(odd)}; {advice}")


def _without_affixes(names: Sequence[str]) -> Iterator[list[str]]:
    """The names; then without each beginning, or end, that all share up to a separator."""
    yield [*names]
    for cut in re.finditer(r"[_\-. :]", names[0]):
        start, end = names[0][: cut.end()], names[0][cut.start() :]
        if all(name.startswith(start) for name in names):
            yield [name.removeprefix(start) for name in names]
        if all(name.endswith(end) for name in names):
            yield [name.removesuffix(end) for name in names]


def _path(name: str) -> str:
    return clean(posixpath.normpath(name.strip().replace("\\", "/")))


def stem(name: str) -> str:
    """The name without the suffix of an image file."""
    return posixpath.splitext(clean(name))[0] if has_image_suffix(name) else clean(name)


def _base(name: str) -> str:
    return posixpath.basename(stem(_path(name))).casefold()


def _number(name: str) -> str:
    base = _base(name)
    return base.lstrip("0") or "0" if base.isascii() and base.isdigit() else base
