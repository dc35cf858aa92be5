"""The exponential moving average of a model's weights, updated after every optimiser step."""

from __future__ import annotations

from timm.utils import ModelEmaV3
from torch import nn


def build_ema(model: nn.Module, decay: float) -> ModelEmaV3 | None:
    """None where `decay` is 0. The decay warms up as 1 - (1 + updates)^(-2/3), so that the
    average forgets the initial weights also in short runs."""
    if decay <= 0:
        return None
    return ModelEmaV3(model, decay=decay, use_warmup=True)
