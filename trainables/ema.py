"""The exponential moving average of a model's weights, updated after every optimiser step."""

from __future__ import annotations

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import nn


def build_ema(model: nn.Module, decay: float) -> ModelEmaV3 | None:
    """None where `decay` is 0. After u updates the decay is 1 - u^(-2/3), at most `decay`: the
    first update copies the weights, so that short runs do not keep the initial ones."""
    return _Average(model, decay) if decay > 0 else None


class _Average(ModelEmaV3):
    """timm's, but the tensors are looked up once: a walk through two state dicts at every update
    takes several times as long as the averaging."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, decay=decay, use_warmup=True)
        own, given = self.module.state_dict().values(), model.state_dict().values()
        pairs = list(zip(own, given, strict=True))
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """`model` is the one that this was built for, on the device where it was then."""
        if self._averaged:
            own, given = zip(*self._averaged, strict=True)
            torch._foreach_lerp_(own, given, 1.0 - decay)
        if self._copied:
            own, given = zip(*self._copied, strict=True)
            torch._foreach_copy_(own, given)
