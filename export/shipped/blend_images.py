"""Image files to the pixels that an exported blend's models were trained on.

Takes the content of a file, gives a uint8 square and meta features. Lies beside `predict.py`, and
needs Pillow and numpy alone: pixels are those of training, where OpenCV resizes by area or
linearly, up to 1 of 255 in rounding.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Plain pixel formats: some other plugins of Pillow start programs."""
LONGEST = 4  # of a decoded image's longer side, in multiples of the bound of its shorter one
Image.MAX_IMAGE_PIXELS = 250_000_000  # Pillow refuses twice as many, in tiles and frames, too
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation -> what makes the image upright
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels

Pixels = NDArray[np.uint8]


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The file's content; ValueError where it is no regular file, or empty."""
    if not Path(path).is_file():
        raise ValueError("is no file" if os.path.lexists(path) else "does not exist")
    data = Path(path).read_bytes()
    if not data:
        raise ValueError("is empty (0 bytes)")
    return data


def decode(data: bytes, shorter_side: int, max_pixels: int) -> Pixels:
    """(height, width, 3) RGB, upright, on white, the shorter side at most `shorter_side` pixels.

    ValueError, or whatever Pillow raises, for what is no image.
    """
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]
    try:
        image = Image.open(io.BytesIO(data), formats=known)
    except UnidentifiedImageError as error:
        raise ValueError(f"is no image ({', '.join(known)}), or is damaged") from error
    if image.width * image.height > max_pixels:
        raise ValueError(f"has {image.width} x {image.height} pixels; allowed: {max_pixels:,}")
    box = _box(image, 2 * shorter_side)  # a JPEG is decoded at no less than twice the final size
    scale = min(1.0, box[0] / image.width, box[1] / image.height)
    image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
    rgb = _rgb(image)
    rgb.thumbnail(_box(rgb, shorter_side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    turn = _UPRIGHT.get(_orientation(image))
    return np.asarray(rgb if turn is None else rgb.transpose(turn))


def square(image: Pixels, size: int, resize: str) -> Pixels:
    """(size, size, 3): the image squashed, padded by its edge, or cropped in its middle."""
    height, width = image.shape[:2]
    if resize == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        image = image[top : top + side, left : left + side]
    if resize != "pad":
        return _scaled(image, size, size)
    inner = _scaled(image, *(max(1, round(size * n / max(height, width))) for n in (height, width)))
    free = [size - n for n in inner.shape[:2]]
    return np.pad(inner, [*((n // 2, n - n // 2) for n in free), (0, 0)], mode="edge")


def mean_colour(image: Pixels) -> tuple[float, ...]:
    """Mean red, green and blue, by ImageNet's mean and deviation."""
    colours = image.reshape(-1, 3).mean(axis=0) / 255
    return tuple((colours - _MEAN) / _STD)


def aspect_ratio(image: Pixels) -> tuple[float, ...]:
    """Logarithm of width / height."""
    return (math.log(image.shape[1] / image.shape[0]),)


META: dict[str, Callable[[Pixels], tuple[float, ...]]] = {
    "mean_colour": mean_colour,
    "aspect_ratio": aspect_ratio,
}
"""Numbers that a model may have beside the pixels, of the image before it is made square."""


Seen = tuple[Pixels, NDArray[np.float32]]
"""Square (S, S, 3) and meta features (F,) of one image."""


def model_inputs(data: bytes, forms: Sequence[Mapping[str, Any]]) -> list[Seen]:
    """What the models see of an image file's content, in each form.

    A form has shorter_side, max_pixels, size, resize and meta, as in `inputs` of the JSON file.
    """
    decoded: dict[int, Pixels] = {}
    found = []
    for form in forms:
        side = form["shorter_side"]
        if side not in decoded:
            decoded[side] = decode(data, side, form["max_pixels"])
        numbers = [number for name in form["meta"] for number in META[name](decoded[side])]
        meta = np.array(numbers, np.float32)
        found.append((square(decoded[side], form["size"], form["resize"]), meta))
    return found


def _box(image: Image.Image, shorter_side: int) -> tuple[int, int]:
    long = LONGEST * shorter_side
    return (long, shorter_side) if image.width > image.height else (shorter_side, long)


def _orientation(image: Image.Image) -> int:
    try:  # a damaged EXIF block does not spoil the pixels
        return int(image.getexif().get(0x0112, 1))
    except Exception:
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode.startswith("I"):  # 16 bits
        values = np.clip(np.asarray(image, dtype=np.float32), 0, 65535) / 257
        return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _scaled(image: Pixels, height: int, width: int) -> Pixels:
    """As OpenCV: by area where the image shrinks in both directions, else linearly."""
    old = image.shape[:2]
    shrinks = old[0] > height or old[1] > width
    by_area = old[0] >= height and old[1] >= width
    way = _area if by_area and shrinks else _area_linear if shrinks else _linear
    rows, columns = way(old[0], height), way(old[1], width)
    wide = rows @ image.reshape(old[0], -1).astype(np.float32)
    found = columns @ wide.reshape(height, old[1], 3)
    return np.asarray(np.clip(np.floor(found + 0.5), 0, 255), np.uint8)


def _area(old: int, new: int) -> NDArray[np.float32]:
    """(new, old): the share of each old pixel in each new one."""
    edges = np.arange(new + 1) * (old / new)
    left, right = np.maximum(edges[:-1, None], np.arange(old)), edges[1:, None]
    shares = np.clip(np.minimum(right, np.arange(old) + 1.0) - left, 0, None)
    return np.asarray(shares / shares.sum(axis=1, keepdims=True), np.float32)


def _linear(old: int, new: int) -> NDArray[np.float32]:
    return _two_taps((np.arange(new) + 0.5) * (old / new) - 0.5, old)


def _area_linear(old: int, new: int) -> NDArray[np.float32]:
    """Area resizing where one direction grows: OpenCV mixes the two nearest pixels by area."""
    start = np.floor(np.arange(new) * (old / new))
    share = (np.arange(new) + 1) - (start + 1) * (new / old)
    return _two_taps(start + np.where(share <= 0, 0.0, share - np.floor(share)), old)


def _two_taps(places: NDArray[np.floating], old: int) -> NDArray[np.float32]:
    """(new, old): two neighbours each, by their distance from a place."""
    places = np.clip(places, 0, old - 1)
    taps = 1.0 - np.abs(places[:, None] - np.arange(old))
    return np.asarray(np.clip(taps, 0, None), np.float32)
