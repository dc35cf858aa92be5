"""The cache of unpacked archives: folders that are whole, unchanged, in use, and bounded in size.

An entry is a folder. Beside it lie a note, written last, which says what it takes and how its files
were, and a lock, which the processes that use it hold as long as they live, even after a kill -9.
The least recently used go first, by the lock's time.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from foldrace.core.errors import DataError, EnvironmentProblem
from foldrace.core.files import atomic_write

BOUND = "FOLDRACE_CACHE_GB"
"""Variable: 10^9 bytes that unpacked archives may take, and what else is kept in the cache."""
_DEFAULT_GB = 500.0
_GONE = ".gone-"
_FRESH_SECONDS = 3600.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_held: dict[Path, int] = {}
"""Entries that this process uses -> its open lock."""
_log = logging.getLogger("foldrace")


class _Note(BaseModel):
    """How an entry was when it had been unpacked."""

    model_config = ConfigDict(strict=True, extra="forbid")

    bytes: int = Field(ge=0)
    state: str
    """SHA-256 of names, sizes and times of its files."""


def entry(folder: Path, fill: Callable[[], None]) -> Path:
    """The entry `folder`, which stays as long as this process lives.

    `fill` makes the folder where there is none that is as it was unpacked; other processes that
    want the same wait for it. DataError where it was changed and another process uses it.
    """
    if folder in _held and _is_folder(folder):
        return folder
    if folder in _held:
        os.close(_held.pop(folder))
    while True:
        lock = os.open(_lock_of(folder), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            alone = _take(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not alone:
                _take(lock, fcntl.LOCK_SH)  # waits for who is filling it
            if not _is_at(lock, _lock_of(folder)):
                os.close(lock)
                continue  # it was removed meanwhile
            if not _is_sound(folder):
                if not alone:
                    raise DataError.single(
                        str(folder),
                        "was changed since it was unpacked, and another process uses it; end that "
                        "one first",
                    )
                _discard(folder)
                fill()
                _write_note(folder)
            if alone:
                _take(lock, fcntl.LOCK_SH)
                if not (_is_at(lock, _lock_of(folder)) and folder.is_dir()):
                    os.close(lock)
                    continue
        except BaseException:
            os.close(lock)
            raise
        os.utime(lock)
        _held[folder] = lock
        return folder


def make_room(root: Path, needed: int) -> None:
    """Remove entries that nobody uses until `needed` bytes more are within the bound and the disk.

    DataError where that is not enough.
    """
    bound = _bound()
    entries = sorted(_entries(root), key=lambda one: one.used)
    total = sum(one.bytes for one in entries)
    if needed <= min(bound, shutil.disk_usage(root).free + total):  # else nothing goes in vain
        for one in entries:
            if total + needed <= bound and needed <= shutil.disk_usage(root).free:
                return
            if _removed(one.folder):
                total -= one.bytes
    if total + needed > bound:
        raise DataError.single(
            str(root),
            f"{needed / 1e9:.1f} GB more are needed; allowed are {bound / 1e9:g} GB in all, of "
            f"which {total / 1e9:.1f} GB are in use: set {BOUND} to more, or unpack the archive "
            "and name the folder",
        )


def remove_oldest(root: Path, keep: str) -> None:
    """Remove folders, the least recently written first, until the rest is within the bound.

    For what may go at any time: who has a file of it open keeps that. Neither `keep` goes nor what
    was written within the hour.
    """
    bound, now = _bound(), time.time()
    written = sorted((folder.stat().st_mtime, folder) for folder in root.iterdir())
    sizes = {folder: _look(folder).bytes for _, folder in written}
    total = sum(sizes.values())
    for when, folder in written:
        if total > bound and folder.name != keep and now - when > _FRESH_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
            total -= sizes[folder]


@dataclass(frozen=True)
class _Entry:
    folder: Path
    bytes: int
    used: float


def _bound() -> int:
    text = os.environ.get(BOUND, "")
    try:
        bound = int(float(text or _DEFAULT_GB) * 1e9)
        if bound < 0:
            raise ValueError("a negative size")
        return bound
    except (ValueError, OverflowError) as error:
        raise EnvironmentProblem.single(BOUND, f"got {text!r}; allowed: a number from 0") from error


def _entries(root: Path) -> Iterator[_Entry]:
    for folder in root.iterdir():
        if folder.name.startswith(_GONE):
            shutil.rmtree(folder, ignore_errors=True)
        elif not folder.name.startswith("."):
            note = _note(folder)
            with suppress(OSError):
                lock = _lock_of(folder)
                used = lock.stat().st_mtime if lock.exists() else 0.0
                yield _Entry(folder, note.bytes if note else 0, used)


def _removed(folder: Path) -> bool:
    """Remove an entry; False where another process uses it."""
    lock = os.open(_lock_of(folder), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not _take(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
            return False
        _discard(folder)
        _lock_of(folder).unlink(missing_ok=True)
        return True
    finally:
        os.close(lock)


def _discard(folder: Path) -> None:
    """Remove what is there, also where it is a link."""
    _note_of(folder).unlink(missing_ok=True)
    if os.path.islink(folder) or folder.is_file():
        folder.unlink()
    elif folder.exists():
        gone = folder.with_name(f"{_GONE}{uuid.uuid4().hex}")
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _is_sound(folder: Path) -> bool:
    """True where the folder is as it was when its note was written."""
    if not _is_folder(folder):
        return False
    note = _note(folder)
    if note is not None and note == _look(folder):
        return True
    if note is not None:
        _log.warning("%s was changed since it was unpacked; it is unpacked again", folder)
    return False


def _is_folder(folder: Path) -> bool:
    return folder.is_dir() and not os.path.islink(folder)


def _look(folder: Path) -> _Note:
    """What the note of the folder should say."""
    total, lines, open_ones = 0, list[str](), [str(folder)]
    while open_ones:
        with os.scandir(open_ones.pop()) as found:
            for one in found:
                stat = one.stat(follow_symlinks=False)
                if one.is_dir(follow_symlinks=False):
                    open_ones.append(one.path)
                    continue
                kind = "link" if one.is_symlink() else "file"
                lines.append(f"{one.path}\0{kind}\0{stat.st_size}\0{stat.st_mtime_ns}")
                total += stat.st_size
    text = "\n".join(sorted(lines)).replace(str(folder), "")
    state = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
    return _Note(bytes=total, state=state)


def _note(folder: Path) -> _Note | None:
    try:
        return _Note.model_validate_json(_note_of(folder).read_bytes())
    except (OSError, ValidationError):
        return None


def _write_note(folder: Path) -> None:
    with atomic_write(_note_of(folder), 0o600) as file:
        file.write(_look(folder).model_dump_json().encode())


def _note_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.json")


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _take(lock: int, how: int) -> bool:
    """Take a lock, or change it; False where another process has it. True without locks."""
    try:
        fcntl.flock(lock, how)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _is_at(lock: int, path: Path) -> bool:
    """True where the open lock is still the file of that name."""
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except OSError:
        return False
