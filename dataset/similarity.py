"""The scan of all image files, and which images nearly equal one another.

Each file is read once: digest, size and perceptual hash. Takes hashes and the side (a fold, or
training against test) that each image is on, gives for every image its nearest one on another side:
saved anew, resized, a little brighter or darker. The hash finds candidates (ImageHash's `phash`:
signs of the 8 x 8 lowest frequencies of a cosine transform), a thumbnail confirms them: digits of
one hand share a hash, but not their strokes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from foldrace.core.progress import tell
from foldrace.dataset.image_paths import on_disk
from foldrace.dataset.images import LARGE, MOST_PIXELS, ImageError, check_image, read_bytes
from foldrace.dataset.manifest import Manifest
from foldrace.dataset.test_set import ImageSet

MAX_DISTANCE = 8  # of 64 bits
_MAX_RMS = 0.11  # between thumbnails, in standard deviations of their pixels
_MAX_SHIFT = 50  # grey levels between the means of the thumbnails
_LEAST_SD = 8  # grey levels: what a blank image is measured by
_THUMB = 16  # pixels a side
_CONFIRMED = 64  # most candidates of an image to look at, the nearest first
_BATCH = 4096  # images that threads have queued at once: Ctrl-C waits for no more
_TASK = 16  # images of a thread's task
_MANY = 8192  # images from which on it pays to start processes, which takes a second or two
_PROCESS_TASK = 256  # images of a process's task: of 32 pixels 0.1 s
_BLOCK = 2**22  # distances computed at once by a thread: 32 MB


@dataclass(frozen=True, eq=False)
class PerceptualHash:
    """Hash and thumbnail of one image."""

    hash: int
    """Perceptual hash, 64 bits."""
    thumb: NDArray[np.uint8]
    """Thumbnail (16, 16, 3): grey alone would not tell a red car from a blue one."""


@dataclass(frozen=True)
class Match:
    """A row and its nearest row on another side."""

    row: int
    other: int
    distance: int
    """Number of bits in which their hashes differ."""


@dataclass(frozen=True, eq=False)
class ImageHashes:
    """Perceptual hashes of n images; those that could not be read are not among them."""

    rows: NDArray[np.int64]
    """Row of each image in a `Match`, (n,)."""
    hashes: NDArray[np.uint64]  # (n,)
    thumbs: NDArray[np.uint8]  # (n, 16, 16, 3)
    sides: NDArray[np.int64]
    """Side of each image, (n,); images of one side are not compared."""


_GRID, _LOW = 32, 8  # pixels a side, and how many of the lowest frequencies
_COSINES = 2 * np.cos(
    np.pi * np.arange(_LOW)[:, None] * (2 * np.arange(_GRID) + 1) / (2 * _GRID)
)  # (8, 32)


def perceptual_hashes(smalls: Sequence[Image.Image]) -> list[PerceptualHash]:
    """Hashes of RGB images of about 64 pixels a side; together, which halves what one costs."""
    grids, thumbs = [], []
    for small in smalls:
        grids.append(small.convert("L").resize((_GRID, _GRID), Image.Resampling.LANCZOS).tobytes())
        thumbs.append(small.resize((_THUMB, _THUMB), Image.Resampling.BILINEAR).tobytes())
    grey = np.frombuffer(b"".join(grids), np.uint8).reshape(-1, _GRID, _GRID)
    low = (_COSINES @ grey.astype(np.float64) @ _COSINES.T).reshape(-1, _LOW**2)
    below, above = np.sort(low)[:, _LOW**2 // 2 - 1 : _LOW**2 // 2 + 1].T
    # the noise of zeros, where it is flat, counts for none
    bits = np.packbits(low > (below + above)[:, None] / 2 + 1e-6, axis=1)
    pixels = np.frombuffer(b"".join(thumbs), np.uint8).reshape(-1, _THUMB, _THUMB, 3)
    return [
        PerceptualHash(int.from_bytes(of_one.tobytes()), thumb)
        for of_one, thumb in zip(bits, pixels, strict=True)
    ]


def stack_hashes(hashes: Sequence[PerceptualHash | None], sides: NDArray[np.int64]) -> ImageHashes:
    """Stack the hashes of rows with their sides (n,); None: the image could not be read."""
    rows = np.array([row for row, one in enumerate(hashes) if one is not None], dtype=np.int64)
    readable = [one for one in hashes if one is not None]
    thumbs = np.zeros((len(readable), _THUMB, _THUMB, 3), dtype=np.uint8)
    for target, one in zip(thumbs, readable, strict=True):
        target[:] = one.thumb
    bits = np.array([one.hash for one in readable], dtype=np.uint64)
    return ImageHashes(rows, bits, thumbs, sides[rows])


def nearest_matches(images: ImageHashes, others: ImageHashes, pool: Executor) -> list[Match]:
    """The match of every image that has one, by row.

    All are compared with all, a block at a time: 33,000 images with each other take 3 s on two
    cores, 100,000 take 20 s.
    """
    step = max(1, _BLOCK // max(1, len(others.rows)))
    starts = range(0, len(images.rows), step)
    blocks = pool.map(lambda start: list(_in_block(images, others, start, start + step)), starts)
    return [match for block in blocks for match in block]


def _in_block(images: ImageHashes, others: ImageHashes, start: int, stop: int) -> Iterator[Match]:
    distance = np.bitwise_count(images.hashes[start:stop, None] ^ others.hashes)
    close = distance <= MAX_DISTANCE
    close &= images.sides[start:stop, None] != others.sides
    for i in np.flatnonzero(close.any(axis=1)):
        candidates = np.flatnonzero(close[i])
        order = np.argsort(distance[i, candidates], kind="stable")[:_CONFIRMED]
        candidates = candidates[order]
        alike = _alike(images.thumbs[start + i], others.thumbs[candidates])
        if alike.any():
            best = candidates[alike.argmax()]
            row, other = images.rows[start + i], others.rows[best]
            yield Match(int(row), int(other), int(distance[i, best]))


def _alike(thumb: NDArray[np.uint8], others: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Mask (k,) of the thumbnails that show the same, but for brightness and contrast."""
    mean, pattern = _pattern(thumb[None])
    means, patterns = _pattern(others)
    rms = np.sqrt(np.square(patterns - pattern).mean(axis=1))
    return np.asarray((rms <= _MAX_RMS) & (np.abs(means - mean) <= _MAX_SHIFT))


def _pattern(thumbs: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Means (k,) and the rest (k, 768) in standard deviations, the three colours together."""
    pixels = thumbs.reshape(len(thumbs), -1).astype(np.float32)
    mean = pixels.mean(axis=1)
    pixels -= mean[:, None]
    return mean, pixels / np.maximum(pixels.std(axis=1), _LEAST_SD)[:, None]


@dataclass(frozen=True)
class ImageInfo:
    """Result of scanning one file; without a fault it has a hash."""

    size: tuple[int, int]
    """Width and height as stored, in pixels."""
    digest: bytes
    perceptual_hash: PerceptualHash | None
    fault: str | None = None
    missing: bool = False
    brightest: int = 255
    """Greatest value of any colour in the small image, of 255."""
    contrast: int = 255
    """Greatest less least value of the colour in which they differ most, in the small image."""
    sixteen_bit: bool = False


def scan_images(
    images: Manifest | ImageSet, workers: int, max_pixels: int = MOST_PIXELS
) -> list[ImageInfo]:
    """Scan every file, `workers` at a time, in the order of the rows."""
    step = f"reading {'training' if isinstance(images, Manifest) else 'test'} images"
    several = len(images) >= _MANY and workers > 1
    infos: list[ImageInfo] = []
    for found in (_by_processes if several else _by_threads)(images, workers, max_pixels):
        infos += found
        tell(step, len(infos), len(images))
    return infos


def _by_threads(
    images: Manifest | ImageSet, workers: int, max_pixels: int
) -> Iterator[list[ImageInfo]]:
    """The results, some rows at a time; equal files are decoded once."""
    known: dict[bytes, ImageInfo] = {}

    def scan(rows: range) -> list[ImageInfo]:
        return _scan([images.file(row) for row in rows], max_pixels, known)

    with ThreadPoolExecutor(max(1, workers)) as pool:
        for start in range(0, len(images), _BATCH):
            batch = range(start, min(start + _BATCH, len(images)))
            yield from pool.map(scan, _tasks(batch, _TASK))


def _by_processes(
    images: Manifest | ImageSet, workers: int, max_pixels: int
) -> Iterator[list[ImageInfo]]:
    """The results, some rows at a time.

    Threads share one interpreter, which small images keep busier than their decoder does.
    """
    import joblib  # it takes 0.2 s

    known: dict[bytes, ImageInfo] = {}
    tasks = _tasks(range(len(images)), _PROCESS_TASK)
    scan, bound = joblib.delayed(_scan_small), min(max_pixels, LARGE)
    calls = (scan(images.image_root, images.image_paths[t.start : t.stop], bound) for t in tasks)
    pool = joblib.Parallel(workers, return_as="generator", batch_size=1, pre_dispatch="4 * n_jobs")
    for rows, found in zip(tasks, pool(calls), strict=True):
        yield [
            info or _scan([images.file(row)], max_pixels, known)[0]
            for row, info in zip(rows, found, strict=True)
        ]


def _scan_small(root: Path, names: Sequence[str], max_pixels: int) -> list[ImageInfo | None]:
    """In a process of its own: the results; None for what has a fault or is too large for it.

    That is left to the caller, which has one large image in memory at a time.
    """
    infos = _scan([on_disk(root, name) for name in names], max_pixels, {})
    return [info if info.fault is None else None for info in infos]


def _tasks(rows: range, size: int) -> list[range]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def row_label(images: Manifest | ImageSet, row: int) -> str:
    """Name of a row in messages."""
    path = images.image_paths[row]
    return path if images.lines is None else f"{path} (line {images.lines[row]})"


def _scan(paths: Sequence[Path], max_pixels: int, known: dict[bytes, ImageInfo]) -> list[ImageInfo]:
    """The results of some files; `known`: digest -> result of the files so far."""
    infos: list[ImageInfo | bytes] = []  # of what was read the digest
    new: dict[bytes, ImageInfo] = {}  # apart until it has its hash: other threads look into `known`
    smalls: dict[bytes, Image.Image] = {}
    for path in paths:
        try:
            data = read_bytes(path)
        except ImageError as error:
            missing = not os.path.exists(path)
            infos.append(ImageInfo((0, 0), b"", None, error.reason, missing=missing))
            continue
        digest = hashlib.blake2b(data, digest_size=16).digest()
        infos.append(digest)
        if digest not in known and digest not in new:
            new[digest], small = _scan_content(data, digest, path, max_pixels)
            if small is not None:
                smalls[digest] = small
    for digest, found in zip(smalls, perceptual_hashes(list(smalls.values())), strict=True):
        new[digest] = replace(new[digest], perceptual_hash=found)
    known.update(new)
    return [known[info] if isinstance(info, bytes) else info for info in infos]


def _scan_content(
    data: bytes, digest: bytes, path: Path, max_pixels: int
) -> tuple[ImageInfo, Image.Image | None]:
    """The result but for its hash, and what that is made of."""
    try:
        image = check_image(data, path, max_pixels)
    except ImageError as error:
        return ImageInfo((0, 0), b"", None, error.reason), None
    # (least, greatest) of each colour
    bounds = cast(tuple[tuple[int, int], ...], image.small.getextrema())
    info = ImageInfo(
        image.size,
        digest,
        None,
        brightest=max(high for _, high in bounds),
        contrast=max(high - low for low, high in bounds),
        sixteen_bit=image.sixteen_bit,
    )
    return info, image.small
