"""The audit of all images before any training: missing, damaged, empty, duplicate, too few.

Takes a `Manifest` and gives the rows that the config's policies keep; takes these, their folds and
the test set, gives problems (nothing can run) and warnings (it can, but scores would deceive). Each
file is read once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from foldrace.config.schema import DataConfig
from foldrace.core.errors import Problem, listing
from foldrace.core.synonyms import closest
from foldrace.dataset.duplicates import (
    NearDuplicate,
    copies,
    exact_copies,
    grouped,
    near_copies,
    without_copies,
)
from foldrace.dataset.folds import fold_warnings, parts_of
from foldrace.dataset.images import MOST_PIXELS
from foldrace.dataset.left_out import UNREADABLE, LeftOut
from foldrace.dataset.manifest import Manifest
from foldrace.dataset.similarity import ImageInfo, row_label, scan_images
from foldrace.dataset.test_set import ImageSet

FEW_PER_FOLD = 2  # with fewer images in a fold, a class's score there is mostly chance
FEW_IMAGES = 10  # the same where there are no folds yet

_SHOWN = 20
_EXAMPLES = 3
_FUZZY_LIMIT = 2000  # most file names to compare in tolerable time
_MOST_BAD = (
    0.5  # share of a set: where more is missing or damaged, the path is wrong, not the files
)
_EMPTY = 8  # of 255: what differs by less shows nothing
_SHOWN_EMPTY = 5
_NO_LABEL = frozenset(("nan", "<na>", "null", "n/a", "#n/a", "nat"))
_DIM = 32  # of 255: the brightest of 12-bit values in a 16-bit file is 16


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
    left_out: tuple[LeftOut, ...] = ()
    """Test images without a prediction of their own."""


@dataclass(frozen=True)
class ScannedRows:
    """The training rows that the config's policies keep, and what their files hold."""

    manifest: Manifest
    infos: tuple[ImageInfo, ...]


def scan_rows(manifest: Manifest, data: DataConfig, workers: int) -> ScannedRows:
    """Read every training image, `workers` at a time; `on_bad_image` and `duplicates` are applied.

    Bad images stay, for `audit` to name, where they are more than half: then a path is wrong.
    """
    infos = tuple(scan_images(manifest, workers, data.max_pixels))
    rows = ScannedRows(manifest, infos)
    if data.on_bad_image == "drop":
        bad = _bad(manifest, infos, "training")
        kept = np.array([row for row in range(len(infos)) if row not in bad], dtype=np.int64)
        rows = _of(rows, kept, bad.values())
    if data.duplicates != "report":
        with ThreadPoolExecutor(max(1, workers)) as pool:
            cluster = copies(rows.infos, pool)
        if data.duplicates == "group":
            return replace(rows, manifest=grouped(rows.manifest, cluster))
        rows = _of(rows, *without_copies(rows.manifest, rows.infos, cluster))
    return rows


def kept_rows(manifest: Manifest, data: DataConfig, workers: int) -> Manifest:
    """The rows that `scan_rows` keeps; images are read only where a policy asks for it."""
    if data.on_bad_image == "stop" and data.duplicates == "report":
        return manifest
    return scan_rows(manifest, data, workers).manifest


def audit(
    manifest: Manifest,
    fold: NDArray[np.int64] | None,
    test: ImageSet | None,
    workers: int,
    scanned: Sequence[ImageInfo] | None = None,
    bad_tests_pass: bool = False,
    max_pixels: int = MOST_PIXELS,
) -> Audit:
    """Read, hash and decode every image, `workers` at a time.

    `fold`: as `make_folds` gives it; `scanned`: what `scan_rows` has found in the training images.
    With `bad_tests_pass`, test images that give no image are no problem.
    """
    infos = scan_images(manifest, workers, max_pixels) if scanned is None else scanned
    test_infos = [] if test is None else scan_images(test, workers, max_pixels)
    part = None if fold is None else parts_of(fold)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        near = near_copies(manifest, infos, part, test, test_infos, pool)
    problems = list(_faults("training", "data.train_images", manifest, infos))
    left_out: dict[int, LeftOut] = {}
    if test is not None and bad_tests_pass:
        left_out = _bad(test, test_infos, "test")
    if test is not None and not left_out:
        problems += _faults("test", "data.test_images", test, test_infos)
    warnings = [
        *_class_names(manifest),
        *_tiny_classes(manifest, fold),
        *(fold_warnings(manifest, fold) if fold is not None else ()),
        *_little_to_see("training", manifest, infos),
        *(_little_to_see("test", test, test_infos) if test is not None else ()),
        *exact_copies(manifest, infos, part, test, test_infos),
        *near.warnings,
    ]
    sizes = tuple(info.size for info in (*infos, *test_infos) if info.fault is None)
    return Audit(tuple(problems), tuple(warnings), sizes, near.rows, tuple(left_out.values()))


def _of(rows: ScannedRows, kept: NDArray[np.int64], left_out: Iterable[LeftOut]) -> ScannedRows:
    infos = tuple(rows.infos[row] for row in kept)
    return ScannedRows(rows.manifest.chosen(kept, left_out), infos)


def _bad(
    images: Manifest | ImageSet, infos: Sequence[ImageInfo], data: Literal["training", "test"]
) -> dict[int, LeftOut]:
    """Row -> record of what gives no image; none where that is most of them."""
    rows = [row for row, info in enumerate(infos) if info.fault is not None]
    if len(rows) > _MOST_BAD * len(infos):
        return {}
    faults = (f"it {infos[row].fault}" for row in rows)
    return {
        row: LeftOut(images.image_paths[row], data, UNREADABLE, fault)
        for row, fault in zip(rows, faults, strict=True)
    }


def _faults(
    kind: str, key: str, images: Manifest | ImageSet, infos: Sequence[ImageInfo]
) -> Iterator[Problem]:
    where = f"{kind} images in {images.image_root}"
    missing = [row for row, info in enumerate(infos) if info.missing]
    most = len(missing) > _MOST_BAD * len(infos)  # then a path is wrong, and each row says the same
    if most or len(missing) > _SHOWN:
        advice = f"correct the paths or set {key} to the folder that they are relative to"
        yield Problem(where, f"{len(missing):,} of {len(infos):,} are missing; {advice}")
    for row in missing[: _EXAMPLES if most else _SHOWN]:
        yield _fault(where, images, row, _missing(images.file(row), kind))
    damaged = [row for row, info in enumerate(infos) if info.fault and not info.missing]
    if len(damaged) > _SHOWN:
        yield Problem(where, f"{len(damaged):,} of {len(infos):,} are unreadable")
    for row in damaged[:_SHOWN]:
        message = f"unreadable; it {infos[row].fault}; replace or remove the file{_policy(kind)}"
        yield _fault(where, images, row, message)


def _fault(where: str, images: Manifest | ImageSet, row: int, message: str) -> Problem:
    """The problem of one file: 'train.csv line 17: images/a.jpg: missing; ...'."""
    if images.lines is not None:
        where = f"{images.table} line {images.lines[row]}"
    return Problem(where, f"{images.image_paths[row]}: {message}")


def _policy(kind: str) -> str:
    """The key that lets a run go on without the image."""
    key = "on_bad_image: drop" if kind == "training" else "on_bad_test_image: prior"
    return f", or set data.{key}"


def _missing(path: Path, kind: str) -> str:
    near = _similar_name(path)
    hint = f", but there is {near}" if near else ""
    return (
        f"missing; {path} does not exist{hint}; correct the path or remove the row{_policy(kind)}"
    )


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
            np.bincount(manifest.labels[split == f], minlength=n_classes)
            for split in np.atleast_2d(fold)
            for f in range(max(int(split.min()), 0), int(split.max()) + 1)
        ]
        fewest, few, unit = np.min(per_fold, axis=0), FEW_PER_FOLD, " in some fold"
    tiny = [f"{manifest.classes[c]} ({counts[c]})" for c in np.flatnonzero(fewest < few)]
    if tiny:
        message = f"classes with fewer than {few} images{unit}: {listing(tiny)}"
        yield Problem("training images", f"{message}; their scores are mostly chance; add images")


def _class_names(manifest: Manifest) -> Iterator[Problem]:
    """Warnings of classes that may be none, or one."""
    counts = np.bincount(manifest.labels, minlength=len(manifest.classes))
    shown = {name: f"{name!r} ({counts[c]:,})" for c, name in enumerate(manifest.classes)}
    empty = [shown[name] for name in manifest.classes if name.casefold() in _NO_LABEL]
    if empty:
        message = f"classes called like a missing value: {listing(empty)}"
        advice = "leave these images out (data.exclude) if they have no label"
        yield Problem("training data", f"{message}; {advice}")
    alike: dict[str, list[str]] = {}
    for name in manifest.classes:
        alike.setdefault("".join(normalize("NFKC", name).casefold().split()), []).append(name)
    several = [names for names in alike.values() if len(names) > 1]
    if several:
        pairs = listing(" and ".join(shown[name] for name in names) for names in several)
        first = ", ".join(several[0])
        advice = f"make one of them (data.merge_classes: {{{several[0][0]}: [{first}]}})"
        message = f"classes that differ in case or blanks alone: {pairs}"
        yield Problem("training data", f"{message}; if they are the same, {advice}")


def _little_to_see(
    kind: str, images: Manifest | ImageSet, infos: Sequence[ImageInfo]
) -> Iterator[Problem]:
    """Warnings of images that are read without a fault, but with little in them."""
    seen = [(row, info) for row, info in enumerate(infos) if info.fault is None]
    dim = [row for row, i in seen if i.sixteen_bit and 0 < i.brightest < _DIM]
    dimmed = set(dim)
    black = [row for row, i in seen if i.brightest < _EMPTY and row not in dimmed]
    dark = {*dim, *black}
    flat = [row for row, i in seen if i.contrast < _EMPTY and row not in dark]
    for rows, message in (
        (dim, "have 16 bits a value, but use less than an eighth of them, and are nearly black as "
         "they are read: save 12-bit values times 16, 10-bit ones times 64"),
        (black, "are black"),
        (flat, "are of one colour, or nearly so"),
    ):  # fmt: skip
        if rows:
            names = listing((row_label(images, row) for row in rows), _SHOWN_EMPTY)
            yield Problem(f"{kind} images", f"{len(rows):,} of {len(infos):,} {message}: {names}")
