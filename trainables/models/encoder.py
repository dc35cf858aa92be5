"""A backbone without its classifier, with the normalisation that stands in front of it.

Every backbone family builds one; nothing outside needs to know a mean and a deviation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_POOLED_NORMS = frozenset({"classifier.0", "head.norm", "fc_norm"})  # after the pooling


@dataclass(frozen=True)
class Encoder:
    """A backbone without its classifier: from images in [0, 1] to pooled features."""

    module: nn.Module
    """Takes what `normalise` gives, gives (B, features)."""
    features: int
    """Number of pooled features."""
    normalise: nn.Module
    """Takes (B, 3, H, W) images in [0, 1], gives the backbone's own input."""


class Normalise(nn.Module):
    """(B, 3, H, W) images in [0, 1] -> the same shape, zero mean and unit deviation a channel."""

    mean: Tensor  # (1, 3, 1, 1)
    std: Tensor  # (1, 3, 1, 1)

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", _channels(mean), persistent=False)
        self.register_buffer("std", _channels(std), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images, in memory as they came."""
        return (images - _planes(self.mean, images)) / _planes(self.std, images)


def drop_final_norm(module: nn.Module) -> None:
    """Leave out the layer norm of the pooled features that ends some backbones.

    These are torchvision's and timm's ConvNeXt, and timm's ViTs with average pooling.
    """
    weighted = [name for name, m in module.named_modules() if list(m.parameters(recurse=False))]
    last = weighted[-1]
    if last in _POOLED_NORMS and isinstance(module.get_submodule(last), nn.LayerNorm):
        module.set_submodule(last, nn.Identity())


def _planes(channels: Tensor, images: Tensor) -> Tensor:
    """(1, 3, 1, 1) -> (1, 3, H, W), in memory as the images are.

    Broadcasting along an innermost dimension of 3 would take ten times as long.
    """
    planes = channels.expand(1, -1, *images.shape[2:])
    if images.is_contiguous():
        return planes.contiguous()
    return planes.contiguous(memory_format=torch.channels_last)


def _channels(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1)
