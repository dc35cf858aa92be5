"""Whole files in a folder on a local disk, NFS, or an object store (`s3://...`).

`Files` takes names relative to its folder and gives bytes; texts and validated records are read and
written through it. A file appears whole or not at all: locally `atomic_write` and `atomic_folder`
write aside, sync and rename; an object store puts whole objects.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, Protocol, TypeVar
from urllib.parse import quote, unquote, urlsplit

from pydantic import BaseModel, ValidationError

from foldrace.core.errors import RunFolderError
from foldrace.core.opening import GB, MB, UnfitFile, read_regular, unreadable
from foldrace.core.patience import AT_ONCE, Patience
from foldrace.core.redaction import holds_key

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo

_PART = ".part-"
"""Beginning of the names of files and folders that are being written."""
_ABANDONED_SECONDS = 24 * 3600
_OBJECT_STORES = ("s3", "gs", "gcs", "abfs", "abfss")  # pyarrow knows more, but not all are atomic
_URL_SYNTAX = "%:/?&=@+,;~!$'()*"  # stays as it is; blanks and letters beyond ASCII are quoted


def _most_bytes(name: str) -> int:
    """Bytes that a file of that name may have: a record is small, arrays and weights may be not."""
    return 100 * MB if name.endswith((".json", ".yaml")) else 100 * GB


class Files(Protocol):
    """A folder of whole files."""

    root: str
    patience: Patience
    """How long reads and writes wait for a disk or a store that fails."""

    def read(self, name: str) -> bytes:
        """The bytes of a file; OSError where there is none."""

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Write a file, whole or not at all, in place of an older one."""

    def write_private(self, name: str, data: bytes) -> None:
        """`write` of a file that, on a local disk, only this user can read."""

    def exists(self, name: str) -> bool:
        """True where there is a file or a folder of that name."""

    def names(self, folder: str = "") -> list[str]:
        """Names of the entries of a folder, sorted; [] where there is none."""

    def size(self, name: str) -> int:
        """Size of a file in bytes; OSError where there is none."""

    def modified(self, name: str) -> float:
        """When a file was written, in Unix seconds of the folder's clock; OSError: no file."""

    def stamps(self, folder: str) -> dict[str, str]:
        """Name relative to the root -> a text that changes whenever the file does.

        Every file at any depth below the folder is listed.
        """

    def delete(self, name: str) -> None:
        """Remove a file or a folder with all in it, if there is one."""

    def delete_parts(self, folder: str) -> None:
        """Remove what killed writers left of files that never came to be.

        Nobody may be writing into the folder.
        """


def open_files(root: str | Path) -> Files:
    """The folder at a local path or at an object store's URL (`s3://bucket/path`)."""
    text = str(root)
    if "://" not in text:
        return LocalFiles(Path(os.path.expanduser(text)).resolve())
    if text.startswith("file://"):
        return LocalFiles(Path(unquote(urlsplit(text).path)))
    return RemoteFiles(text)


class LocalFiles(Files):
    """A folder that the operating system mounts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.root = str(path)
        self.patience = AT_ONCE

    def place(self, name: str) -> Path:
        """Path of a file or folder in it; RunFolderError where a link leads out of the folder.

        A folder may come from anybody, and a link in it lead anywhere.
        """
        text = str(self.path)
        for part in name.split("/"):
            text = f"{text}/{part}"
            if part == ".." or os.path.islink(text):
                real, home = os.path.realpath(text), os.path.realpath(self.path)
                if not f"{real}/".startswith(f"{home.rstrip('/')}/"):
                    raise RunFolderError.single(
                        text,
                        f"leads out of {self.root}, to {real}; put what is there into the folder",
                    )
        return Path(text)

    def _to_replace(self, name: str) -> Path:
        """`place` of a file that is written or removed: it may itself be a link, which goes."""
        folder, _, last = name.rpartition("/")
        return (self.place(folder) if folder else self.path) / last

    def read(self, name: str) -> bytes:
        """See `Files.read`."""
        path = self.place(name)
        return self.patience.ask(str(path), lambda: read_regular(path, _most_bytes(name)))

    def write(self, name: str, data: bytes | memoryview) -> None:
        """See `Files.write`."""
        self._write(name, data, 0o666)

    def write_private(self, name: str, data: bytes) -> None:
        """See `Files.write_private`."""
        self._write(name, data, 0o600)

    def _write(self, name: str, data: bytes | memoryview, mode: int) -> None:
        path = self._to_replace(name)

        def put() -> None:
            with atomic_write(path, mode) as file:
                file.write(data)

        self.patience.ask(str(path), put)

    def exists(self, name: str) -> bool:
        """See `Files.exists`."""
        return (self.path / name).exists()

    def names(self, folder: str = "") -> list[str]:
        """See `Files.names`."""
        # Files being written are not entries yet.
        path = self.path / folder
        if not path.is_dir():
            return []
        return sorted(entry.name for entry in path.iterdir() if not entry.name.startswith(_PART))

    def size(self, name: str) -> int:
        """See `Files.size`."""
        return (self.path / name).stat().st_size

    def modified(self, name: str) -> float:
        """See `Files.modified`."""
        return (self.path / name).stat().st_mtime

    def stamps(self, folder: str) -> dict[str, str]:
        """See `Files.stamps`."""
        return dict(_stamps(str(self.path / folder), folder))

    def delete(self, name: str) -> None:
        """See `Files.delete`."""
        path = self._to_replace(name)
        try:
            path.unlink()  # mostly there is nothing, and this one call says so
        except FileNotFoundError:
            return
        except OSError:
            if not path.is_dir():
                raise
            shutil.rmtree(path)

    def delete_parts(self, folder: str) -> None:
        """See `Files.delete_parts`."""
        for part in self.place(folder).glob(f"{_PART}*"):
            part.unlink(missing_ok=True)


class RemoteFiles(Files):
    """A folder in an object store, through pyarrow's file systems.

    Keys and region come from where the AWS tools have them: AWS_ACCESS_KEY_ID and
    AWS_SECRET_ACCESS_KEY, AWS_REGION, ~/.aws, or the machine's role. Another S3 service (MinIO,
    Ceph) is named by AWS_ENDPOINT_URL=http://host:9000, or in the URL itself:
    `s3://bucket/run?endpoint_override=host:9000&scheme=http&region=us-east-1`. Every machine of a
    cluster needs the same variables. The bucket must exist.
    """

    def __init__(self, url: str) -> None:
        from pyarrow import ArrowException, fs

        allowed = f"allowed: a local path, or {', '.join(f'{s}://' for s in _OBJECT_STORES)}"
        if urlsplit(url).scheme not in _OBJECT_STORES:
            raise RunFolderError.single(url, f"is of no kind that a run can be kept in; {allowed}")
        if holds_key(url):  # it would stand in records, logs and every command to go on with
            raise RunFolderError.single(
                url,
                "has a password or key in it; leave that out, and set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or ~/.aws, on every machine",
            )
        try:
            base, path = fs.FileSystem.from_uri(quote(url, safe=_URL_SYNTAX))
        except (ArrowException, OSError, ValueError) as error:
            raise RunFolderError.single(url, f"cannot be opened: {error}; {allowed}") from error
        self._fs, self._path, self.root = base, PurePosixPath(path), url
        self.patience = AT_ONCE

    def read(self, name: str) -> bytes:
        """See `Files.read`."""

        def get() -> bytes:
            most = _most_bytes(name)
            with self._fs.open_input_file(str(self._path / name)) as file:
                if file.size() > most:
                    raise UnfitFile(Path(name), f"has {file.size():,} bytes; allowed: {most:,}")
                return bytes(file.read())

        return self.patience.ask(f"{self.root}/{name}", get)

    def write(self, name: str, data: bytes | memoryview) -> None:
        """See `Files.write`."""

        def put() -> None:
            with self._fs.open_output_stream(str(self._path / name)) as stream:
                stream.write(data)

        self.patience.ask(f"{self.root}/{name}", put)

    def write_private(self, name: str, data: bytes) -> None:
        """See `Files.write_private`."""
        self.write(name, data)

    def exists(self, name: str) -> bool:
        """See `Files.exists`."""
        from pyarrow import fs

        path = str(self._path / name)
        found = self.patience.ask(f"{self.root}/{name}", lambda: self._fs.get_file_info(path))
        return bool(found.type != fs.FileType.NotFound)

    def names(self, folder: str = "") -> list[str]:
        """See `Files.names`."""
        from pyarrow import fs

        selector = fs.FileSelector(str(self._path / folder), allow_not_found=True)
        found = self.patience.ask(f"{self.root}/{folder}", lambda: self._fs.get_file_info(selector))
        return sorted(info.base_name for info in found)

    def size(self, name: str) -> int:
        """See `Files.size`."""
        return int(self._file_info(name).size)

    def modified(self, name: str) -> float:
        """See `Files.modified`."""
        return float(self._file_info(name).mtime_ns) / 1e9

    def _file_info(self, name: str) -> FileInfo:
        from pyarrow import fs

        found = self._fs.get_file_info(str(self._path / name))
        if found.type != fs.FileType.File:
            raise FileNotFoundError(f"{self.root}: no file {name}")
        return found

    def stamps(self, folder: str) -> dict[str, str]:
        """See `Files.stamps`."""
        from pyarrow import fs

        where = str(self._path / folder)  # one request lists many files: none is asked for alone
        selector = fs.FileSelector(where, allow_not_found=True, recursive=True)
        return {
            str(PurePosixPath(info.path).relative_to(self._path)): f"{info.size} {info.mtime_ns}"
            for info in self._fs.get_file_info(selector)
            if info.type == fs.FileType.File
        }

    def delete(self, name: str) -> None:
        """See `Files.delete`."""
        from pyarrow import fs

        found = self._fs.get_file_info(str(self._path / name))
        if found.type == fs.FileType.Directory:
            self._fs.delete_dir(str(self._path / name))
        elif found.type == fs.FileType.File:
            self._fs.delete_file(str(self._path / name))

    def delete_parts(self, folder: str) -> None:
        """Do nothing: an object that was not put whole does not exist."""


@contextmanager
def at_once(files: Files) -> Iterator[None]:
    """Let nothing wait within the block: what is derived can be made again later."""
    before, files.patience = files.patience, AT_ONCE
    try:
        yield
    finally:
        files.patience = before


@contextmanager
def atomic_write(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Give a new file to write and read, which takes the place of `path` after the block.

    It is written aside, synced and renamed. Where the block or the disk fails, the old file stays.
    `mode`: its permissions, less the umask.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _part_path(path)
    try:
        with open(part, "w+b", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    _sync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a new folder to fill, which becomes `path` after the block.

    Where another process was faster, its folder stays: both are to hold the same. A block that
    takes long touches its folder now and then, see `remove_abandoned`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _part_path(path)
    part.mkdir()
    try:
        yield part
        os.sync()  # 5,000 files of 20 kB: 0.2 s, an fsync of each 14 s
        try:
            part.rename(path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    _sync_folder(path.parent)


def remove_abandoned(folder: Path, name: str = "") -> None:
    """Remove files and folders aside that nobody touched for a day: their writers were killed.

    `name`: only those that were to become this one.
    """
    for part in folder.glob(f"{_PART}*{name}"):
        with suppress(OSError):  # another process removes it too
            if time.time() - part.lstat().st_mtime > _ABANDONED_SECONDS:
                if part.is_dir():
                    shutil.rmtree(part)
                else:
                    part.unlink()


def _part_path(target: Path) -> Path:
    """A new path beside `target`, which this writer, and no other, renames to it."""
    return target.with_name(f"{_PART}{uuid.uuid4().hex}-{target.name}")


def _stamps(path: str, name: str) -> Iterator[tuple[str, str]]:
    """(name, stamp) of every file below."""
    try:
        entries = os.scandir(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    with entries:
        for entry in entries:
            if entry.name.startswith(_PART):
                continue
            if entry.is_dir(follow_symlinks=False):  # links may lead round and round
                yield from _stamps(entry.path, f"{name}/{entry.name}")
                continue
            with suppress(FileNotFoundError):  # a sweep may be running
                stat = entry.stat()
                stamp = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"  # a write: a new inode
                yield f"{name}/{entry.name}", stamp


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; not every file system lets a folder be opened."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


Record = TypeVar("Record", bound=BaseModel)


def to_bytes(text: str) -> bytes:
    """The text as UTF-8; bytes of file names that are no UTF-8, kept as surrogates, come back."""
    return text.encode(errors="surrogateescape")


def read_text(files: Files, name: str) -> str:
    """The text that `to_bytes` made a file of; RunFolderError where it cannot be read."""
    try:
        return files.read(name).decode(errors="surrogateescape")
    except OSError as error:
        raise RunFolderError.single(f"{files.root}/{name}", unreadable(error)) from error


def record_json(record: BaseModel) -> bytes:
    """The bytes of a record's JSON file."""
    return record.model_dump_json(indent=1).encode()


def read_record(files: Files, name: str, kind: type[Record]) -> Record:
    """The record in a file; RunFolderError where there is none of that kind."""
    try:
        return kind.model_validate_json(files.read(name), strict=True)  # a text is no number
    except (OSError, ValidationError) as error:
        raise RunFolderError.single(f"{files.root}/{name}", f"is damaged: {error}") from error


def sound_record(files: Files, name: str, kind: type[Record]) -> Record | None:
    """The record in a file; None where there is no file, or with a warning a damaged one."""
    if not files.exists(name):
        return None
    try:
        return kind.model_validate_json(files.read(name), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        warn_ignored(f"{files.root}/{name}", f"{place}: {first['msg']}".removeprefix(": "))
        return None


@cache
def warn_ignored(file: str, reason: str) -> None:
    """Say once in the log that a file is treated as if it were not there."""
    logging.getLogger("foldrace").warning("%s is ignored: %s", file, reason)
