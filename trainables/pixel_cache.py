"""Every image decoded once per node, into one memory-mapped file that all trials share.

Takes image files and a size, gives `ImageSource`: row -> uint8 RGB array. Where there is no room
for the file, images are decoded from their own files each time.

What is on disk, under `pixels/` of the cache folder: entries, named by the content of the image
files (`cache_entry`), and for each list of paths a record of the entry that it leads to
(`cache_lists`).
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from experiment.archive import cache_dir
from experiment.config import CacheConfig
from experiment.images import read_rgb
from trainables.cache_build import build, find_same, scan
from trainables.cache_entry import Layout, StoredImages
from trainables.cache_lists import (
    Known,
    Refused,
    list_hash,
    of_session,
    read_known,
    refused,
    seen,
    write_known,
)
from trainables.cache_room import NoRoom, find_entry

DEFAULT = CacheConfig()
_MARGIN = 1.5  # stored side per model input side: room for random crops
_RAW_BYTES, _JPEG_BYTES = 3.0, 0.5  # a pixel
_NO_ROOM = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOLCK, errno.ENOSYS)
)
_log = logging.getLogger("foldrace")


class ImageSource(Protocol):
    """Images by row number."""

    def __len__(self) -> int: ...
    def image(self, row: int) -> NDArray[np.uint8]:
        """(height, width, 3) RGB."""


class EncodedImages:
    """Images decoded from their own files at each use."""

    def __init__(self, files: Sequence[Path], longer_side: int) -> None:
        self._files, self._longer_side = tuple(files), longer_side

    def __len__(self) -> int:
        return len(self._files)

    def image(self, row: int) -> NDArray[np.uint8]:
        return np.asarray(read_rgb(self._files[row], self._longer_side))


def stored_side(image_size: int, config: CacheConfig = DEFAULT) -> int:
    """Longer side, in pixels, at which images for a model input of `image_size` are stored."""
    return config.longer_side or round(_MARGIN * image_size)


def cache_bytes(images: int, image_sizes: Iterable[int], config: CacheConfig = DEFAULT) -> int:
    """What the cache may take for all these sizes: an upper bound for raw pixels, a generous
    estimate for JPEGs."""
    per_pixel = _RAW_BYTES if config.format == "raw" else _JPEG_BYTES
    sides = {stored_side(size, config) for size in image_sizes}
    pixels = images * sum(side**2 for side in sides)
    return int(min(pixels * per_pixel, config.max_gb * 1e9))


def open_images(
    files: Sequence[Path],
    image_size: int,
    workers: int,
    config: CacheConfig = DEFAULT,
    session: str | None = None,
) -> ImageSource:
    """The images of `files`, decoded once on this node; the first process builds, others wait.

    Files may change between calls, but not within a `session` (any text that is new for each run
    of the program): its first call on a node asks the file system for the size and times of every
    file, and reads them all again where any differs from what was stored; its later calls read
    three small files of the cache. Without a session each call asks. A file whose content was
    replaced without any trace in its size, mtime and ctime is not noticed. A session that found no
    room does not try again.
    """
    layout = Layout(stored_side(image_size, config), config.format)
    root = cache_dir() / "pixels"
    if not files:
        return EncodedImages(files, layout.side)
    try:
        return _open_cached(root, files, layout, int(config.max_gb * 1e9), workers, session)
    except Refused as error:
        reason = str(error)
    except OSError as error:
        reason = _why_no_room(error, layout)
    _log.warning("pixel cache %s: %s; images are decoded anew in each epoch", root, reason)
    return EncodedImages(files, layout.side)


def _why_no_room(error: NoRoom | OSError, layout: Layout) -> str:
    """Raises the error again where it says something else."""
    if isinstance(error, OSError):
        if error.errno not in _NO_ROOM:
            raise error
        return str(error)
    hint = "; cache.format: jpeg takes about a tenth" if layout.format == "raw" else ""
    return f"{error}{hint}"


def _open_cached(
    root: Path,
    files: Sequence[Path],
    layout: Layout,
    bound: int,
    workers: int,
    session: str | None,
) -> StoredImages:
    name = list_hash(files, layout)
    record, lock = root / f"{name}.json", root / f".{name[:2]}.lock"  # few lock files, for ever
    stored = of_session(record, session)
    if stored is not None:
        return stored
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        stored = of_session(record, session)  # by the process that was waited for
        if stored is not None:
            return stored
        known, found = read_known(record), scan(files)
        key = known.key if known and known.state == found.state else None
        key = key or find_same(root, files, layout, found.sizes, workers)
        stored = find_entry(root / key) if key else None
        if stored is None:
            try:
                stored = build(root, files, layout, bound, workers)
            except (NoRoom, OSError) as error:
                reason = _why_no_room(error, layout)
                write_known(record, refused(known, session, reason))
                raise Refused(reason) from error
        write_known(record, seen(known, Known(stored.key, found.state), session))
        return stored
