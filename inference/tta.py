"""Test-time augmentation: a model sees several views of an image, whose geometric mean counts.

Takes float images (B, 3, H, W) in [0, 1] on any device, gives views of the same shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from foldrace.core.errors import UserError, check_name
from foldrace.core.plugins import NO_PARTS, Parts, Table
from foldrace.trainables.losses import log_probs

View = Callable[[Tensor], Tensor]
_DEGREES = 15.0


def _plain(images: Tensor) -> Tensor:
    return images


def _flip(images: Tensor) -> Tensor:
    flipped: Tensor = functional.horizontal_flip(images)
    return flipped


def _rotate(images: Tensor) -> Tensor:
    """Counter-clockwise. What turns in from outside is the edge going on, as in training."""
    height, width = images.shape[-2:]
    sin = math.sin(math.radians(_DEGREES))
    margin = math.ceil(max(height, width) * sin / 2) + 1  # no less than a corner sticks out
    wide = functional.pad(images, [margin], padding_mode="edge")
    turned = functional.rotate(wide, _DEGREES, interpolation=InterpolationMode.BILINEAR)
    middle: Tensor = functional.center_crop(turned, [height, width])
    return middle


@dataclass(frozen=True)
class TTA:
    """One row of the table."""

    name: str
    doc: str
    views: tuple[View, ...]


TTAS = Table(
    TTA,
    "test-time augmentation",
    (
        TTA("none", "the image as it is", (_plain,)),
        TTA("flip", "as it is, and flipped horizontally", (_plain, _flip)),
        TTA("flip-rotate", "as it is, flipped, turned by 15 degrees", (_plain, _flip, _rotate)),
    ),
)


def find_tta(name: str, parts: Parts = NO_PARTS) -> TTA:
    """Raises UserError, with what is allowed, where there is none of that name."""
    problem = check_name("--tta", name, parts[TTAS])
    if problem is None:
        return parts[TTAS][name]
    raise UserError([problem])


class AveragedViews(nn.Module):
    """Model that gives the geometric mean of the views' probabilities, as logarithms in float32.

    (B, 3, H, W) images and (B, F) meta features, the same for each view -> (B, C).
    """

    def __init__(self, model: nn.Module, tta: TTA, activation: str) -> None:
        super().__init__()
        self._model, self._tta, self._activation = model, tta, activation

    def forward(self, images: Tensor, meta: Tensor) -> Tensor:
        """(B, C) log-probabilities of (B, 3, H, W) images."""
        views = [self._log_prob(self._view(view, images), meta) for view in self._tta.views]
        return torch.log_softmax(torch.stack(views).mean(dim=0), dim=-1)

    def _view(self, view: View, images: Tensor) -> Tensor:
        # Half precision would put a turned image's pixels in the wrong place.
        with torch.autocast(images.device.type, enabled=False):
            return view(images)

    def _log_prob(self, images: Tensor, meta: Tensor) -> Tensor:
        return log_probs(self._model(images, meta), self._activation)
