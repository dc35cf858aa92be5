"""Zip archives: unpacked once, safely, into a cache that all runs of this machine share.

Takes the path of a zip, gives the folder with its content, or a DataError with every problem.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import os
import re
import shutil
import stat
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from io import BufferedReader
from pathlib import Path, PurePosixPath

from foldrace.core.errors import DataError, FoldraceError, Problem, cause, listing
from foldrace.core.files import atomic_folder, remove_abandoned
from foldrace.core.opening import GB, MB, open_regular, unreadable
from foldrace.core.private_folder import private_folder
from foldrace.core.progress import tell
from foldrace.dataset.readers import likely_encoding
from foldrace.dataset.unpacked import entry, make_room

MOST_BYTES = 2_000 * GB
MAX_MEMBERS = 1_000_000
MAX_DIRECTORY = 200 * MB  # of the list of members, which is read before they can be counted
MAX_DEPTH = 50
MAX_RATIO = 200  # unpacked to packed bytes; photos stay near 1, bombs exceed 1,000
RATIO_FREE_BYTES = 200 * MB  # below this size any ratio is harmless

_UTF8_FLAG, _ENCRYPTED_FLAG, _UNICODE_PATH = 0x800, 0x1, 0x7075
_CHUNK = 1 << 20
_UNPACK_IT = "unpack it and name the folder"


def cache_dir() -> Path:
    """The cache folder: $FOLDRACE_CACHE, else the user's."""
    own = os.environ.get("FOLDRACE_CACHE")
    if own:
        return Path(os.path.expanduser(own))
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "foldrace"


def cache_folder(name: str) -> Path:
    """A folder of the cache, closed to other users: what is in it is used without a second look.

    Raises EnvironmentProblem where it is another user's.
    """
    return private_folder(cache_dir() / name, "set FOLDRACE_CACHE to a folder of your own")


def check_cache_folder(name: str) -> None:
    """Raise EnvironmentProblem where a folder of the cache is another user's; make none."""
    with contextlib.suppress(OSError):  # one that cannot be read is not used either
        if (cache_dir() / name).exists():
            cache_folder(name)


def unpack(zip_path: Path, encoding: str | None = None) -> Path:
    """The folder with the archive's content. The same archive is unpacked only once.

    `encoding`: the user's for names that are not UTF-8; None: found by their letters.
    """
    with _opened(zip_path) as archive:
        now = zip_path.stat()
        key = _sha256(zip_path, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
        names, found = _names(archive, encoding)
        target = cache_folder("unpacked") / (key if found is None else f"{key}-{found}")
        return entry(target, lambda: _unpack(archive, names, zip_path, target))


@contextlib.contextmanager
def _opened(zip_path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive; whatever is wrong with it, or with the disk, becomes a DataError."""
    try:
        with open_regular(zip_path, MOST_BYTES) as file:
            _require_short_directory(file, zip_path)
            with zipfile.ZipFile(file) as archive:
                yield archive
    except FoldraceError:
        raise
    except OSError as error:
        own = error.filename == str(zip_path)
        reason = unreadable(error) if own else f"cannot be unpacked: {cause(error)}"
        raise DataError.single(str(zip_path), reason) from error
    except Exception as error:  # zipfile raises whatever it stumbles over
        message = f"is not a sound zip archive: {cause(error)}"
        raise DataError.single(str(zip_path), message) from error


def _require_short_directory(file: BufferedReader, zip_path: Path) -> None:
    """Raise DataError where the list of members alone would fill the memory."""
    end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    size = end[5] if end else 0
    if size > MAX_DIRECTORY:
        allowed = f"allowed: {MAX_DIRECTORY // MB} MB; {_UNPACK_IT}"
        message = f"has a list of members of {size / MB:,.0f} MB; {allowed}"
        raise DataError.single(str(zip_path), message)


def name_notes(folder: Path, value: str) -> list[str]:
    """The line that says how the names in the archive `value`, unpacked to `folder`, were read."""
    home = archive_of(folder)
    encoding = "" if home is None else home.name.partition("-")[2]
    said = f"{value}: names read as {encoding}, by their letters; data.encoding names another"
    return [said] if encoding else []


def archive_of(path: Path) -> Path | None:
    """The folder of the unpacked archive that a path is or lies in, or None."""
    unpacked = cache_dir() / "unpacked"
    return next((p for p in (path, *path.parents) if p.parent == unpacked), None)


def member_names(zip_path: Path) -> list[str]:
    """Names of the archive's files without unpacking it; raises DataError where it is damaged."""
    with _opened(zip_path) as archive:
        names, _ = _names(archive, None)
    return [name for name in names if not name.endswith("/") and not _is_litter(name)]


@lru_cache
def _sha256(path: Path, size: int, modified: int, changed: int) -> str:
    """Digest of the file, which is read once a process as long as nothing of it changes.

    The checksums within an archive are no name for its content: they are easily forged.
    """
    with open_regular(path, MOST_BYTES) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unpack(archive: zipfile.ZipFile, names: Sequence[str], zip_path: Path, target: Path) -> None:
    remove_abandoned(target.parent)
    named = zip(names, archive.infolist(), strict=True)
    members = [(name, info) for name, info in named if not _is_litter(name)]
    problems = [*_unsafe_members(members, zip_path), *_size_problems(members, zip_path)]
    if not problems:
        make_room(target.parent, sum(info.file_size for _, info in members))
    problems += _room_problems(members, zip_path, target.parent)
    if problems:
        raise DataError(problems)
    with atomic_folder(target) as part:
        for done, (name, info) in enumerate(members):
            tell(f"unpacking {zip_path.name}", done, len(members))
            _extract(archive, info, part / name, is_dir=name.endswith("/"))
            os.utime(part)  # still alive: see remove_abandoned
        tell(f"unpacking {zip_path.name}", len(members), len(members))


def _names(archive: zipfile.ZipFile, encoding: str | None) -> tuple[list[str], str | None]:
    """Names of the members, and the older encoding that they were written in; None for Unicode.

    Without the UTF-8 flag zipfile reads a name as CP437, but each Windows writes its own: CP949,
    CP932, CP866, ... All names together have more letters to tell it by.
    """
    names, old = [], list[tuple[int, bytes]]()
    for i, info in enumerate(archive.infolist()):
        name = info.orig_filename
        if not info.flag_bits & _UTF8_FLAG:
            raw = name.encode("cp437")
            try:
                name = _unicode_path(info.extra, raw) or raw.decode()
            except UnicodeDecodeError:
                old.append((i, raw))
        names.append(name)
    own = encoding and codecs.lookup(encoding).name  # it names a folder
    found = own or likely_encoding(b"\n".join(raw for _, raw in old))
    for i, raw in old:
        try:
            names[i] = raw.decode(found or "ascii")
        except UnicodeError:  # an archive of several hands
            names[i] = raw.decode(likely_encoding(raw) or "cp437")
    return [name.replace("\\", "/") for name in names], found if old else None


def _unicode_path(extra: bytes, raw: bytes) -> str | None:
    """The name that Info-ZIP writes beside an older one, where it is of that name."""
    while len(extra) >= 4:
        kind, size = struct.unpack("<HH", extra[:4])
        field, extra = extra[4 : 4 + size], extra[4 + size :]
        if kind == _UNICODE_PATH and field[1:5] == struct.pack("<L", zlib.crc32(raw)):
            return field[5:].decode()
    return None


def _is_litter(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return "__MACOSX" in parts or parts[-1:] in ((".DS_Store",), ("Thumbs.db",))


def _unsafe_members(members: list[tuple[str, zipfile.ZipInfo]], zip_path: Path) -> list[Problem]:
    reasons: dict[str, list[str]] = {}
    for name, info in members:
        reason = _refusal(name, info)
        if reason is not None:
            reasons.setdefault(reason, []).append(repr(name))
    counts = Counter(str(PurePosixPath(name)) for name, _ in members if name[-1:] != "/")
    twice = [repr(name) for name, count in counts.items() if count > 1]
    if twice:
        reasons["are there twice"] = twice
    advice = "pack the archive again without them"
    return [
        Problem(str(zip_path), f"members that {reason}: {listing(names)}; {advice}")
        for reason, names in reasons.items()
    ]


def _refusal(name: str, info: zipfile.ZipInfo) -> str | None:
    """The reason why a member must not be unpacked, or None."""
    kind = stat.S_IFMT(info.external_attr >> 16)
    if name.startswith("/") or re.match("[A-Za-z]:", name):
        return "have an absolute path"
    if ".." in name.split("/"):
        return "lead outside of the archive (..)"
    if "\0" in name or not PurePosixPath(name).parts:
        return "have no valid name"
    if name.count("/") > MAX_DEPTH:
        return f"lie more than {MAX_DEPTH} folders deep"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "are links or devices, not files"
    if info.flag_bits & _ENCRYPTED_FLAG:
        return "are encrypted"
    return None


def _size_problems(members: list[tuple[str, zipfile.ZipInfo]], zip_path: Path) -> list[Problem]:
    problems = []
    total = sum(info.file_size for _, info in members)
    ratio = total / max(zip_path.stat().st_size, 1)
    if len(members) > MAX_MEMBERS:
        message = f"holds {len(members):,} members; allowed: {MAX_MEMBERS:,}; {_UNPACK_IT}"
        problems.append(Problem(str(zip_path), message))
    if ratio > MAX_RATIO and total > RATIO_FREE_BYTES:
        message = (
            f"unpacks to {total / 1e9:.1f} GB, {ratio:,.0f} times its size; allowed: "
            f"{MAX_RATIO} times. If it is no zip bomb, unpack it and name the folder"
        )
        problems.append(Problem(str(zip_path), message))
    return problems


def _room_problems(
    members: list[tuple[str, zipfile.ZipInfo]], zip_path: Path, folder: Path
) -> Iterator[Problem]:
    total, disk = sum(info.file_size for _, info in members), os.statvfs(folder)
    free = shutil.disk_usage(folder).free
    if total > free:
        message = (
            f"unpacks to {total / 1e9:.1f} GB, but {folder} has {free / 1e9:.1f} GB free; "
            "make room or set FOLDRACE_CACHE to a folder on a larger disk"
        )
        yield Problem(str(zip_path), message)
    if disk.f_files and len(members) > disk.f_favail:  # 0: that file system counts none
        message = (
            f"holds {len(members):,} members, but {folder} has room for {disk.f_favail:,} files; "
            "make room or set FOLDRACE_CACHE to a folder on another disk"
        )
        yield Problem(str(zip_path), message)


def _extract(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, is_dir: bool) -> None:
    """Write one member; zipfile stops at its declared size and checks its checksum."""
    folder = path if is_dir else path.parent
    folder.mkdir(parents=True, exist_ok=True)
    if is_dir:
        return
    with archive.open(info) as packed, path.open("wb") as file:
        shutil.copyfileobj(packed, file, _CHUNK)
