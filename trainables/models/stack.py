"""Several backbones as one: `stack(timm/a,timm/b@336)`, pooled features side by side.

Takes such a name, gives its members; takes their encoders, gives one encoder. A member with `@size`
gets the images resized to it, the others get them as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from foldrace.trainables.models.encoder import Encoder

_SMALLEST, _LARGEST = 16, 2048  # pixels, as of training.image_size
_FORM = "stack(<backbone>,<backbone>@<size>,...)"


@dataclass(frozen=True)
class StackMember:
    """A backbone, and the image size of its own where it has one."""

    backbone: str
    image_size: int | None


def is_stack(name: str) -> bool:
    """True where the name is meant as a stack, well written or not."""
    return re.match(r"\s*stack\s*\(", name) is not None


def members(name: str) -> tuple[StackMember, ...]:
    """The members of a well-formed stack; a plain backbone is its own only member."""
    if not is_stack(name):
        return (StackMember(name, None),)
    found = (text.partition("@") for text in _texts(name))
    return tuple(StackMember(backbone, int(size) if size else None) for backbone, _, size in found)


def check_form(name: str) -> str | None:
    """The fault in the form of a stack's name, or None, whether or not its members exist."""
    plain = re.sub(r"\s+", "", name)
    if not plain.endswith(")"):
        return (
            f"should look like {_FORM}, but does not end with a bracket; in a YAML list in "
            'brackets put the name in quotes: ["stack(timm/a,timm/b)"]'
        )
    if plain != name:
        return f"should be written without spaces: {plain}"
    texts = _texts(name)
    if any(bracket in text for text in texts for bracket in "()"):
        return f"has brackets inside; a stack holds no stacks: {_FORM}"
    if len(texts) < 2 or not all(texts):
        return f"should have two or more members: {_FORM}"
    repeated = [text for text in dict.fromkeys(texts) if texts.count(text) > 1]
    if repeated:
        return f"has {repeated[0]} twice"
    wrong = [text for text in texts if not _has_sound_size(text)]
    if wrong:
        return f"{wrong[0]}: the size should be from {_SMALLEST} to {_LARGEST} pixels"
    return None


def _texts(name: str) -> list[str]:
    return name.removeprefix("stack(").removesuffix(")").split(",")


def _has_sound_size(text: str) -> bool:
    _, at, size = text.partition("@")
    return not at or (bool(re.fullmatch("[0-9]{1,4}", size)) and _SMALLEST <= int(size) <= _LARGEST)


class Stack(nn.Module):
    """(B, 3, H, W) images in [0, 1] -> (B, sum of the members' features)."""

    def __init__(self, encoders: Sequence[Encoder], image_sizes: Sequence[int | None]) -> None:
        super().__init__()
        self.members = nn.ModuleList(each.module for each in encoders)
        self.normalise = nn.ModuleList(each.normalise for each in encoders)
        self.image_sizes = tuple(image_sizes)

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features of all members, side by side."""
        parts = zip(self.members, self.normalise, self.image_sizes, strict=True)
        pooled = [member(norm(_resized(images, size))) for member, norm, size in parts]
        return torch.cat(pooled, dim=1)


def stack_encoders(encoders: Sequence[Encoder], image_sizes: Sequence[int | None]) -> Encoder:
    """Make one encoder of several; each normalises for itself."""
    features = sum(each.features for each in encoders)
    return Encoder(Stack(encoders, image_sizes), features, nn.Identity())


def _resized(images: Tensor, size: int | None) -> Tensor:
    if size is None or images.shape[-2:] == (size, size):
        return images
    return functional.interpolate(images, (size, size), mode="bilinear", antialias=True)
