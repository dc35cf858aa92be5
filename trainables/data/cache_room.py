"""How much disk the pixel cache may take, and who has to go to make room.

Takes the cache's folder and a bound, gives a folder to build in and reserves room for it: entries
that nobody uses are removed, the least recently used first.
"""

from __future__ import annotations

import logging
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from foldrace.trainables.data.cache_entry import (
    IN_USE,
    DamagedEntry,
    StoredImages,
    lease,
    open_entry,
    unused,
)

_FREE_FRACTION = 0.8  # of the free disk that the cache may take
_STALE_SECONDS = 30 * 24 * 3600
_PART, _GONE, _RESERVED = ".part-", ".gone-", "reserved"
_log = logging.getLogger("foldrace")


class NoRoom(Exception):
    """The images do not fit, not even without all entries that nobody uses."""

    def __init__(self, needed: int, allowed: int) -> None:
        super().__init__(
            f"{needed / 1e9:.3g} GB are needed, {allowed / 1e9:.3g} GB may be taken (cache.max_gb, "
            "and 80 % of the free disk)"
        )


@dataclass(frozen=True)
class Part:
    """A folder to build an entry in. Whoever finds one that nobody holds may remove it."""

    folder: Path
    held: BinaryIO


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
    """Held whenever folders of the cache appear or disappear."""
    return FileLock(root / ".room.lock")


def new_part(root: Path) -> Part:
    """An empty folder beside the entries; what was abandoned is removed first."""
    with _room_lock(root):
        _remove_abandoned(root)
        folder = root / f"{_PART}{uuid.uuid4().hex}"
        folder.mkdir()
        (folder / IN_USE).touch()
        return Part(folder, lease(folder))


def reserve(part: Path, needed: int, bound: int) -> None:
    """Make sure that `part` may grow to `needed` bytes while the whole cache stays within `bound`
    bytes and the free disk. Raises NoRoom, and then removes nothing."""
    root = part.parent
    with _room_lock(root):
        room = _Room(root, part, bound)
        freed, chosen = 0, []
        for entry in room.oldest_first():
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
    """The part, complete, becomes the entry; where there is one by now, that one is taken."""
    (part / _RESERVED).unlink()
    found = find_entry(entry)
    if found is None:
        with _room_lock(entry.parent):
            if not entry.exists():
                part.rename(entry)
            found = open_entry(entry)
    return found


class _Room:
    """What the cache takes and what the disk has, seen by the part that wants to grow."""

    def __init__(self, root: Path, part: Path, bound: int) -> None:
        entries = {entry.folder: entry for entry in _entries(root)}
        self._own = entries.pop(part)
        self._others = list(entries.values())
        self._bound = bound
        promised = sum(max(0, entry.reserved - entry.written) for entry in self._others)
        self._free = shutil.disk_usage(root).free - promised

    def allowed(self, freed: int) -> int:
        """Bytes that the part may grow to once others have freed so many."""
        within_bound = self._bound - sum(entry.bytes for entry in self._others) + freed
        of_disk = int(max(0, self._free + freed) * _FREE_FRACTION)
        return max(0, min(within_bound, self._own.written + of_disk))

    def oldest_first(self) -> list[_Entry]:
        return sorted(self._others, key=lambda entry: entry.used)


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
    _log.warning("pixel cache %s is damaged and made anew: %s", folder, reason)
    with _room_lock(folder.parent):
        discard(folder)
    return None


def remove(folder: Path) -> None:
    """Delete an entry, unless somebody uses it by now. The caller holds the room's lock."""
    with unused(folder) as free:
        if free:
            discard(folder)


def discard(folder: Path) -> None:
    """Out of sight at once, then deleted. The caller holds the room's lock."""
    gone = folder.with_name(f"{_GONE}{uuid.uuid4().hex}")
    with suppress(FileNotFoundError):
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _remove_abandoned(root: Path) -> None:
    """What killed processes left, and what nobody used for long."""
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
    reserved, lock = folder / _RESERVED, folder / IN_USE
    promised = int(reserved.read_text() or 0) if reserved.exists() else 0
    used = lock.stat().st_mtime if lock.exists() else 0.0
    return _Entry(folder, sum(sizes), promised, used)
