"""Images as large as photos and as hard to compress: noise of several octaves under polygons.

Takes a folder and a count, gives a folder per class of JPEGs of 500 px and 55 to 70 kB.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

_CLASSES = 10
_SIDE = 500  # pixels, the longer one
_OCTAVES = range(2, 8)
_QUALITY = 90


def write_photos(folder: Path, count: int) -> list[Path]:
    """The files, in the order in which they were made."""
    rng = np.random.default_rng(0)
    files = []
    for i in range(count):
        file = folder / f"class{i % _CLASSES}" / f"{i:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        shorter = int(rng.integers(333, _SIDE + 1))
        shape = (shorter, _SIDE) if rng.random() < 0.8 else (_SIDE, shorter)
        Image.fromarray(_photo(rng, *shape)).save(file, quality=_QUALITY)
        files.append(file)
    return files


def _photo(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    image = np.full((height, width, 3), rng.uniform(60, 180, 3), np.float32)
    for octave in _OCTAVES:
        noise = rng.normal(size=(2**octave, 2**octave, 3)).astype(np.float32)
        layer = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
        image += layer * (90 / 2 ** (0.55 * octave))
    for _ in range(12):
        corners = rng.random((rng.integers(3, 7), 2)) * 0.4 + rng.uniform(0, 0.7, 2)
        points = (corners * (width, height)).astype(np.int32)
        cv2.fillPoly(image, [points], rng.uniform(0, 255, 3).tolist(), lineType=cv2.LINE_AA)
    image += rng.normal(size=(height, width, 1)).astype(np.float32) * 3  # a sensor's grain
    return np.clip(image, 0, 255).astype(np.uint8)
