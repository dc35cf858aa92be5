"""Backbones and image size for images that nobody has written a config for.

Takes device, median side, number of images and whether pretrained weights can be had; gives a row
of one table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Device = Literal["cpu", "gpu"]


@dataclass(frozen=True)
class BackboneChoice:
    """One row: images of this kind are trained at this size on these backbones."""

    device: Device
    pretrained: bool
    """True: the backbones have weights on the hub."""
    most_side: float
    """Largest median of the images' shorter sides that the row is for, in pixels."""
    least_images: int
    image_size: int
    """Side of the square that the models see, in pixels."""
    backbones: tuple[str, ...]
    """From small to large: those that are too slow for the time are left out later."""


_ANY = float("inf")
_TINY = ("timm/test_resnet", "timm/test_efficientnet", "timm/resnet10t")
_SMALL = ("timm/resnet10t", "timm/resnet18", "timm/resnet26d")
_MIDDLE = ("timm/resnet18", "timm/resnet34d", "timm/convnext_femto", "timm/resnet50d")
_LIGHT = (
    "timm/mobilenetv3_small_100.lamb_in1k",
    "timm/efficientnet_lite0.ra_in1k",
    "timm/resnet18.a1_in1k",
)
_LIGHT_GPU = (
    "timm/resnet18.a1_in1k",
    "timm/efficientnet_b0.ra_in1k",
    "timm/convnext_nano.in12k_ft_in1k",
)
_LARGE_GPU = (
    "timm/convnext_nano.in12k_ft_in1k",
    "timm/tf_efficientnetv2_s.in21k_ft_in1k",
    "timm/convnext_tiny.in12k_ft_in1k",
    "timm/vit_small_patch16_224.augreg_in21k_ft_in1k",
)

# The first row that fits counts: within a device and kind of weights, small images come first.
CHOICES: tuple[BackboneChoice, ...] = (
    BackboneChoice("cpu", False, 40, 0, 32, _TINY),
    BackboneChoice("cpu", False, 160, 0, 48, _TINY),
    BackboneChoice("cpu", False, _ANY, 0, 64, _TINY),
    BackboneChoice("cpu", True, 40, 0, 64, _LIGHT),
    BackboneChoice("cpu", True, 100, 0, 96, _LIGHT),
    BackboneChoice("cpu", True, _ANY, 0, 128, _LIGHT),
    BackboneChoice("gpu", False, 40, 0, 32, _SMALL),
    BackboneChoice("gpu", False, 100, 10_000, 64, _MIDDLE),
    BackboneChoice("gpu", False, 100, 0, 64, _SMALL),
    BackboneChoice("gpu", False, _ANY, 10_000, 128, _MIDDLE),
    BackboneChoice("gpu", False, _ANY, 0, 128, _SMALL),
    BackboneChoice("gpu", True, 48, 0, 96, _LIGHT_GPU),
    BackboneChoice("gpu", True, 100, 0, 160, _LIGHT_GPU),
    BackboneChoice("gpu", True, _ANY, 0, 224, _LARGE_GPU),
)
"""A first table, chosen by hand. This is the one place to change."""


def choose_backbones(device: Device, side: float, images: int, pretrained: bool) -> BackboneChoice:
    """The row for images of this median shorter `side` (px) and number."""
    return next(
        row
        for row in CHOICES
        if (row.device, row.pretrained) == (device, pretrained)
        and side <= row.most_side
        and images >= row.least_images
    )
