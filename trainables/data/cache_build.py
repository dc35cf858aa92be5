"""Building an entry of the pixel cache: every image file read once, hashed, decoded and stored.

Takes image files and a layout, gives an entry that is whole. Its name is a function of the files'
contents, so the same images at another path share it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from foldrace.dataset.images import decode_rgb, read_bytes
from foldrace.trainables.data.cache_entry import (
    PIXELS,
    VERSION,
    DamagedEntry,
    Layout,
    read_header,
    write_tables,
)
from foldrace.trainables.data.cache_folder import StoredImages, new_part, publish, reserve

T = TypeVar("T")
_CHUNK = 256  # images decoded ahead
_SPARE = 1.05  # of an estimate's room, so that it is seldom asked for twice
_JPEG_QUALITY = 92
_SCANNERS = 32  # threads that wait for a network disk
_SCANNED = 256  # files a task


@dataclass(frozen=True)
class Scan:
    """The state of the image files by the file system, without reading them."""

    sizes: str
    """SHA-256 of the sizes."""
    state: str
    """SHA-256 of sizes, times of change (mtime) and of any change of status (ctime)."""


@dataclass(frozen=True)
class _ImageData:
    """One image as it is written."""

    data: bytes
    height: int
    width: int
    size: int  # of its file
    digest: bytes  # of its file


@dataclass(frozen=True)
class _Tables:
    """All images as they were written."""

    index: NDArray[np.int64]  # (n, 4): first byte, byte after the last, height, width
    sizes: NDArray[np.int64]  # (n,) of the files
    digests: list[bytes]


def scan(files: Sequence[Path]) -> Scan:
    """Stat every file, many at a time; a missing one counts too: building names it."""
    parts = [files[i : i + _SCANNED] for i in range(0, len(files), _SCANNED)]
    with ThreadPoolExecutor(_SCANNERS) as pool:
        found = np.concatenate([np.zeros((0, 3), np.int64), *pool.map(_stats, parts)])
    return Scan(_sizes_hash(found[:, 0]), hashlib.sha256(found.tobytes()).hexdigest())


def find_same(
    root: Path, files: Sequence[Path], layout: Layout, sizes: str, workers: int
) -> str | None:
    """The key of an entry with the same content, where one is likely enough to read all files."""
    likely = {entry.name for entry in root.iterdir() if _is_likely(entry, layout, sizes)}
    if not likely:
        return None
    digests = _in_order(files, lambda file: hashlib.sha256(read_bytes(file)).digest(), workers)
    key = _key(layout, digests)
    return key if key in likely else None


def build(
    root: Path, files: Sequence[Path], layout: Layout, bound: int, workers: int
) -> StoredImages:
    """Write an entry aside and rename it.

    Raises NoRoom where it does not fit into `bound` bytes or the disk, ImageError for the first
    file that gives no image.
    """
    part = new_part(root)
    try:
        written = _write_pixels(files, layout, part.folder, bound, workers)
        key = _key(layout, written.digests)
        write_tables(part.folder, layout, _sizes_hash(written.sizes), written.index)
        return publish(part.folder, root / key)
    finally:
        part.held.close()
        shutil.rmtree(part.folder, ignore_errors=True)


def as_stored(image: NDArray[np.uint8], kind: str) -> NDArray[np.uint8]:
    """The pixels that an entry of this format would give for the image."""
    if kind == "raw":
        return image
    stored = np.frombuffer(_jpeg(image), np.uint8)
    return np.asarray(cv2.imdecode(stored, cv2.IMREAD_COLOR_RGB), np.uint8)


def _write_pixels(
    files: Sequence[Path], layout: Layout, folder: Path, bound: int, workers: int
) -> _Tables:
    done = _Tables(np.zeros((len(files), 4), np.int64), np.zeros(len(files), np.int64), [])
    reserved = min(len(files), _CHUNK) * layout.side**2 * 3
    reserve(folder, reserved, bound)
    offset = 0
    with (folder / PIXELS).open("wb") as pixels:
        for row, image in enumerate(_stored(files, layout, workers)):
            end = offset + len(image.data)
            expected = end * len(files) // (row + 1)
            # Known early, since building for nothing takes long.
            if end > reserved or (row + 1 == _CHUNK and expected > reserved):
                reserved = max(end, int(expected * _SPARE))
                reserve(folder, reserved, bound)
            pixels.write(image.data)
            done.index[row] = offset, end, image.height, image.width
            done.sizes[row] = image.size
            done.digests.append(image.digest)
            offset = end
        pixels.flush()
        os.fsync(pixels.fileno())
    return done


def _stored(files: Sequence[Path], layout: Layout, workers: int) -> Iterator[_ImageData]:
    def store(file: Path) -> _ImageData:
        data = read_bytes(file)
        image = np.asarray(decode_rgb(data, file, layout.side))
        stored = image.tobytes() if layout.format == "raw" else _jpeg(image)
        digest = hashlib.sha256(data).digest()
        return _ImageData(stored, image.shape[0], image.shape[1], len(data), digest)

    return _in_order(files, store, workers)


def _jpeg(image: NDArray[np.uint8]) -> bytes:
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    done, data = cv2.imencode(".jpg", bgr, (cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY))
    if not done:
        raise ValueError(f"cv2 cannot encode an image of {image.shape}")
    return np.asarray(data).tobytes()


def _in_order(files: Sequence[Path], work: Callable[[Path], T], workers: int) -> Iterator[T]:
    """Results in order, worked out by threads, a bounded number ahead."""
    remaining = iter(files)
    with ThreadPoolExecutor(workers) as pool:
        ahead = [pool.submit(work, file) for file in islice(remaining, _CHUNK)]
        try:
            for place in range(len(files)):
                yield ahead[place % _CHUNK].result()
                for file in islice(remaining, 1):
                    ahead[place % _CHUNK] = pool.submit(work, file)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _key(layout: Layout, digests: Iterable[bytes]) -> str:
    head = f"{VERSION} {layout.side} {layout.format}\n".encode()
    return hashlib.sha256(head + b"".join(digests)).hexdigest()


def _sizes_hash(sizes: NDArray[np.int64]) -> str:
    return hashlib.sha256(sizes.tobytes()).hexdigest()


def _is_likely(entry: Path, layout: Layout, sizes: str) -> bool:
    try:
        header = read_header(entry)
    except (OSError, DamagedEntry):
        return False
    return (header.side, header.format, header.sizes) == (layout.side, layout.format, sizes)


def _stats(files: Sequence[Path]) -> NDArray[np.int64]:
    return np.array([_stat(file) for file in files], np.int64).reshape(-1, 3)


def _stat(file: Path) -> tuple[int, int, int]:
    try:
        found = os.stat(file)
    except OSError:
        return -1, -1, -1
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns
