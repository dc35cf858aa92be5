"""The tables of an entry of the pixel cache: a header, and where each image lies.

Takes an entry's folder, gives both as far as they are sound: whatever cannot have been written is a
DamagedEntry, and the entry is made again.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

VERSION = 4
PIXELS = "pixels.bin"
_HEADER, _INDEX = "header.json", "index.npy"
_FORMATS = ("raw", "jpeg")
_CLOCK_NS = 2 * 10**9  # file systems round times, some to two seconds


class DamagedEntry(Exception):
    """An entry whose files are not those that were written."""


@dataclass(frozen=True)
class Layout:
    """Size and format of the stored images."""

    side: int
    """Largest shorter side, in pixels."""
    format: str
    """raw or jpeg: a row of `cache_folder.FORMATS`."""


@dataclass(frozen=True)
class Header:
    """The properties of an entry when it was written."""

    version: int
    side: int
    format: str
    sizes: str
    """SHA-256 of the sizes of the image files; where it differs the content does too."""
    images: int
    pixel_bytes: int
    index: str
    """SHA-256 of the index file."""
    written: int
    """When the pixels were last written, in ns since 1970."""

    def __post_init__(self) -> None:
        """Raise DamagedEntry where a value cannot be one of a header."""
        numbers = (self.version, self.side, self.images, self.pixel_bytes, self.written)
        texts = (self.format, self.sizes, self.index)
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise DamagedEntry("its header has no sound numbers")
        if not all(isinstance(text, str) for text in texts) or self.format not in _FORMATS:
            raise DamagedEntry("its header has no sound texts")


def write_tables(folder: Path, layout: Layout, sizes: str, index: NDArray[np.int64]) -> None:
    """Write index and header, after the pixels."""
    buffer = io.BytesIO()
    np.save(buffer, index)
    (folder / _INDEX).write_bytes(buffer.getvalue())
    checksum = hashlib.sha256(buffer.getvalue()).hexdigest()
    pixels = (folder / PIXELS).stat()
    header = Header(
        *(VERSION, layout.side, layout.format, sizes, len(index)),
        *(pixels.st_size, checksum, pixels.st_mtime_ns),
    )
    (folder / _HEADER).write_text(json.dumps(asdict(header)), encoding="utf-8")


def read_header(folder: Path) -> Header:
    """The header of an entry; raises FileNotFoundError and DamagedEntry as `StoredImages` does."""
    try:
        header = Header(**json.loads((folder / _HEADER).read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise DamagedEntry(f"its header is not readable: {error}") from error
    if header.version != VERSION:
        raise DamagedEntry(f"its version is {header.version}, not {VERSION}")
    return header


def checked_index(folder: Path, header: Header) -> NDArray[np.int64]:
    """(n, 4) int64: first byte, byte after the last, height, width."""
    found = (folder / PIXELS).stat()
    if found.st_size != header.pixel_bytes:
        raise DamagedEntry(f"{PIXELS} has {found.st_size:,} bytes, not {header.pixel_bytes:,}")
    if abs(found.st_mtime_ns - header.written) > _CLOCK_NS:
        raise DamagedEntry(f"{PIXELS} was changed after it was written")
    data = (folder / _INDEX).read_bytes()
    if hashlib.sha256(data).hexdigest() != header.index:
        raise DamagedEntry(f"the checksum of {_INDEX} does not match")
    try:
        index = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # damaged headers have many ways to fail
        raise DamagedEntry(f"{_INDEX} is not readable: {error}") from error
    if index.dtype != np.int64 or index.shape != (header.images, 4):
        raise DamagedEntry(f"{_INDEX} holds {index.dtype} {index.shape}")
    start, end, height, width = index.T
    inside = (start >= 0) & (start <= end) & (end <= header.pixel_bytes)
    if header.format == "raw":
        inside &= (height > 0) & (width > 0) & (end - start == height * width * 3)
    if not inside.all():
        raise DamagedEntry(f"{_INDEX} has images outside of {PIXELS}")
    return np.asarray(index, np.int64)
