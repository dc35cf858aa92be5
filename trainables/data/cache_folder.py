"""The pixel cache's folder: its entries, who uses them, and how much disk they may take.

Takes the cache's folder, gives an entry's images by row, or a folder to build an entry in, for
which room is reserved: entries that nobody uses are removed, the least recently used first. An
entry is a folder with images end to end and a table of where each lies; a header holds what both
files are checked against, and a lock file says, even after a kill -9, whether some process uses it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from foldrace.trainables.data.cache_entry import PIXELS, DamagedEntry, checked_index, read_header

_IN_USE = "in_use"
_FREE_FRACTION = 0.8  # of the free disk that the cache may take
_STALE_SECONDS = 30 * 24 * 3600
_PART, _GONE, _RESERVED = ".part-", ".gone-", "reserved"

_log = logging.getLogger("foldrace")


class StoredImages:
    """The images of an entry, in one memory-mapped file: all processes of a node share its pages.

    As long as the object lives, the entry is in use. Raises FileNotFoundError where there is no
    entry, DamagedEntry where it is not whole.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lease = lease(folder)
        with suppress(OSError):  # of another user
            os.utime(folder / _IN_USE)
        self._index = checked_index(folder, read_header(folder))
        # A plain array over the map: slicing a memmap takes five times as long.
        self._bytes = np.asarray(np.memmap(folder / PIXELS, dtype=np.uint8, mode="r"))

    @property
    def key(self) -> str:
        """Name of the entry, a hash of the image files' contents."""
        return self._folder.name

    def __len__(self) -> int:
        return len(self._index)

    def image(self, row: int) -> NDArray[np.uint8]:
        """(height, width, 3) RGB."""
        raise NotImplementedError

    def __reduce__(self) -> tuple[type[StoredImages], tuple[Path]]:
        return type(self), (self._folder,)  # a loader's worker maps the file itself


class DecodedImages(StoredImages):
    """Images kept as plain pixels: read-only views into the map."""

    def image(self, row: int) -> NDArray[np.uint8]:
        """(height, width, 3) RGB."""
        start, end, height, width = self._index[row].tolist()
        return self._bytes[start:end].reshape(height, width, 3)


class JpegImages(StoredImages):
    """Images kept as JPEGs at the stored size, decoded at each use."""

    def image(self, row: int) -> NDArray[np.uint8]:
        """(height, width, 3) RGB. Raises DamagedEntry."""
        start, end, _, _ = self._index[row].tolist()
        image = cv2.imdecode(self._bytes[start:end], cv2.IMREAD_COLOR_RGB)
        if image is None:
            raise DamagedEntry(f"image {row} in {self._folder} is no JPEG; delete that folder")
        return np.asarray(image, np.uint8)


FORMATS: dict[str, type[StoredImages]] = {"raw": DecodedImages, "jpeg": JpegImages}


def open_entry(folder: Path) -> StoredImages:
    """The entry in its own format; raises as `StoredImages` does."""
    return FORMATS[read_header(folder).format](folder)


def lease(folder: Path) -> BinaryIO:
    """Hold the entry in use until the file is closed or the process ends, however it ends.

    Processes that are forked meanwhile hold it too.
    """
    file = (folder / _IN_USE).open("rb")
    fcntl.flock(file, fcntl.LOCK_SH)
    return file


@contextmanager
def unused(folder: Path) -> Iterator[bool]:
    """Give True where no process holds the entry; within the block none can start to."""
    try:
        file = (folder / _IN_USE).open("rb+")
    except FileNotFoundError:
        yield True  # killed between making the folder and its lock file
        return
    except PermissionError:
        yield False  # another user's
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


class NoRoom(Exception):
    """The images do not fit, not even without all entries that nobody uses."""

    def __init__(self, needed: int, allowed: int) -> None:
        super().__init__(
            f"{needed / 1e9:.3g} GB are needed, {allowed / 1e9:.3g} GB may be taken (cache.max_gb, "
            "and 80 % of the free disk)"
        )


@dataclass(frozen=True)
class Part:
    """A folder to build an entry in; one that no process holds may be removed."""

    folder: Path
    held: BinaryIO
    """Its open lock file."""


@dataclass(frozen=True)
class _Entry:
    folder: Path
    written: int  # bytes
    reserved: int  # bytes, of a part
    used: float  # when it was last opened

    @property
    def bytes(self) -> int:
        return max(self.written, self.reserved)


def _room_lock(root: Path) -> FileLock:
    """The lock to hold whenever folders of the cache appear or disappear."""
    return FileLock(root / ".room.lock")


def new_part(root: Path) -> Part:
    """An empty folder beside the entries; what was abandoned is removed first."""
    with _room_lock(root):
        _remove_abandoned(root)
        folder = root / f"{_PART}{uuid.uuid4().hex}"
        folder.mkdir()
        (folder / _IN_USE).touch()
        return Part(folder, lease(folder))


def reserve(part: Path, needed: int, bound: int) -> None:
    """Make room for `part` to grow to `needed` bytes.

    The whole cache stays within `bound` bytes and the free disk. Raises NoRoom, and then removes
    nothing.
    """
    root = part.parent
    with _room_lock(root):
        room = _Room(root, part, bound)
        freed, chosen = 0, []
        for entry in sorted(room.others, key=lambda entry: entry.used):  # oldest first
            if room.allowed(freed) >= needed:
                break
            with unused(entry.folder) as free:
                if free:
                    chosen.append(entry.folder)
                    freed += entry.bytes
        if room.allowed(freed) < needed:
            raise NoRoom(needed, room.allowed(freed))
        for folder in chosen:
            remove(folder)
        (part / _RESERVED).write_text(str(needed))


def publish(part: Path, entry: Path) -> StoredImages:
    """Make the complete part the entry; where there is one by now, that one is taken."""
    (part / _RESERVED).unlink()
    found = find_entry(entry)
    if found is None:
        with _room_lock(entry.parent):
            if not entry.exists():
                part.rename(entry)
            found = open_entry(entry)
    return found


class _Room:
    """The room that is left to a part: what other folders take, and what the disk has."""

    def __init__(self, root: Path, part: Path, bound: int) -> None:
        entries = {entry.folder: entry for entry in _entries(root)}
        self._own = entries.pop(part)
        self.others = list(entries.values())
        self._bound = bound
        promised = sum(max(0, entry.reserved - entry.written) for entry in self.others)
        self._free = shutil.disk_usage(root).free - promised

    def allowed(self, freed: int) -> int:
        """Bytes that the part may grow to once others have freed `freed`."""
        within_bound = self._bound - sum(entry.bytes for entry in self.others) + freed
        of_disk = int(max(0, self._free + freed) * _FREE_FRACTION)
        return max(0, min(within_bound, self._own.written + of_disk))


def find_entry(folder: Path) -> StoredImages | None:
    """The entry in `folder`; None where there is none, or a damaged one, which is discarded."""
    try:
        return open_entry(folder)
    except FileNotFoundError as error:
        if not folder.exists():
            return None
        reason = str(error)
    except DamagedEntry as error:
        reason = str(error)
    _log.warning("pixel cache %s is damaged and made again: %s", folder, reason)
    with _room_lock(folder.parent):
        discard(folder)
    return None


def remove(folder: Path) -> None:
    """Delete an entry, unless somebody uses it by now. The caller holds the room's lock."""
    with unused(folder) as free:
        if free:
            discard(folder)


def discard(folder: Path) -> None:
    """Move an entry out of sight, then delete it. The caller holds the room's lock."""
    gone = folder.with_name(f"{_GONE}{uuid.uuid4().hex}")
    with suppress(FileNotFoundError):
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _remove_abandoned(root: Path) -> None:
    """Remove what killed processes left, and what was not used for long."""
    stale = time.time() - _STALE_SECONDS
    for entry in list(_entries(root)):
        if entry.used < stale or entry.folder.name.startswith((_PART, _GONE)):
            remove(entry.folder)
    for record in root.glob("*.json"):
        if record.stat().st_mtime < stale:
            record.unlink()


def _entries(root: Path) -> Iterator[_Entry]:
    """Every folder of the cache, parts too."""
    for folder in root.iterdir():
        if folder.is_dir():
            with suppress(FileNotFoundError):  # a part that its builder is removing
                yield _entry(folder)


def _entry(folder: Path) -> _Entry:
    sizes = [file.stat().st_size for file in folder.iterdir() if file.name != _RESERVED]
    reserved, lock = folder / _RESERVED, folder / _IN_USE
    promised = int(reserved.read_text() or 0) if reserved.exists() else 0
    used = lock.stat().st_mtime if lock.exists() else 0.0
    return _Entry(folder, sum(sizes), promised, used)
