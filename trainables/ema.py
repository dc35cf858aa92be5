"""The exponential moving average of a model's weights, updated after every optimiser step."""

from __future__ import annotations

from timm.utils.model_ema import ModelEmaV3
from torch import nn


def build_ema(model: nn.Module, decay: float) -> ModelEmaV3 | None:
    """None where `decay` is 0. After u updates the decay is 1 - u^(-2/3), at most `decay`: the
    first update copies the weights, so that short runs do not keep the initial ones."""
    if decay <= 0:
        return None
    return ModelEmaV3(model, decay=decay, use_warmup=True)
