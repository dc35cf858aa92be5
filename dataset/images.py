"""Reading and finding image files: the one place that turns a file into pixels.

Takes paths or bytes, gives upright 8-bit RGB images, or an `ImageError` with the reason.
"""

from __future__ import annotations

import io
import math
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError, features

from foldrace.core.errors import DataError
from foldrace.core.opening import GB, open_regular, read_regular, unreadable

MOST_BYTES = GB
"""Size of the largest image file that is read."""
MOST_PIXELS = 500_000_000
"""Pixels of the largest image that `data.max_pixels` may allow."""
# Pillow refuses what is twice as large, in tiles and frames, too, and warns of what lies between.
Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
_HAS_HEIF = find_spec("pillow_heif") is not None
_HAS_AVIF = features.check("avif")  # built into Pillow from 11.3 on
IMAGE_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"),
        *(".ppm", ".pgm", ".pnm", ".jp2"),
        *((".avif",) if _HAS_AVIF else ()),
        *((".heic", ".heif", ".hif") if _HAS_HEIF else ()),
    )
)
_LITTER = frozenset(("thumbs.db", "desktop.ini"))
_FTYP_READERS = {
    **dict.fromkeys((b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1"), "HEIC: pillow-heif"),
    b"avif": "AVIF: pillow 11.3 or later",
}  # brand in the first bytes -> kind, and the package that reads it

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation -> what makes the image upright

LONGEST = 4
"""Longest that a bounded image may be, in multiples of the bound of its shorter side."""
LARGE = 2**24
"""Pixels; of images beyond it only one at a time lies in a process's memory."""
SMALL_SIDE = 64
"""Longer side of the image that `check_image` gives, in pixels."""
_MOST_DEPTH = 50  # folders within folders
_DIGITS = re.compile("([0-9]+)")
_SHRINKS_WELL = ("RGB", "L", "RGBA", "CMYK")  # before RGB is made of them, which then costs less
_DRAFT_MARGIN = 2  # a JPEG is decoded at no less than this multiple of the final size


class ImageError(Exception):
    """A file that gives no image."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{path}: {reason}")


def read_rgb(
    path: Path, shorter_side: int | None = None, max_pixels: int = MOST_PIXELS
) -> Image.Image:
    """The upright image in mode RGB, fully decoded; transparency lies on white.

    With `shorter_side`, that side has at most so many pixels, and the other at most `LONGEST`
    times as many; nothing is enlarged. Raises ImageError, also for more than `max_pixels`.
    """
    return decode_rgb(read_bytes(path), path, shorter_side, max_pixels)


def decode_rgb(
    data: bytes, path: Path, shorter_side: int | None = None, max_pixels: int = MOST_PIXELS
) -> Image.Image:
    """The upright RGB image from the content of the file at `path`, see `read_rgb`."""
    image = _open(data, path, max_pixels)
    with _one_at_a_time(image):
        return _decoded(image, path, shorter_side)


def upright_rgb(
    image: Image.Image, path: Path, shorter_side: int | None = None, max_pixels: int = MOST_PIXELS
) -> Image.Image:
    """An image in memory as `read_rgb` gives that of a file; it stays as it is.

    `path` is its name in an ImageError.
    """
    _require_size(image, path, max_pixels)
    try:
        copy = image.copy()  # which reads one that was opened and not loaded yet
    except Exception as error:  # as in `_decoded`
        raise ImageError(path, _reason(error)) from error
    return _decoded(copy, path, shorter_side)


def _decoded(image: Image.Image, path: Path, shorter_side: int | None) -> Image.Image:
    try:
        if shorter_side is not None:
            _draft(image, _box(image.size, shorter_side * _DRAFT_MARGIN))
        image.load()
        rgb = _to_rgb(image)
        if shorter_side is not None:
            box = _box(rgb.size, shorter_side)
            rgb.thumbnail(box, Image.Resampling.LANCZOS, reducing_gap=3.0)
        turn = _UPRIGHT.get(_orientation(image))
        return rgb if turn is None else rgb.transpose(turn)
    except Exception as error:  # Pillow's plugins raise whatever their parser stumbles over
        raise ImageError(path, _reason(error)) from error


@dataclass(frozen=True)
class CheckedImage:
    """One image that was decoded to its end."""

    size: tuple[int, int]
    """Width and height as stored, in pixels."""
    small: Image.Image
    """The upright RGB image at `SMALL_SIDE` or less."""
    sixteen_bit: bool
    """True where the file has 16 bits a value, of which RGB keeps the upper eight."""


def check_image(data: bytes, path: Path, max_pixels: int = MOST_PIXELS) -> CheckedImage:
    """Decode the file in `data` to its end; raises ImageError, also for more than `max_pixels`.

    Cheaper than `read_rgb`: of a JPEG not more resolution is computed than the small image needs.
    """
    image = _open(data, path, max_pixels)
    with _one_at_a_time(image):
        return _checked(image, path)


def _checked(image: ImageFile.ImageFile, path: Path) -> CheckedImage:
    size, box = image.size, (SMALL_SIDE, SMALL_SIDE)
    # Asked before it is loaded: Pillow gives 48-bit colours as RGB and forgets what they were.
    sixteen_bit = image.mode.startswith("I") or any(";16" in str(t.args) for t in image.tile)
    try:
        _draft(image, box)
        image.load()
        small = image if image.mode in _SHRINKS_WELL else _to_rgb(image)
        small.thumbnail(box, Image.Resampling.BILINEAR, reducing_gap=2.0)
        turn = _UPRIGHT.get(_orientation(image))
        rgb = _to_rgb(small)
        return CheckedImage(size, rgb if turn is None else rgb.transpose(turn), sixteen_bit)
    except Exception as error:  # as in read_rgb
        raise ImageError(path, _reason(error)) from error


def image_fault(path: Path, max_pixels: int = MOST_PIXELS) -> str | None:
    """Why the file gives no image, as in an `ImageError`; None where it gives one."""
    try:
        check_image(read_bytes(path), path, max_pixels)
    except ImageError as error:
        return error.reason
    return None


def pixel_size(path: Path) -> tuple[int, int] | None:
    """Width and height in pixels by the file's header alone; None where it is no image."""
    try:
        with open_regular(path, MOST_BYTES) as file, Image.open(file, formats=_formats()) as image:
            return image.size
    except Exception:  # as in read_rgb
        return None


def read_bytes(path: Path) -> bytes:
    """The file's content; an `ImageError` when there is none."""
    try:
        data = read_regular(path, MOST_BYTES)
    except FileNotFoundError as error:
        raise ImageError(path, "does not exist") from error
    except OSError as error:
        raise ImageError(path, unreadable(error)) from error
    if not data:
        raise ImageError(path, "is empty (0 bytes)")
    return data


@dataclass(frozen=True)
class FolderFiles:
    """The files below a folder, as natural-sorted posix paths relative to it.

    Hidden files and folders, and what systems leave behind, are not among them.
    """

    images: tuple[str, ...]
    others: tuple[str, ...]
    """Files that are no image of a known kind, by their suffix."""


def find_files(folder: Path) -> FolderFiles:
    """Every file below `folder`."""
    images: list[str] = []
    others: list[str] = []
    for path in sorted(_files(folder), key=natural_key):
        (images if has_image_suffix(path) else others).append(path)
    return FolderFiles(tuple(images), tuple(others))


def find_images(folder: Path) -> list[str]:
    """Every image below `folder`, as natural-sorted posix paths relative to it.

    Hidden files and folders are left out.
    """
    return sorted(filter(has_image_suffix, _files(folder)), key=natural_key)


def holds_image(folder: Path) -> bool:
    """True where an image lies below the folder; no more than that is looked for."""
    return any(map(has_image_suffix, _files(folder, "")))


def has_image_suffix(path: str) -> bool:
    """True for the name of an image file."""
    return os.path.splitext(path.strip())[1].lower() in IMAGE_SUFFIXES


def natural_key(text: str) -> tuple[list[str | tuple[int, str]], str]:
    """Sort key with '2' before '10' and 'a2' before 'a10'; different texts never tie."""
    parts: list[str | tuple[int, str]] = []
    for i, part in enumerate(_DIGITS.split(text.casefold())):
        digits = part.lstrip("0")
        parts.append((len(digits), digits) if i % 2 else part)
    return parts, text


def _files(folder: Path, prefix: str = "") -> Iterator[str]:
    if prefix.count("/") > _MOST_DEPTH:
        message = f"lies more than {_MOST_DEPTH} folders deep; is a link to a folder above in it?"
        raise DataError.single(str(folder), message)
    for entry in os.scandir(folder):
        if entry.name.startswith((".", "__MACOSX")) or entry.name.lower() in _LITTER:
            continue
        if entry.is_dir():
            if entry.is_symlink() and folder.resolve().is_relative_to(Path(entry.path).resolve()):
                message = "is a link to a folder that it lies in; remove it"
                raise DataError.single(entry.path, message)
            yield from _files(folder / entry.name, f"{prefix}{entry.name}/")
        else:
            yield prefix + entry.name


@cache
def _formats() -> tuple[str, ...]:
    """Formats that are read."""
    # Only plain pixel formats: some other plugins of Pillow start programs (EPS runs Ghostscript).
    plain = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
    if _HAS_HEIF:
        import_module("pillow_heif").register_heif_opener()
    return (*plain, *(("AVIF",) if _HAS_AVIF else ()), *(("HEIF",) if _HAS_HEIF else ()))


def _open(data: bytes, path: Path, max_pixels: int) -> ImageFile.ImageFile:
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
    except Exception as error:  # as in read_rgb
        reader = _FTYP_READERS.get(data[8:12]) if data[4:8] == b"ftyp" else None
        unread = reader is not None and isinstance(error, UnidentifiedImageError)
        reason = f"is damaged, or of a kind that needs another package: {reader}"
        raise ImageError(path, reason if unread else _reason(error)) from error
    _require_size(image, path, max_pixels)
    return image


def _require_size(image: Image.Image, path: Path, max_pixels: int) -> None:
    if min(image.size) < 1:
        raise ImageError(path, f"has no pixels ({image.width} x {image.height})")
    if image.width * image.height > max_pixels:
        raise ImageError(
            path,
            f"has {image.width * image.height:,} pixels ({image.width} x {image.height}); allowed: "
            f"{max_pixels:,} (data.max_pixels)",
        )


_large = threading.Lock()


def _renew_lock() -> None:
    global _large
    _large = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)  # a thread of the parent may hold it


def _one_at_a_time(image: ImageFile.ImageFile) -> AbstractContextManager[object]:
    """Held while a large image is decoded, so that memory does not grow with the threads."""
    return _large if image.width * image.height > LARGE else nullcontext()


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"is not an image of a supported kind ({', '.join(_formats())}), or is damaged"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"is too large: {error}"
    return f"cannot be decoded: {error or type(error).__name__}"


def _box(size: tuple[int, int], shorter_side: int) -> tuple[int, int]:
    """Width and height that an image of this size is to fit into."""
    long = LONGEST * shorter_side
    return (long, shorter_side) if size[0] > size[1] else (shorter_side, long)


def _draft(image: Image.Image, box: tuple[int, int]) -> None:
    """Let libjpeg decode at 1/2, 1/4 or 1/8 where that is no less than what fits into the box."""
    scale = min(1.0, box[0] / image.width, box[1] / image.height)
    image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))


def _orientation(image: Image.Image) -> int:
    with suppress(Exception):  # a damaged EXIF block does not spoil the pixels
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # I;16 and its byte orders; I holds 16-bit PGM and TIFF
        values = np.clip(np.asarray(image, dtype=np.float32), 0, 65535) / 257  # 65535 / 257 = 255
        return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
