"""Whose pretrained weights a model was trained from, and under which licence.

Takes a backbone and `training.pretrained`, gives what timm's or torchvision's own metadata say.
"""

from __future__ import annotations

from dataclasses import dataclass

import timm
from torchvision.models import get_model_weights


@dataclass(frozen=True)
class WeightsLicense:
    """The source of one backbone's first weights."""

    backbone: str
    weights: str
    """A name at the hub, a URL, the user's file, or that there were none."""
    license: str
    """As the metadata say it; `unknown` where they do not."""
    origin: str = ""
    """Where the authors publish them."""


def weights_license(backbone: str, pretrained: bool | str) -> WeightsLicense:
    """The licence of a backbone's first weights; `pretrained` as in `training.pretrained`."""
    family, _, name = backbone.partition("/")
    if pretrained is False:
        return WeightsLicense(backbone, "none: trained from scratch", "none needed")
    if isinstance(pretrained, str):
        return WeightsLicense(backbone, f"the user's file {pretrained}", "unknown")
    if family == "timm":
        return _of_timm(backbone, name)
    if family == "torchvision":
        weights = get_model_weights(name).DEFAULT
        origin = str(weights.meta.get("recipe", ""))
        return WeightsLicense(backbone, weights.url, "BSD-3-Clause (torchvision)", origin)
    return WeightsLicense(backbone, "a plugin's", "unknown")


def _of_timm(backbone: str, name: str) -> WeightsLicense:
    config = timm.get_pretrained_cfg(name)
    if config is None:
        return WeightsLicense(backbone, "unknown", "unknown")
    place = config.hf_hub_id or config.url or "unknown"
    return WeightsLicense(
        backbone, str(place), config.license or "unknown", config.origin_url or ""
    )
