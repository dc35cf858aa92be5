"""The square that a model sees of an image of any shape: squashed, padded or cropped.

Takes uint8 images, gives them as they are scored, and the frames in which training draws its crops.
`how` is a value of `training.resize`.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]  # (height, width, 3) RGB


def resize(images: list[Image], size: int, how: str = "squash") -> Image:
    """(n, size, size, 3) uint8: what each image's frame shows."""
    fit = {"squash": _squashed, "pad": _padded, "crop": _cropped}[how]
    out = np.empty((len(images), size, size, 3), np.uint8)
    for i, image in enumerate(images):
        out[i] = fit(image, size)
    return out


def frames(shapes: NDArray[np.int64], how: str) -> NDArray[np.float64]:
    """(n, 4): left, top, width and height of what is scored, in pixels of the image.

    The whole image, or a square in its middle: around it (pad) or within it (crop). `shapes`
    (n, 2): height and width.
    """
    height, width = shapes.T
    if how == "squash":
        frame_h, frame_w = height, width
    else:
        frame_h = frame_w = shapes.max(axis=1) if how == "pad" else shapes.min(axis=1)
    return np.column_stack([(width - frame_w) / 2, (height - frame_h) / 2, frame_w, frame_h])


def _squashed(image: Image, size: int) -> Image:
    return _scaled(image, size, size)


def _padded(image: Image, size: int) -> Image:
    """The whole image; its edge goes on beyond it, as it does around what training has turned."""
    longer = max(image.shape)
    height, width = (max(1, round(size * side / longer)) for side in image.shape[:2])
    top, left = (size - height) // 2, (size - width) // 2
    bottom, right = size - height - top, size - width - left
    inner = _scaled(image, width, height)
    padded = cv2.copyMakeBorder(inner, top, bottom, left, right, cv2.BORDER_REPLICATE)
    return np.asarray(padded, np.uint8)


def _cropped(image: Image, size: int) -> Image:
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return _scaled(image[top : top + side, left : left + side], size, size)


def _scaled(image: Image, width: int, height: int) -> Image:
    shrinks = image.shape[0] > height or image.shape[1] > width
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (width, height), interpolation=method), np.uint8)
