"""One look at each image file: read once, hashed, decoded, fingerprinted.

Takes a `Manifest` or an `ImageSet`, gives a `Look` for every row, faults included.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from experiment.images import ImageError, check_image, read_bytes
from experiment.likeness import Fingerprint, fingerprint
from experiment.manifest import Manifest
from experiment.test_set import ImageSet

_BATCH = 4096  # images queued at once


@dataclass(frozen=True)
class Look:
    """What is known of a file; without a fault it has a fingerprint."""

    side: int
    """Pixels of the longer side."""
    digest: bytes
    fingerprint: Fingerprint | None
    fault: str | None = None
    missing: bool = False


def look_at_all(images: Manifest | ImageSet, pool: Executor) -> list[Look]:
    """Every file, in the order of the rows."""
    looks: list[Look] = []
    for start in range(0, len(images), _BATCH):
        rows = range(start, min(start + _BATCH, len(images)))
        looks.extend(pool.map(_look, (images.file(row) for row in rows)))
    return looks


def named(images: Manifest | ImageSet, row: int) -> str:
    """The row as messages call it."""
    path = images.image_paths[row]
    return path if images.lines is None else f"{path} (line {images.lines[row]})"


def _look(path: Path) -> Look:
    try:
        data = read_bytes(path)
        side, small = check_image(data, path)
    except ImageError as error:
        return Look(0, b"", None, error.reason, missing=not os.path.exists(path))
    return Look(side, hashlib.blake2b(data, digest_size=16).digest(), fingerprint(small))
