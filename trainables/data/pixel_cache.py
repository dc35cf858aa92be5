"""Every image decoded once per node, into one memory-mapped file that all trials share.

Takes image files and a size, gives `ImageSource`: row -> uint8 RGB array. Where there is no room
for the file, images are decoded from their own files each time.

What is on disk, under `pixels/` of the cache folder: entries, named by the content of the image
files (`cache_entry`), and for each list of paths a record of the entry that it leads to
(`cache_lists`).

What the pixel cache knows of a list of image paths: the entry that it led to, or that there was
no room for one.

Takes a record file and a session, gives the entry that the session found before. Sessions are those
of `open_images`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from foldrace.config.schema import CacheConfig
from foldrace.dataset.archive import cache_dir
from foldrace.dataset.images import read_rgb
from foldrace.trainables.data.cache_build import build, find_same, scan
from foldrace.trainables.data.cache_entry import VERSION, Layout, StoredImages
from foldrace.trainables.data.cache_room import NoRoom, find_entry

_SESSIONS = 16  # that share a list of files at the same time


class Refused(Exception):
    """There is no room for these images, now or earlier in the session."""


@dataclass(frozen=True)
class Known:
    """Where a list of paths led to."""

    key: str = ""
    """Of the entry; empty where there never was one."""
    state: str = ""
    """Of the files when they were last compared with it (`Scan.state`)."""
    sessions: tuple[str, ...] = ()
    """Those that found them so."""
    refused: dict[str, str] = field(default_factory=dict)
    """Session -> why there was no room, since then."""


def list_hash(files: Sequence[Path], layout: Layout) -> str:
    """The name of the list's record."""
    paths = [str(file) if file.is_absolute() else os.path.abspath(file) for file in files]
    listed = json.dumps([VERSION, layout.side, layout.format, paths])
    return hashlib.sha256(listed.encode()).hexdigest()[:32]


def of_session(record: Path, session: str | None) -> StoredImages | None:
    """The entry that was compared with the files in this session, where it is still there. Raises
    Refused where the session found no room."""
    known = None if session is None else read_known(record)
    if known is None or session is None:
        return None
    if session in known.refused:
        raise Refused(known.refused[session])
    return find_entry(record.parent / known.key) if session in known.sessions else None


def seen(known: Known | None, now: Known, session: str | None) -> Known:
    """`now`, with the sessions that found the files in the same state before. Those that found no
    room may look again."""
    same = known is not None and known.state == now.state
    sessions = (*(known.sessions if known and same else ()), *([session] if session else []))
    return replace(now, sessions=sessions[-_SESSIONS:])


def refused(known: Known | None, session: str | None, reason: str) -> Known:
    """What was known, and that the session found no room."""
    known = known or Known()
    if session is None:
        return known
    all_refused = [*known.refused.items(), (session, reason)]
    return replace(known, refused=dict(all_refused[-_SESSIONS:]))


def read_known(record: Path) -> Known | None:
    try:
        return Known(**json.loads(record.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def write_known(record: Path, known: Known) -> None:
    """Whole or not at all; called with the list's lock."""
    aside = record.with_suffix(".tmp")
    aside.write_text(json.dumps(asdict(known)), encoding="utf-8")
    aside.replace(record)


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
