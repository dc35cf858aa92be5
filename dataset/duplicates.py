"""The same image twice: exact copies, and images that nearly equal another one.

Takes the scanned training and test images, gives warnings and `near_duplicates.csv`: the training
images that nearly equal one of another fold or of the test set. Reads that file too. And where the
config asks for it, the training rows with their copies in one group, or without them.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import astuple, dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from foldrace.core.errors import Problem, RunFolderError, listing
from foldrace.core.files import Files
from foldrace.dataset.folds import FoldTable
from foldrace.dataset.left_out import LeftOut
from foldrace.dataset.manifest import Manifest
from foldrace.dataset.similarity import ImageInfo, Match, nearest_matches, row_label, stack_hashes
from foldrace.dataset.test_set import ImageSet

NAME = "near_duplicates.csv"
HEADER = ("image_path", "other", "kind", "distance")
_ADVICE = "give the copies one group or drop them (data.duplicates: group or drop)"


@dataclass(frozen=True)
class NearDuplicate:
    """One row of `near_duplicates.csv`; exact copies are in it too."""

    image_path: str
    """Path of the training image, as in folds.csv."""
    other: str
    """The most similar image of another fold, or of the test set."""
    kind: Literal["fold", "test"]
    distance: int
    """Number of bits of 64 in which the hashes differ."""


def save_near_duplicates(files: Files, rows: Iterable[NearDuplicate]) -> None:
    """Write the file; where there are none, its header alone, which says so.

    With csv, not pandas, which cannot write file names that are not UTF-8.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows(astuple(row) for row in rows)
    files.write(NAME, text.getvalue().encode(errors="surrogateescape"))


def near_duplicate_rows(files: Files, folds: FoldTable) -> NDArray[np.int64] | None:
    """(n,) rows of folds.csv that the file names, ascending; None where there is no file.

    Raises RunFolderError where it is not of these folds.
    """
    if not files.exists(NAME):
        return None
    text = files.read(NAME).decode(errors="surrogateescape")
    try:
        rows = list(csv.reader(io.StringIO(text, newline="")))
    except csv.Error:  # a cell of megabytes
        rows = []
    index = {path: row for row, path in enumerate(folds.image_paths)}
    if not rows or tuple(rows[0]) != HEADER or any(not r or r[0] not in index for r in rows[1:]):
        message = "is damaged or not of this folds.csv; remove it to blend without it"
        raise RunFolderError.single(f"{files.root}/{NAME}", message)
    return np.array(sorted({index[row[0]] for row in rows[1:]}), dtype=np.int64)


@dataclass(frozen=True)
class NearCopies:
    """Training images that nearly equal another one, and the warnings about them."""

    rows: tuple[NearDuplicate, ...]
    warnings: tuple[Problem, ...]


def exact_copies(
    manifest: Manifest,
    infos: Sequence[ImageInfo],
    fold: NDArray[np.int64] | None,
    test: ImageSet | None,
    test_infos: Sequence[ImageInfo],
) -> Iterator[Problem]:
    """Warnings of equal files with different labels, in several folds, or in both sets."""
    copies = _by_content(infos)
    yield from _copy_warnings(manifest, fold, copies)
    if test is not None:
        yield from _leak_warning(manifest, test, copies, test_infos)


def near_copies(
    manifest: Manifest,
    infos: Sequence[ImageInfo],
    fold: NDArray[np.int64] | None,
    test: ImageSet | None,
    test_infos: Sequence[ImageInfo],
    pool: Executor,
) -> NearCopies:
    """Find training images that nearly equal one of another fold, or of the test set."""
    found: list[NearDuplicate] = []
    warnings: list[Problem] = []
    hashes = [info.perceptual_hash for info in infos]
    if fold is not None:
        images = stack_hashes(hashes, fold)
        divided = nearest_matches(images, images, pool)
        found += [_near_duplicate(manifest, manifest, match, "fold") for match in divided]
        warnings += _near_copy_warning(manifest, divided, infos)
    if test is not None:
        tested = stack_hashes(
            [info.perceptual_hash for info in test_infos], np.ones(len(test), np.int64)
        )
        leaked = nearest_matches(
            stack_hashes(hashes, np.zeros(len(manifest), np.int64)), tested, pool
        )
        found += [_near_duplicate(manifest, test, match, "test") for match in leaked]
        warnings += _near_leak_warning(manifest, test, leaked, infos, test_infos)
    return NearCopies(tuple(found), tuple(warnings))


def copies(infos: Sequence[ImageInfo], pool: Executor) -> NDArray[np.int64]:
    """Number of each row's cluster, (n,): images that equal or nearly equal one another.

    An image that resembles one of a cluster belongs to it; most are clusters of their own.
    """
    cluster = np.arange(len(infos))
    for rows in _by_content(infos).values():
        cluster[rows] = rows[0]
    hashes = [info.perceptual_hash for info in infos]
    while True:  # each time every cluster joins the one that its images resemble most
        images = stack_hashes(hashes, cluster)
        matches = nearest_matches(images, images, pool)
        if not matches:
            return cluster
        pairs = np.array([(match.row, match.other) for match in matches])
        cluster = _joined(cluster, pairs)


def grouped(manifest: Manifest, cluster: NDArray[np.int64]) -> Manifest:
    """The rows with the images of a cluster in one group, named by its first row.

    Groups that share a cluster become one.
    """
    n_copies = len(cluster) - len(np.unique(cluster))
    if n_copies == 0:
        return manifest
    names = manifest.groups or manifest.image_paths
    first = {name: row for row, name in reversed(list(enumerate(names)))}
    pairs = np.array([(row, first[name]) for row, name in enumerate(names)])
    joined = _joined(cluster, pairs)
    count = len(np.flatnonzero(np.bincount(np.unique(cluster, return_inverse=True)[1]) > 1))
    message = (
        f"group: {n_copies + count:,} images equal or nearly equal another one; each of these "
        f"{count:,} clusters is in one group"
    )
    return replace(
        manifest,
        groups=tuple(names[row] for row in joined),
        notes=(*manifest.notes, Problem("data.duplicates", message)),
    )


def without_copies(
    manifest: Manifest, infos: Sequence[ImageInfo], cluster: NDArray[np.int64]
) -> tuple[NDArray[np.int64], tuple[LeftOut, ...]]:
    """The rows that stay, ascending, and the others.

    The first of each label in a cluster stays; of identical files with different labels none does.
    """
    left_out: dict[int, LeftOut] = {}
    for rows in _by_content(infos).values():
        labels = [manifest.classes[label] for label in dict.fromkeys(manifest.labels[rows])]
        if len(labels) > 1:
            for row in rows:
                same = next(other for other in rows if other != row)
                detail = f"= {manifest.image_paths[same]}, {' and '.join(labels)}"
                path = manifest.image_paths[row]
                left_out[row] = LeftOut(path, "training", "identical with another label", detail)
    first: dict[tuple[int, int], int] = {}
    for row, key in enumerate(zip(cluster.tolist(), manifest.labels.tolist(), strict=True)):
        if row not in left_out and first.setdefault(key, row) != row:
            sign = "=" if infos[row].digest == infos[first[key]].digest else "≈"
            detail = f"{sign} {manifest.image_paths[first[key]]}"
            left_out[row] = LeftOut(manifest.image_paths[row], "training", "copy", detail)
    kept = np.array([row for row in range(len(manifest)) if row not in left_out], dtype=np.int64)
    return kept, tuple(left_out[row] for row in sorted(left_out))


def _joined(cluster: NDArray[np.int64], pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """The clusters once those of each pair of rows are one; a cluster's number is its first row."""
    # Here, since every worker process imports this file, and none looks for copies.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(cluster)
    links = np.concatenate([pairs, np.stack([np.arange(n), cluster], axis=1)])
    graph = coo_array((np.ones(len(links), np.int8), links.T), shape=(n, n))
    part = connected_components(graph, directed=False)[1]
    _, first = np.unique(part, return_index=True)
    return np.asarray(first[part], dtype=np.int64)


def _by_content(infos: Sequence[ImageInfo]) -> dict[bytes, list[int]]:
    """Digest of a file -> the rows that have it."""
    rows: dict[bytes, list[int]] = {}
    for row, info in enumerate(infos):
        if info.fault is None:
            rows.setdefault(info.digest, []).append(row)
    return rows


def _copy_warnings(
    manifest: Manifest, fold: NDArray[np.int64] | None, copies: dict[bytes, list[int]]
) -> Iterator[Problem]:
    several = [rows for rows in copies.values() if len(rows) > 1]
    conflicting = [rows for rows in several if len(set(manifest.labels[rows])) > 1]
    if conflicting:
        shown = listing(
            " = ".join(
                f"{row_label(manifest, row)} [{manifest.classes[manifest.labels[row]]}]"
                for row in rows
            )
            for rows in conflicting
        )
        message = f"identical files with different labels: {shown}; one label of each is wrong"
        yield Problem("training images", message)
    divided = [] if fold is None else [rows for rows in several if len(set(fold[rows])) > 1]
    if divided:
        shown = listing(" = ".join(row_label(manifest, row) for row in rows) for rows in divided)
        message = f"identical files in different folds: {shown}; validation scores are too good"
        yield Problem("training images", f"{message}: {_ADVICE}")


def _leak_warning(
    manifest: Manifest,
    test: ImageSet,
    copies: dict[bytes, list[int]],
    test_infos: Sequence[ImageInfo],
) -> Iterator[Problem]:
    shared = [
        f"{row_label(test, row)} = {row_label(manifest, copies[info.digest][0])}"
        for row, info in enumerate(test_infos)
        if info.fault is None and info.digest in copies
    ]
    if shared:
        message = f"{len(shared):,} are also training images: {listing(shared)}"
        yield Problem("test images", f"{message}; their scores say nothing about new images")


def _near_duplicate(
    manifest: Manifest, others: Manifest | ImageSet, match: Match, kind: Literal["fold", "test"]
) -> NearDuplicate:
    path, other = manifest.image_paths[match.row], others.image_paths[match.other]
    return NearDuplicate(path, other, kind, match.distance)


def _near_copy_warning(
    manifest: Manifest, divided: Sequence[Match], infos: Sequence[ImageInfo]
) -> Iterator[Problem]:
    """The warning of near copies; exact ones have their own."""
    near = [m for m in divided if infos[m.row].digest != infos[m.other].digest]
    if near:
        pairs = dict.fromkeys((min(m.row, m.other), max(m.row, m.other)) for m in near)
        shown = listing(f"{row_label(manifest, a)} ≈ {row_label(manifest, b)}" for a, b in pairs)
        message = f"{len(near):,} nearly equal one of another fold: {shown}"
        yield Problem("training images", f"{message}; validation scores may be too good: {_ADVICE}")


def _near_leak_warning(
    manifest: Manifest,
    test: ImageSet,
    leaked: Sequence[Match],
    infos: Sequence[ImageInfo],
    test_infos: Sequence[ImageInfo],
) -> Iterator[Problem]:
    near = [m for m in leaked if infos[m.row].digest != test_infos[m.other].digest]
    if near:
        shown = listing(f"{row_label(manifest, m.row)} ≈ {row_label(test, m.other)}" for m in near)
        message = f"{len(near):,} nearly equal a test image: {shown}"
        yield Problem("training images", f"{message}; scores there say little about new images")
