"""Our own transforms, for what the libraries do not have: one record of arguments each.

A transform is made from its arguments (checked), takes a uint8 RGB image and a generator, and
gives a uint8 RGB image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import cv2
import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from foldrace.core.plugins import Table
from foldrace.trainables.data.framing import Image


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError("should be odd, so that the kernel has a centre")
    return value


class CustomTransform(BaseModel):
    """Base of the transforms; `p` is the probability that an image is changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    p: Annotated[float, Field(ge=0, le=1)] = 0.5

    def __call__(self, image: Image, rng: np.random.Generator) -> Image:
        """The image, changed with probability `p`."""
        return self.apply(image, rng) if rng.random() < self.p else image

    def apply(self, image: Image, rng: np.random.Generator) -> Image:
        """The changed image, a new array."""
        raise NotImplementedError


class UnsharpMask(CustomTransform):
    """image + amount · (image − blurred), where the two differ by `threshold` at least."""

    kernel: Annotated[int, Field(ge=1, le=99), AfterValidator(_odd)] = 7
    """Pixels: side of the Gaussian kernel."""
    sigma: Annotated[float, Field(gt=0, le=50)] = 1.5
    amount: Annotated[float, Field(ge=0, le=10)] = 1.5
    threshold: Annotated[float, Field(ge=0, le=255)] = 0.0

    def apply(self, image: Image, rng: np.random.Generator) -> Image:
        """The sharpened image."""
        blurred = cv2.GaussianBlur(image, (self.kernel, self.kernel), self.sigma)
        sharp = cv2.addWeighted(image, 1.0 + self.amount, blurred, -self.amount, 0.0)
        if self.threshold == 0:
            return np.asarray(sharp, np.uint8)
        return np.where(cv2.absdiff(image, blurred) < self.threshold, image, sharp)


@dataclass(frozen=True)
class CustomTransformRow:
    """One row of the table. `make(**arguments)` raises ValueError where an argument is wrong."""

    name: str
    doc: str
    make: Callable[..., CustomTransform]


CUSTOM = Table(
    CustomTransformRow,
    "custom transform",
    (
        CustomTransformRow(
            "UnsharpMask", "sharpens; albumentations' own refuses an amount above 1", UnsharpMask
        ),
    ),
)
