"""Test-time augmentation: a model sees several views of an image, whose geometric mean counts.

Takes float images (B, 3, H, W) in [0, 1] on any device, gives views of the same shape. Which views:
a row of the table, or a list of one's own such as `flip,scale:1.15,rotate:10`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from foldrace.core.errors import Problem, UserError, check_name
from foldrace.core.plugins import NO_PARTS, Parts, Table
from foldrace.trainables.losses import log_probs

View = Callable[[Tensor], Tensor]
_DEGREES = 15.0
_SCALES = (0.87, 1.15)  # each about the inverse of the other
_MOST_VIEWS = 16


def _plain(images: Tensor) -> Tensor:
    return images


def _flip(images: Tensor) -> Tensor:
    flipped: Tensor = functional.horizontal_flip(images)
    return flipped


def _flip_vertical(images: Tensor) -> Tensor:
    flipped: Tensor = functional.vertical_flip(images)
    return flipped


def _rotate(images: Tensor, degrees: float) -> Tensor:
    """Counter-clockwise. What turns in from outside is the edge going on, as in training."""
    height, width = images.shape[-2:]
    sin = abs(math.sin(math.radians(min(abs(degrees), 90.0))))
    margin = math.ceil(max(height, width) * sin / 2) + 1  # no less than a corner sticks out
    wide = functional.pad(images, [margin], padding_mode="edge")
    turned = functional.rotate(wide, degrees, interpolation=InterpolationMode.BILINEAR)
    return _middle(turned, height, width)


def _scale(images: Tensor, factor: float) -> Tensor:
    """Enlarged about its centre, or made smaller, with its edge going on around it."""
    height, width = images.shape[-2:]
    sides = [max(1, round(height * factor)), max(1, round(width * factor))]
    scaled: Tensor = functional.resize(
        images, sides, interpolation=InterpolationMode.BILINEAR, antialias=True
    )
    rows, columns = max(0, height - sides[0]), max(0, width - sides[1])
    # Left, top, right, bottom: as much on either side as goes.
    around = [columns // 2, rows // 2, columns - columns // 2, rows - rows // 2]
    return _middle(functional.pad(scaled, around, padding_mode="edge"), height, width)


def _middle(images: Tensor, height: int, width: int) -> Tensor:
    middle: Tensor = functional.center_crop(images, [height, width])
    return middle.clamp(0.0, 1.0)


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
        TTA(
            "flip-rotate", "as it is, flipped, turned by 15 degrees",
            (_plain, _flip, partial(_rotate, degrees=_DEGREES)),
        ),
        TTA(
            "multi-scale", "as it is, at 0.87 and at 1.15 of its size",
            (_plain, *(partial(_scale, factor=factor) for factor in _SCALES)),
        ),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class _Kind:
    """A view that a list may name, with its number where it takes one."""

    view: Callable[..., Tensor]
    least: float = 0.0
    most: float = 0.0
    form: str = ""
    """How it is written, where it takes a number."""


_KINDS = {
    "flip": _Kind(_flip),
    "flip-vertical": _Kind(_flip_vertical),
    "rotate": _Kind(_rotate, -180.0, 180.0, "rotate:DEGREES (-180 to 180)"),
    "scale": _Kind(_scale, 0.5, 2.0, "scale:FACTOR (0.5 to 2)"),
}
_ALLOWED = ", ".join(kind.form or name for name, kind in _KINDS.items())


def find_tta(name: str, parts: Parts = NO_PARTS) -> TTA:
    """The row of that name, or the views of a list: the image as it is, and each that it names.

    Raises UserError, with what is allowed, where there is none of that name.
    """
    if name not in parts[TTAS] and ("," in name or ":" in name):
        return _listed(name)
    problem = check_name("--tta", name, parts[TTAS])
    if problem is None:
        return parts[TTAS][name]
    hint = f"; or a list of views such as flip,scale:1.15 of {_ALLOWED}"
    raise UserError([Problem(problem.where, problem.message + hint)])


def _listed(text: str) -> TTA:
    """The views of a list; UserError with all that is wrong with it."""
    items = [item.strip() for item in text.split(",")]
    problems = [Problem("--tta", message) for item in items if (message := _fault(item))]
    if len(set(items)) < len(items):
        problems.append(Problem("--tta", f"{text!r} names a view twice; name each once"))
    if len(items) >= _MOST_VIEWS:
        message = f"{len(items)} views; allowed: at most {_MOST_VIEWS - 1} beside the image itself"
        problems.append(Problem("--tta", message))
    if problems:
        raise UserError(problems)
    return TTA(",".join(items), "a list of one's own", (_plain, *map(_view, items)))


def _fault(item: str) -> str | None:
    name, colon, number = item.partition(":")
    kind = _KINDS.get(name)
    if kind is None:
        return f"knows no view {item!r}; allowed: {_ALLOWED}"
    if not kind.form:
        return f"{item!r}: {name} takes no number" if colon else None
    if not re.fullmatch(r"[+-]?[0-9]{1,6}(\.[0-9]{1,6})?", number):
        return f"{item!r}: give it a number; allowed: {kind.form}"
    if not kind.least <= float(number) <= kind.most:
        return f"{item!r} is out of its limits; allowed: {kind.form}"
    return None


def _view(item: str) -> View:
    name, _, number = item.partition(":")
    kind = _KINDS[name]
    return partial(kind.view, **{_NUMBERS[name]: float(number)}) if kind.form else kind.view


_NUMBERS = {"rotate": "degrees", "scale": "factor"}


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
