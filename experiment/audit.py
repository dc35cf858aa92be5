"""A look at every image before any training: missing, damaged, duplicate or nearly so, too few.

Takes a `Manifest`, its folds and the test set, gives problems (nothing can run) and warnings
(it can, but scores would deceive). Each file is read once.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from experiment.errors import Problem, listing
from experiment.images import ImageError, check_image, read_bytes
from experiment.likeness import Fingerprint, Match, fingerprint, nearest, stack
from experiment.manifest import Manifest
from experiment.names import closest
from experiment.near_duplicates import NearDuplicate
from experiment.test_set import ImageSet

FEW_PER_FOLD = 2  # with fewer images in a fold, luck decides a class's score there
FEW_IMAGES = 10  # the same where there are no folds yet

_BATCH = 4096  # images queued at once
_SHOWN = 20
_FUZZY_LIMIT = 2000  # so many file names are compared in tolerable time


@dataclass(frozen=True)
class Audit:
    """What was found. `problems` forbid a run, `warnings` do not."""

    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...]
    largest_side: int
    """Pixels: the longest side of all images."""
    images: int
    """How many files were looked at."""
    near_duplicates: tuple[NearDuplicate, ...] = ()
    """Training images that nearly equal one of another fold or of the test set."""


@dataclass(frozen=True)
class _Look:
    side: int
    digest: bytes
    fingerprint: Fingerprint | None
    fault: str | None = None
    missing: bool = False


def audit(
    manifest: Manifest, fold: NDArray[np.int64] | None, test: ImageSet | None, workers: int
) -> Audit:
    """Read, hash and decode every image, `workers` at a time."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        train_looks = _look_at_all(manifest, pool)
        test_looks = [] if test is None else _look_at_all(test, pool)
        torn = [] if fold is None else _alike(train_looks, fold, train_looks, fold, pool)
        leaked = _alike(
            train_looks, _one_side(train_looks, 0), test_looks, _one_side(test_looks, 1), pool
        )
    problems = list(_faults("training", "data.train_images", manifest, train_looks))
    warnings = list(_tiny_classes(manifest, fold))
    copies = _copies(train_looks)
    warnings += _duplicates(manifest, fold, copies)
    warnings += _near_duplicates(manifest, torn, train_looks)
    near = [_near(manifest, manifest, match, "fold") for match in torn]
    if test is not None:
        problems += _faults("test", "data.test_images", test, test_looks)
        warnings += _leaks(manifest, test, copies, test_looks)
        warnings += _near_leaks(manifest, test, leaked, train_looks, test_looks)
        near += [_near(manifest, test, match, "test") for match in leaked]
    looks = train_looks + test_looks
    largest = max((look.side for look in looks), default=0)
    return Audit(tuple(problems), tuple(warnings), largest, len(looks), tuple(near))


def _look_at_all(images: Manifest | ImageSet, pool: Executor) -> list[_Look]:
    looks: list[_Look] = []
    for start in range(0, len(images), _BATCH):
        rows = range(start, min(start + _BATCH, len(images)))
        looks.extend(pool.map(_look, (images.file(row) for row in rows)))
    return looks


def _look(path: Path) -> _Look:
    try:
        data = read_bytes(path)
        side, small = check_image(data, path)
    except ImageError as error:
        return _Look(0, b"", None, error.reason, missing=not os.path.exists(path))
    return _Look(side, hashlib.blake2b(data, digest_size=16).digest(), fingerprint(small))


def _faults(
    kind: str, key: str, images: Manifest | ImageSet, looks: Sequence[_Look]
) -> Iterator[Problem]:
    where = f"{kind} images in {images.image_root}"
    missing = [row for row, look in enumerate(looks) if look.missing]
    for row in missing[:_SHOWN]:
        yield _fault(where, images, row, _missing(images.file(row)))
    if len(missing) > min(_SHOWN, len(looks) / 2):
        advice = f"correct the paths or set {key} to the folder that they are relative to"
        yield Problem(where, f"{len(missing):,} of {len(looks):,} are missing; {advice}")
    damaged = [row for row, look in enumerate(looks) if look.fault and not look.missing]
    for row in damaged[:_SHOWN]:
        message = f"unreadable; it {looks[row].fault}; replace or remove the file"
        yield _fault(where, images, row, message)
    if len(damaged) > _SHOWN:
        yield Problem(where, f"{len(damaged):,} of {len(looks):,} are unreadable")


def _fault(where: str, images: Manifest | ImageSet, row: int, message: str) -> Problem:
    """'train.csv line 17: images/a.jpg: missing; ...'"""
    if images.lines is not None:
        where = f"{images.table} line {images.lines[row]}"
    return Problem(where, f"{images.image_paths[row]}: {message}")


def _missing(path: Path) -> str:
    near = _similar_name(path)
    hint = f", but there is {near}" if near else ""
    return f"missing; {path} does not exist{hint}; correct the path or remove the row"


def _named(images: Manifest | ImageSet, row: int) -> str:
    path = images.image_paths[row]
    return path if images.lines is None else f"{path} (line {images.lines[row]})"


def _similar_name(path: Path) -> str | None:
    """A file beside `path` with another case or extension, else with a similar name."""
    if not path.parent.is_dir():
        return None
    names = sorted(os.listdir(path.parent))
    stem = path.stem.casefold()
    for name in names:
        if os.path.splitext(name)[0].casefold() == stem:
            return name
    near = closest(path.name, names, n=1) if len(names) <= _FUZZY_LIMIT else []
    return near[0] if near else None


def _copies(looks: Sequence[_Look]) -> dict[bytes, list[int]]:
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
                f"{_named(manifest, row)} [{manifest.classes[manifest.labels[row]]}]"
                for row in rows
            )
            for rows in conflicting
        )
        message = f"identical files with different labels: {shown}; one label of each is wrong"
        yield Problem("training images", message)
    torn = [] if fold is None else [rows for rows in several if len(set(fold[rows])) > 1]
    if torn:
        shown = listing(" = ".join(_named(manifest, row) for row in rows) for rows in torn)
        message = f"identical files in different folds: {shown}; validation scores are too good"
        advice = "drop the copies or give them one group (data.group_column)"
        yield Problem("training images", f"{message}: {advice}")


def _leaks(
    manifest: Manifest,
    test: ImageSet,
    copies: dict[bytes, list[int]],
    test_looks: Sequence[_Look],
) -> Iterator[Problem]:
    shared = [
        f"{_named(test, row)} = {_named(manifest, copies[look.digest][0])}"
        for row, look in enumerate(test_looks)
        if look.fault is None and look.digest in copies
    ]
    if shared:
        message = f"{len(shared):,} are also training images: {listing(shared)}"
        yield Problem("test images", f"{message}; their scores say nothing about new images")


def _alike(
    looks: Sequence[_Look],
    sides: NDArray[np.int64],
    others: Sequence[_Look],
    other_sides: NDArray[np.int64],
    pool: Executor,
) -> list[Match]:
    images = stack([look.fingerprint for look in looks], sides)
    return nearest(images, stack([look.fingerprint for look in others], other_sides), pool)


def _one_side(looks: Sequence[_Look], side: int) -> NDArray[np.int64]:
    return np.full(len(looks), side, dtype=np.int64)


def _near(
    manifest: Manifest, others: Manifest | ImageSet, match: Match, kind: Literal["fold", "test"]
) -> NearDuplicate:
    path, other = manifest.image_paths[match.row], others.image_paths[match.other]
    return NearDuplicate(path, other, kind, match.distance)


def _near_duplicates(
    manifest: Manifest, torn: Sequence[Match], looks: Sequence[_Look]
) -> Iterator[Problem]:
    """Without the exact copies, which have their own warning."""
    near = [m for m in torn if looks[m.row].digest != looks[m.other].digest]
    if near:
        pairs = dict.fromkeys((min(m.row, m.other), max(m.row, m.other)) for m in near)
        shown = listing(f"{_named(manifest, a)} ≈ {_named(manifest, b)}" for a, b in pairs)
        message = f"{len(near):,} nearly equal one of another fold: {shown}"
        advice = "drop the copies or give them one group (data.group_column)"
        yield Problem("training images", f"{message}; validation scores may be too good: {advice}")


def _near_leaks(
    manifest: Manifest,
    test: ImageSet,
    leaked: Sequence[Match],
    looks: Sequence[_Look],
    test_looks: Sequence[_Look],
) -> Iterator[Problem]:
    near = [m for m in leaked if looks[m.row].digest != test_looks[m.other].digest]
    if near:
        shown = listing(f"{_named(manifest, m.row)} ≈ {_named(test, m.other)}" for m in near)
        message = f"{len(near):,} nearly equal a test image: {shown}"
        yield Problem("training images", f"{message}; scores there say little about new images")


def _tiny_classes(manifest: Manifest, fold: NDArray[np.int64] | None) -> Iterator[Problem]:
    n_classes = len(manifest.classes)
    counts = np.bincount(manifest.labels, minlength=n_classes)
    if fold is None:
        fewest, few, unit = counts, FEW_IMAGES, ""
    else:
        per_fold = [
            np.bincount(manifest.labels[fold == f], minlength=n_classes)
            for f in range(int(fold.max()) + 1)
        ]
        fewest, few, unit = np.min(per_fold, axis=0), FEW_PER_FOLD, " in some fold"
    tiny = [f"{manifest.classes[c]} ({counts[c]})" for c in np.flatnonzero(fewest < few)]
    if tiny:
        message = f"classes with fewer than {few} images{unit}: {listing(tiny)}"
        yield Problem("training images", f"{message}; luck decides their scores, add images")
