"""Every image decoded once per node, into one memory-mapped file that all trials share.

Takes image files and a size, gives `ImageSource`: row -> uint8 RGB array. Where there is no room
for the file, images are decoded from their own files each time. On disk, under `pixels/` of the
cache folder, are entries, named by the content of the image files (`cache_folder`), and for each
list of paths a record of the entry that it led to, or that there was no room for one.
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
from typing import Annotated, Protocol

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError

from foldrace.config.schema import CacheConfig
from foldrace.core.files import atomic_write
from foldrace.dataset.archive import cache_dir, cache_folder
from foldrace.dataset.images import LONGEST, read_rgb
from foldrace.trainables.data.cache_build import build, find_same, scan
from foldrace.trainables.data.cache_entry import VERSION, Layout
from foldrace.trainables.data.cache_folder import NoRoom, StoredImages, find_entry

DEFAULT = CacheConfig()
_MARGIN = 1.5  # stored side per model input side: room for random crops
_RAW_BYTES, _JPEG_BYTES = 3.0, 0.5  # a pixel
_SESSIONS = 16  # that share a list of files at the same time
_NO_ROOM = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOLCK, errno.ENOSYS)
)
_log = logging.getLogger("foldrace")


class NoRoomForImages(Exception):
    """There is no room for these images, now or earlier in the session."""


@dataclass(frozen=True)
class ListRecord:
    """The record of a list of paths: the entry that it led to."""

    key: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""
    """Name of the entry; empty where there never was one."""
    state: str = ""
    """State of the files when they were last compared with it (`Scan.state`)."""
    sessions: tuple[str, ...] = ()
    """Sessions that found the files so."""
    refused: dict[str, str] = field(default_factory=dict)
    """Session -> why there was no room, since then."""


class ImageSource(Protocol):
    """Images by row number."""

    def __len__(self) -> int:
        """Number of images."""

    def image(self, row: int) -> NDArray[np.uint8]:
        """(height, width, 3) RGB."""


class EncodedImages:
    """Images decoded from their own files at each use."""

    def __init__(self, files: Sequence[Path], shorter_side: int) -> None:
        self._files, self._shorter_side = tuple(files), shorter_side

    def __len__(self) -> int:
        return len(self._files)

    def image(self, row: int) -> NDArray[np.uint8]:
        """(height, width, 3) RGB."""
        return np.asarray(read_rgb(self._files[row], self._shorter_side))


def stored_side(image_size: int, config: CacheConfig = DEFAULT) -> int:
    """Shorter side, in pixels, at which images for a model input of `image_size` are stored."""
    return config.shorter_side or round(_MARGIN * image_size)


def cache_bytes(
    images: Sequence[tuple[int, int]], image_sizes: Iterable[int], config: CacheConfig = DEFAULT
) -> int:
    """Bytes that the cache may take for images of these widths and heights, at all image sizes.

    An upper bound for raw pixels, a generous estimate for JPEGs.
    """
    per_pixel = _RAW_BYTES if config.format == "raw" else _JPEG_BYTES
    sides = {stored_side(size, config) for size in image_sizes}
    shapes = np.array(images, np.float64).reshape(-1, 2)
    pixels = sum(_stored_pixels(shapes, side) for side in sides)
    return int(min(pixels * per_pixel, config.max_gb * 1e9))


def _stored_pixels(shapes: NDArray[np.float64], side: int) -> float:
    """Pixels of all images together, as `read_rgb` bounds them; no less."""
    shorter, longer = shapes.min(axis=1).clip(1), shapes.max(axis=1).clip(1)
    scale = np.minimum(1.0, np.minimum(side / shorter, LONGEST * side / longer))
    return float(np.ceil(shapes * scale[:, None]).prod(axis=1).sum())


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
    room does not try again. Raises EnvironmentProblem where the cache is another user's.
    """
    layout = Layout(stored_side(image_size, config), config.format)
    root = cache_dir() / "pixels"
    if not files:
        return EncodedImages(files, layout.side)
    try:
        cache_folder("pixels")
        return _open_cached(root, files, layout, int(config.max_gb * 1e9), workers, session)
    except NoRoomForImages as error:
        reason = str(error)
    except OSError as error:
        reason = _why_no_room(error, layout)
    _log.warning("pixel cache %s: %s; images are decoded again in each epoch", root, reason)
    return EncodedImages(files, layout.side)


def _why_no_room(error: NoRoom | OSError, layout: Layout) -> str:
    """The reason in words; raises the error again where it says something else."""
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
    """The entry of a list of files, found or built; raises NoRoomForImages."""
    name = _record_name(files, layout)
    path, lock = root / f"{name}.json", root / f".{name[:2]}.lock"  # few lock files, for ever
    stored = _entry_of_session(path, session)
    if stored is not None:
        return stored
    with FileLock(lock):
        stored = _entry_of_session(path, session)  # by the process that was waited for
        if stored is not None:
            return stored
        old, found = _read_record(path), scan(files)
        key = old.key if old and old.state == found.state else None
        key = key or find_same(root, files, layout, found.sizes, workers)
        stored = find_entry(root / key) if key else None
        if stored is None:
            try:
                stored = build(root, files, layout, bound, workers)
            except (NoRoom, OSError) as error:
                reason = _why_no_room(error, layout)
                _write_record(path, _with_refusal(old, session, reason))
                raise NoRoomForImages(reason) from error
        _write_record(path, _with_entry(old, stored.key, found.state, session))
        return stored


def _record_name(files: Sequence[Path], layout: Layout) -> str:
    """Name of the record of a list of paths."""
    paths = [str(file) if file.is_absolute() else os.path.abspath(file) for file in files]
    listed = json.dumps([VERSION, layout.side, layout.format, paths])
    return hashlib.sha256(listed.encode(errors="surrogateescape")).hexdigest()


def _entry_of_session(path: Path, session: str | None) -> StoredImages | None:
    """The entry that was compared with the files in this session, where it is still there.

    Raises NoRoomForImages where the session found no room.
    """
    record = None if session is None else _read_record(path)
    if record is None or session is None:
        return None
    if session in record.refused:
        raise NoRoomForImages(record.refused[session])
    return find_entry(path.parent / record.key) if session in record.sessions else None


def _with_entry(old: ListRecord | None, key: str, state: str, session: str | None) -> ListRecord:
    """A record of this entry, with the sessions that found the files in the same state before.

    Those that found no room may look again.
    """
    before = old.sessions if old is not None and old.state == state else ()
    sessions = (*before, *([session] if session else []))
    return ListRecord(key, state, sessions[-_SESSIONS:])


def _with_refusal(old: ListRecord | None, session: str | None, reason: str) -> ListRecord:
    """The old record, and that the session found no room."""
    old = old or ListRecord()
    if session is None:
        return old
    refused = [*old.refused.items(), (session, reason)]
    return replace(old, refused=dict(refused[-_SESSIONS:]))


def _read_record(path: Path) -> ListRecord | None:
    """The record in a file, or None where there is none that can be read."""
    try:
        return TypeAdapter(ListRecord).validate_json(path.read_bytes(), strict=True)
    except (FileNotFoundError, ValidationError):
        return None


def _write_record(path: Path, record: ListRecord) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(asdict(record)).encode())
