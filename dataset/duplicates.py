"""The same image twice: exact copies, and images that nearly equal another one.

Takes the looks at training and test images, gives warnings and the rows of `near_duplicates.csv`.

`near_duplicates.csv`: training images that nearly equal one of another fold or of the test set.

Takes what the audit found, gives the file in the run folder, and later the rows that it names.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import astuple, dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from foldrace.core.errors import Problem, RunFolderError, listing
from foldrace.core.files import Files
from foldrace.dataset.folds import FoldTable
from foldrace.dataset.manifest import Manifest
from foldrace.dataset.similarity import Look, Match, named, nearest, stack
from foldrace.dataset.test_set import ImageSet

NAME = "near_duplicates.csv"
HEADER = ("image_path", "other", "kind", "distance")


@dataclass(frozen=True)
class NearDuplicate:
    """One row of the file; exact copies are in it too."""

    image_path: str
    """Of the training image, as in folds.csv."""
    other: str
    """The most similar image of another fold, or of the test set."""
    kind: Literal["fold", "test"]
    distance: int
    """Bits of 64 in which the hashes differ."""


def save_near_duplicates(files: Files, found: Iterable[NearDuplicate]) -> None:
    """Write the file; without any, its header alone: then it is known that there are none."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows(astuple(one) for one in found)
    files.write(NAME, text.getvalue().encode(errors="surrogateescape"))


def near_duplicate_rows(files: Files, folds: FoldTable) -> NDArray[np.int64] | None:
    """(n,) rows of folds.csv that the file names, ascending; None where there is no file.

    Raises RunFolderError where it is not of these folds.
    """
    if not files.exists(NAME):
        return None
    text = files.read(NAME).decode(errors="surrogateescape")
    rows = list(csv.reader(io.StringIO(text, newline="")))
    index = {path: row for row, path in enumerate(folds.image_paths)}
    if not rows or tuple(rows[0]) != HEADER or any(not r or r[0] not in index for r in rows[1:]):
        message = "is damaged or not of this folds.csv; remove it to blend without it"
        raise RunFolderError.single(f"{files.root}/{NAME}", message)
    return np.array(sorted({index[row[0]] for row in rows[1:]}), dtype=np.int64)


@dataclass(frozen=True)
class NearCopies:
    """What the run folder lists, and what the user is told of it."""

    found: tuple[NearDuplicate, ...]
    warnings: tuple[Problem, ...]


def exact_copies(
    manifest: Manifest,
    looks: Sequence[Look],
    fold: NDArray[np.int64] | None,
    test: ImageSet | None,
    test_looks: Sequence[Look],
) -> Iterator[Problem]:
    """Files of the same bytes whose labels differ, or that lie in several folds or in both sets."""
    copies = _by_content(looks)
    yield from _duplicates(manifest, fold, copies)
    if test is not None:
        yield from _leaks(manifest, test, copies, test_looks)


def near_copies(
    manifest: Manifest,
    looks: Sequence[Look],
    fold: NDArray[np.int64] | None,
    test: ImageSet | None,
    test_looks: Sequence[Look],
    pool: Executor,
) -> NearCopies:
    """Training images that nearly equal one of another fold, or of the test set."""
    found: list[NearDuplicate] = []
    warnings: list[Problem] = []
    prints = [look.fingerprint for look in looks]
    if fold is not None:
        images = stack(prints, fold)
        torn = nearest(images, images, pool)
        found += [_near(manifest, manifest, match, "fold") for match in torn]
        warnings += _near_duplicates(manifest, torn, looks)
    if test is not None:
        tested = stack([look.fingerprint for look in test_looks], np.ones(len(test), np.int64))
        leaked = nearest(stack(prints, np.zeros(len(manifest), np.int64)), tested, pool)
        found += [_near(manifest, test, match, "test") for match in leaked]
        warnings += _near_leaks(manifest, test, leaked, looks, test_looks)
    return NearCopies(tuple(found), tuple(warnings))


def _by_content(looks: Sequence[Look]) -> dict[bytes, list[int]]:
    """Rows by content."""
    rows: dict[bytes, list[int]] = {}
    for row, look in enumerate(looks):
        if look.fault is None:
            rows.setdefault(look.digest, []).append(row)
    return rows


def _duplicates(
    manifest: Manifest, fold: NDArray[np.int64] | None, copies: dict[bytes, list[int]]
) -> Iterator[Problem]:
    several = [rows for rows in copies.values() if len(rows) > 1]
    conflicting = [rows for rows in several if len(set(manifest.labels[rows])) > 1]
    if conflicting:
        shown = listing(
            " = ".join(
                f"{named(manifest, row)} [{manifest.classes[manifest.labels[row]]}]" for row in rows
            )
            for rows in conflicting
        )
        message = f"identical files with different labels: {shown}; one label of each is wrong"
        yield Problem("training images", message)
    torn = [] if fold is None else [rows for rows in several if len(set(fold[rows])) > 1]
    if torn:
        shown = listing(" = ".join(named(manifest, row) for row in rows) for rows in torn)
        message = f"identical files in different folds: {shown}; validation scores are too good"
        advice = "drop the copies or give them one group (data.group_column)"
        yield Problem("training images", f"{message}: {advice}")


def _leaks(
    manifest: Manifest,
    test: ImageSet,
    copies: dict[bytes, list[int]],
    test_looks: Sequence[Look],
) -> Iterator[Problem]:
    shared = [
        f"{named(test, row)} = {named(manifest, copies[look.digest][0])}"
        for row, look in enumerate(test_looks)
        if look.fault is None and look.digest in copies
    ]
    if shared:
        message = f"{len(shared):,} are also training images: {listing(shared)}"
        yield Problem("test images", f"{message}; their scores say nothing about new images")


def _near(
    manifest: Manifest, others: Manifest | ImageSet, match: Match, kind: Literal["fold", "test"]
) -> NearDuplicate:
    path, other = manifest.image_paths[match.row], others.image_paths[match.other]
    return NearDuplicate(path, other, kind, match.distance)


def _near_duplicates(
    manifest: Manifest, torn: Sequence[Match], looks: Sequence[Look]
) -> Iterator[Problem]:
    """Without the exact copies, which have their own warning."""
    near = [m for m in torn if looks[m.row].digest != looks[m.other].digest]
    if near:
        pairs = dict.fromkeys((min(m.row, m.other), max(m.row, m.other)) for m in near)
        shown = listing(f"{named(manifest, a)} ≈ {named(manifest, b)}" for a, b in pairs)
        message = f"{len(near):,} nearly equal one of another fold: {shown}"
        advice = "drop the copies or give them one group (data.group_column)"
        yield Problem("training images", f"{message}; validation scores may be too good: {advice}")


def _near_leaks(
    manifest: Manifest,
    test: ImageSet,
    leaked: Sequence[Match],
    looks: Sequence[Look],
    test_looks: Sequence[Look],
) -> Iterator[Problem]:
    near = [m for m in leaked if looks[m.row].digest != test_looks[m.other].digest]
    if near:
        shown = listing(f"{named(manifest, m.row)} ≈ {named(test, m.other)}" for m in near)
        message = f"{len(near):,} nearly equal a test image: {shown}"
        yield Problem("training images", f"{message}; scores there say little about new images")
