"""Labelled images to evaluate on: a folder per class, a table or a zip, as `data.train` is read.

Takes the path and the run whose classes the labels must be; gives the images that can be read, with
class indices, and the others with a reason.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foldrace.config.schema import DataConfig
from foldrace.core.errors import DataError, Problem, RunFailure, listing
from foldrace.core.progress import tell
from foldrace.core.synonyms import did_you_mean
from foldrace.dataset.images import image_fault
from foldrace.dataset.left_out import left_out_lines
from foldrace.dataset.manifest import Manifest, read_manifest
from foldrace.run_folder.store import RunStore


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """n images that can be read, and those that cannot."""

    files: tuple[Path, ...]
    paths: tuple[str, ...]
    """As the data have them."""
    labels: NDArray[np.int64]
    """(n,) indices of the run's classes."""
    unread: dict[str, tuple[str, str]]
    """Path -> label and reason of an image that cannot be read."""
    notes: tuple[str, ...]
    """Lines for the user: what was taken for what, and what is no image."""


def read_labelled(store: RunStore, source: Path, workers: int) -> LabelledImages:
    """Read the labels and look at every image, `workers` at a time.

    DataError with every label that is no class of the run; RunFailure where no image can be read.
    """
    manifest = _manifest(store, source)
    labels = _labels(store, manifest, source)
    faults = _faults(manifest, store.config().data.max_pixels, workers)
    good = [row for row, fault in enumerate(faults) if fault is None]
    if not good:
        raise RunFailure(f"{source}: none of its {len(manifest):,} images could be read")
    return LabelledImages(
        files=tuple(manifest.file(row) for row in good),
        paths=tuple(manifest.image_paths[row] for row in good),
        labels=labels[good],
        unread={
            manifest.image_paths[row]: (manifest.classes[manifest.labels[row]], fault)
            for row, fault in enumerate(faults)
            if fault is not None
        },
        notes=(*manifest.readings, *(str(line) for line in left_out_lines(manifest.left_out))),
    )


def _manifest(store: RunStore, source: Path) -> Manifest:
    """The labels as `data.train` is read; DataError that names the option, not that key."""
    try:
        return read_manifest(_config(store, source))
    except DataError as error:
        renamed = (
            Problem(f"--data {source}" if p.where == "data.train" else p.where, p.message)
            for p in error.problems
        )
        raise DataError([*renamed]) from error


def _config(store: RunStore, source: Path) -> DataConfig:
    """The data section of the run, for these images: columns and encoding are alike."""
    own = store.config().data
    path = os.path.abspath(os.path.expanduser(source))
    table = not os.path.isdir(path) and not path.lower().endswith(".zip")
    return DataConfig(
        train=path,
        image_column=own.image_column,
        label_column=own.label_column,
        encoding=own.encoding if table else None,
        max_pixels=own.max_pixels,
    )


def _labels(store: RunStore, manifest: Manifest, source: Path) -> NDArray[np.int64]:
    """(n,) indices of the run's classes; one that is merged there counts as the merged one."""
    classes = store.classes()
    place = {name: i for i, name in enumerate(classes)}
    for name, owns in store.merged().items():
        place |= dict.fromkeys(owns, place[name])
    strange = [name for name in manifest.classes if name not in place]
    if strange:
        counts = np.bincount(manifest.labels, minlength=len(manifest.classes))
        shown = listing(f"{name!r} ({counts[manifest.classes.index(name)]:,})" for name in strange)
        hint = did_you_mean(strange[0], sorted(place))
        raise DataError(
            [
                Problem(
                    f"--data {source}",
                    f"has labels that are no class of {store.root}: {shown}; {hint}classes: "
                    f"{listing(classes)}",
                )
            ]
        )
    return np.array([place[manifest.classes[i]] for i in manifest.labels], dtype=np.int64)


def _faults(manifest: Manifest, most: int, workers: int) -> list[str | None]:
    """Why each image cannot be read, or None."""
    found: list[str | None] = []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        files = map(manifest.file, range(len(manifest)))
        for fault in pool.map(lambda file: image_fault(file, most), files):
            found.append(fault)
            tell("reading labelled images", len(found), len(manifest))
    return found
