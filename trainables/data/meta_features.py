"""Numbers about an image beside its pixels, joined to the features that a backbone finds.

Takes the stored image, before any augmentation and of any shape, gives a vector; every number is
brought to about zero mean and unit deviation by fixed constants, so that nothing is fitted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from foldrace.core.errors import Problem, check_name
from foldrace.core.plugins import NO_PARTS, Parts, Table

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Red, green and blue of ImageNet's pixels in [0, 1], taken where no other statistics are known."""


@dataclass(frozen=True)
class MetaFeature:
    """One row of the table."""

    name: str
    doc: str
    width: int
    compute: Callable[[NDArray[np.uint8]], tuple[float, ...]]
    """(H, W, 3) uint8 RGB -> `width` numbers."""


def _mean_colour(image: NDArray[np.uint8]) -> tuple[float, ...]:
    colours = zip(cv2.mean(image)[:3], IMAGENET_MEAN, IMAGENET_STD, strict=True)
    return tuple((colour / 255 - mean) / std for colour, mean, std in colours)


def _aspect_ratio(image: NDArray[np.uint8]) -> tuple[float, ...]:
    height, width = image.shape[:2]
    return (math.log(width / height),)


META_FEATURES = Table(
    MetaFeature,
    "meta feature",
    (
        MetaFeature("mean_colour", "mean red, green and blue", 3, _mean_colour),
        MetaFeature("aspect_ratio", "logarithm of width / height", 1, _aspect_ratio),
    ),
)


def meta_width(names: Iterable[str], parts: Parts = NO_PARTS) -> int:
    """Number of numbers that these features have together."""
    return sum(parts[META_FEATURES][name].width for name in names)


def meta_vectors(
    images: Sequence[NDArray[np.uint8]], names: Sequence[str], parts: Parts = NO_PARTS
) -> NDArray[np.float32]:
    """(B, F): one row per image, the features side by side; F is 0 without names."""
    computes = [parts[META_FEATURES][name].compute for name in names]
    vectors = np.empty((len(images), meta_width(names, parts)), np.float32)
    if computes:
        vectors[:] = [[x for compute in computes for x in compute(image)] for image in images]
    return vectors


def check_meta(names: Sequence[str], parts: Parts = NO_PARTS) -> list[Problem]:
    """A problem for each name that is unknown or given twice."""
    where = "training.meta_features"
    problems = [
        Problem(where, f"{name} is given twice")
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    unknown = (check_name(where, name, parts[META_FEATURES]) for name in dict.fromkeys(names))
    return [*problems, *(problem for problem in unknown if problem is not None)]
