"""The audit of all images before any training: missing, damaged, duplicate or nearly so, too few.

Takes a `Manifest`, its folds and the test set, gives problems (nothing can run) and warnings
(it can, but scores would deceive). Each file is read once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foldrace.core.errors import Problem, closest, listing
from foldrace.dataset.duplicates import NearDuplicate, exact_copies, near_copies
from foldrace.dataset.manifest import Manifest
from foldrace.dataset.similarity import ImageInfo, scan_images
from foldrace.dataset.test_set import ImageSet

FEW_PER_FOLD = 2  # with fewer images in a fold, a class's score there is mostly chance
FEW_IMAGES = 10  # the same where there are no folds yet

_SHOWN = 20
_FUZZY_LIMIT = 2000  # most file names to compare in tolerable time


@dataclass(frozen=True)
class Audit:
    """Result of the audit."""

    problems: tuple[Problem, ...]
    """Faults that forbid a run."""
    warnings: tuple[Problem, ...]
    """Faults that make scores deceive, but forbid no run."""
    sizes: tuple[tuple[int, int], ...]
    """Width and height of every file that was read, in pixels: the training images, then the
    test set's."""
    near_duplicates: tuple[NearDuplicate, ...] = ()
    """Training images that nearly equal one of another fold or of the test set."""


def audit(
    manifest: Manifest, fold: NDArray[np.int64] | None, test: ImageSet | None, workers: int
) -> Audit:
    """Read, hash and decode every image, `workers` at a time."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        infos = scan_images(manifest, pool)
        test_infos = [] if test is None else scan_images(test, pool)
        near = near_copies(manifest, infos, fold, test, test_infos, pool)
    problems = list(_faults("training", "data.train_images", manifest, infos))
    if test is not None:
        problems += _faults("test", "data.test_images", test, test_infos)
    warnings = [
        *_tiny_classes(manifest, fold),
        *exact_copies(manifest, infos, fold, test, test_infos),
        *near.warnings,
    ]
    sizes = tuple(info.size for info in infos + test_infos)
    return Audit(tuple(problems), tuple(warnings), sizes, near.rows)


def _faults(
    kind: str, key: str, images: Manifest | ImageSet, infos: Sequence[ImageInfo]
) -> Iterator[Problem]:
    where = f"{kind} images in {images.image_root}"
    missing = [row for row, info in enumerate(infos) if info.missing]
    for row in missing[:_SHOWN]:
        yield _fault(where, images, row, _missing(images.file(row)))
    if len(missing) > min(_SHOWN, len(infos) / 2):
        advice = f"correct the paths or set {key} to the folder that they are relative to"
        yield Problem(where, f"{len(missing):,} of {len(infos):,} are missing; {advice}")
    damaged = [row for row, info in enumerate(infos) if info.fault and not info.missing]
    for row in damaged[:_SHOWN]:
        message = f"unreadable; it {infos[row].fault}; replace or remove the file"
        yield _fault(where, images, row, message)
    if len(damaged) > _SHOWN:
        yield Problem(where, f"{len(damaged):,} of {len(infos):,} are unreadable")


def _fault(where: str, images: Manifest | ImageSet, row: int, message: str) -> Problem:
    """The problem of one file: 'train.csv line 17: images/a.jpg: missing; ...'."""
    if images.lines is not None:
        where = f"{images.table} line {images.lines[row]}"
    return Problem(where, f"{images.image_paths[row]}: {message}")


def _missing(path: Path) -> str:
    near = _similar_name(path)
    hint = f", but there is {near}" if near else ""
    return f"missing; {path} does not exist{hint}; correct the path or remove the row"


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
        yield Problem("training images", f"{message}; their scores are mostly chance; add images")
