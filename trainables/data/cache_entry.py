"""One entry of the pixel cache: a folder with images end to end, and a table of where each lies.

Takes the entry's folder, gives its images by row. A header holds what both files are checked
against, and a lock file says, even after a kill -9, whether some process uses the entry.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from numpy.typing import NDArray

VERSION = 2
HEADER, INDEX, PIXELS, IN_USE = "header.json", "index.npy", "pixels.bin", "in_use"


class DamagedEntry(Exception):
    """An entry whose files are not those that were written."""


@dataclass(frozen=True)
class Layout:
    """How images are stored."""

    side: int
    """Pixels: the longer side is never larger."""
    format: str
    """raw or jpeg."""


@dataclass(frozen=True)
class Header:
    """What an entry must be like."""

    version: int
    side: int
    format: str
    sizes: str
    """SHA-256 of the sizes of the image files: tells quickly what cannot be the same content."""
    images: int
    pixel_bytes: int
    index: str
    """SHA-256 of the index file."""


class StoredImages:
    """The images of an entry, in one memory-mapped file: all processes of a node share its pages.
    As long as the object lives, the entry is in use. Raises FileNotFoundError where there is no
    entry, DamagedEntry where it is not whole."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lease = lease(folder)
        with suppress(OSError):  # of another user
            os.utime(folder / IN_USE)
        self._index = _checked_index(folder, read_header(folder))
        # A plain array over the map: slicing a memmap takes five times as long.
        self._bytes = np.asarray(np.memmap(folder / PIXELS, dtype=np.uint8, mode="r"))

    @property
    def key(self) -> str:
        return self._folder.name

    def __len__(self) -> int:
        return len(self._index)

    def image(self, row: int) -> NDArray[np.uint8]:
        """(height, width, 3) RGB."""
        raise NotImplementedError

    def __reduce__(self) -> tuple[type[StoredImages], tuple[Path]]:
        return type(self), (self._folder,)  # a loader's worker maps the file itself


class DecodedImages(StoredImages):
    """Pixels as they are: a read-only view into the map."""

    def image(self, row: int) -> NDArray[np.uint8]:
        start, end, height, width = self._index[row].tolist()
        return self._bytes[start:end].reshape(height, width, 3)


class JpegImages(StoredImages):
    """JPEGs at the stored size, decoded at each use."""

    def image(self, row: int) -> NDArray[np.uint8]:
        start, end, _, _ = self._index[row].tolist()
        image = cv2.imdecode(self._bytes[start:end], cv2.IMREAD_COLOR_RGB)
        if image is None:
            raise DamagedEntry(f"image {row} in {self._folder} is no JPEG; delete that folder")
        return np.asarray(image, np.uint8)


FORMATS: dict[str, type[StoredImages]] = {"raw": DecodedImages, "jpeg": JpegImages}


def open_entry(folder: Path) -> StoredImages:
    """Raises as `StoredImages` does."""
    return FORMATS[read_header(folder).format](folder)


def lease(folder: Path) -> BinaryIO:
    """Holds the entry in use until the file is closed or the process ends, however it ends.
    Processes that are forked meanwhile hold it too."""
    file = (folder / IN_USE).open("rb")
    fcntl.flock(file, fcntl.LOCK_SH)
    return file


@contextmanager
def unused(folder: Path) -> Iterator[bool]:
    """Whether nobody holds the entry; if so, nobody can start to within the block."""
    try:
        file = (folder / IN_USE).open("rb+")
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


def write_tables(folder: Path, layout: Layout, sizes: str, index: NDArray[np.int64]) -> None:
    """Index and header, after the pixels are written."""
    buffer = io.BytesIO()
    np.save(buffer, index)
    (folder / INDEX).write_bytes(buffer.getvalue())
    checksum = hashlib.sha256(buffer.getvalue()).hexdigest()
    pixel_bytes = (folder / PIXELS).stat().st_size
    header = Header(VERSION, layout.side, layout.format, sizes, len(index), pixel_bytes, checksum)
    (folder / HEADER).write_text(json.dumps(asdict(header)), encoding="utf-8")


def read_header(folder: Path) -> Header:
    """Raises FileNotFoundError and DamagedEntry as `StoredImages` does."""
    try:
        header = Header(**json.loads((folder / HEADER).read_bytes()))
    except (ValueError, TypeError) as error:
        raise DamagedEntry(f"its header is not readable: {error}") from error
    if header.version != VERSION:
        raise DamagedEntry(f"its version is {header.version}, not {VERSION}")
    return header


def _checked_index(folder: Path, header: Header) -> NDArray[np.int64]:
    """(n, 4) int64: first byte, byte after the last, height, width."""
    found = (folder / PIXELS).stat().st_size
    if found != header.pixel_bytes:
        raise DamagedEntry(f"{PIXELS} has {found:,} bytes, not {header.pixel_bytes:,}")
    data = (folder / INDEX).read_bytes()
    if hashlib.sha256(data).hexdigest() != header.index:
        raise DamagedEntry(f"{INDEX} has another checksum than when it was written")
    index: NDArray[np.int64] = np.load(io.BytesIO(data), allow_pickle=False)
    return index
