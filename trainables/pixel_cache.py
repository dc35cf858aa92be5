"""Every image decoded once per node, into one memory-mapped file that all trials share.

Takes image files and a size, gives `ImageSource`: row -> uint8 RGB array. Where there is no room
for the file, images are decoded from their own files each time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from experiment.archive import cache_dir
from experiment.images import read_rgb

_VERSION = 1
_MARGIN = 1.5  # stored side per model input side: room for random crops
_FREE_FRACTION = 0.8  # of the free disk that a cache file may take
_CHUNK = 256  # images decoded ahead
_NO_ROOM = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES))
_log = logging.getLogger("foldrace")


class ImageSource(Protocol):
    """Images by row number."""

    def __len__(self) -> int: ...
    def image(self, row: int) -> NDArray[np.uint8]:
        """(height, width, 3) RGB."""


class DecodedImages:
    """Images in one memory-mapped file: pixels end to end, and a table of where each lies."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index: NDArray[np.int64] = np.load(folder / "index.npy", allow_pickle=False)
        # A plain array over the map: slicing a memmap takes five times as long.
        self._pixels = np.asarray(np.memmap(folder / "pixels.bin", dtype=np.uint8, mode="r"))

    def __len__(self) -> int:
        return len(self._index)

    def image(self, row: int) -> NDArray[np.uint8]:
        offset, height, width = self._index[row].tolist()
        return self._pixels[offset : offset + height * width * 3].reshape(height, width, 3)

    def __reduce__(self) -> tuple[type[DecodedImages], tuple[Path]]:
        return DecodedImages, (self._folder,)  # a loader's worker maps the file itself


class EncodedImages:
    """Images decoded from their own files at each use."""

    def __init__(self, files: Sequence[Path], longer_side: int) -> None:
        self._files, self._longer_side = tuple(files), longer_side

    def __len__(self) -> int:
        return len(self._files)

    def image(self, row: int) -> NDArray[np.uint8]:
        return np.asarray(read_rgb(self._files[row], self._longer_side))


def stored_side(image_size: int) -> int:
    """Longer side, in pixels, at which images for a model input of `image_size` are stored."""
    return round(_MARGIN * image_size)


def cache_bytes(images: int, image_size: int) -> int:
    """Upper bound of the cache file."""
    return images * stored_side(image_size) ** 2 * 3


def open_images(files: Sequence[Path], image_size: int, workers: int) -> ImageSource:
    """The images of `files`, decoded once on this node; the first process builds, others wait."""
    side = stored_side(image_size)
    folder = cache_dir() / "pixels" / _key(files, side)
    try:
        if folder.is_dir() or _build_once(files, side, folder, workers):
            return DecodedImages(folder)
        reason = "no room"
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        reason = str(error)
    _log.warning("pixel cache: %s at %s; images are decoded anew in each epoch", reason, folder)
    return EncodedImages(files, side)


def _key(files: Sequence[Path], side: int) -> str:
    """Changes with any file's path, size or time of change."""
    stats = (file.stat() for file in files)
    listed = [(str(f), s.st_size, s.st_mtime_ns) for f, s in zip(files, stats, strict=True)]
    return hashlib.sha256(json.dumps([_VERSION, side, listed]).encode()).hexdigest()[:32]


def _build_once(files: Sequence[Path], side: int, folder: Path, workers: int) -> bool:
    """Write the cache aside and rename it, one process at a time; False where the disk has no
    room."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".part-{folder.name}")
    with FileLock(folder.with_suffix(".lock")):
        if folder.is_dir():
            return True  # by the process that was waited for
        shutil.rmtree(aside, ignore_errors=True)  # of a killed process
        try:
            aside.mkdir()
            if not _write_pixels(files, side, aside, workers):
                return False
            aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return True


def _write_pixels(files: Sequence[Path], side: int, folder: Path, workers: int) -> bool:
    budget = int(shutil.disk_usage(folder).free * _FREE_FRACTION)
    index = np.zeros((len(files), 3), np.int64)
    offset = 0
    with (folder / "pixels.bin").open("wb") as pixels:
        for row, image in enumerate(_decoded(files, side, workers)):
            index[row] = offset, image.shape[0], image.shape[1]
            offset += image.size
            # Known early, since every trial would try again.
            expected = offset * len(files) // (row + 1) if row >= _CHUNK else offset
            if expected > budget:
                return False
            pixels.write(image.tobytes())
        pixels.flush()
        os.fsync(pixels.fileno())
    np.save(folder / "index.npy", index)
    return True


def _decoded(files: Sequence[Path], side: int, workers: int) -> Iterator[NDArray[np.uint8]]:
    """Images in order, decoded by threads, a bounded number ahead."""
    remaining = iter(files)
    with ThreadPoolExecutor(workers) as pool:
        while chunk := list(islice(remaining, _CHUNK)):
            yield from pool.map(lambda file: np.asarray(read_rgb(file, side)), chunk)
