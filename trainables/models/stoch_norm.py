"""Batch norms that in training take moving statistics for some channels, the batch's for others.

Takes a model, changes the class of its batch norms of images: their weights keep their names, and
in evaluation they are what they were. Kou, You, Long and Wang, Stochastic Normalization, NeurIPS
2020: in fine-tuning it spares small data sets the overfitting to batch statistics.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional


class StochNorm2d(nn.BatchNorm2d):
    """A batch norm; `share` is the probability that a channel takes moving statistics."""

    share: float

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) normalised."""
        return _mixed(self, self.share, input, super().forward, lambda x: x)


class StochNormAct2d(BatchNormAct2d):
    """The same of timm's batch norm with an activation."""

    share: float

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) normalised and activated."""
        return _mixed(self, self.share, x, super().forward, lambda x: self.act(self.drop(x)))


_STOCHASTIC: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: StochNorm2d,
    BatchNormAct2d: StochNormAct2d,
}


def _mixed(
    norm: nn.BatchNorm2d,
    share: float,
    x: Tensor,
    by_batch: Callable[[Tensor], Tensor],
    after: Callable[[Tensor], Tensor],
) -> Tensor:
    """Moving statistics, those before this batch, in a drawn share of the channels."""
    if not norm.training or norm.running_mean is None or norm.running_var is None:
        return by_batch(x)
    before = norm.running_mean.clone(), norm.running_var.clone()  # `by_batch` changes them
    drawn = torch.rand(norm.num_features, device=x.device) < share
    batch = by_batch(x)
    moving = functional.batch_norm(x, *before, norm.weight, norm.bias, eps=norm.eps)
    return torch.where(drawn[:, None, None], after(moving), batch)


def make_stochastic(model: nn.Module, share: float) -> int:
    """Let the batch norms of a model take moving statistics with probability `share` a channel.

    The number of norms that do.
    """
    norms = [module for module in model.modules() if type(module) in _STOCHASTIC]
    for norm in norms:
        norm.__class__ = _STOCHASTIC[type(norm)]
        norm.share = share  # type: ignore[assignment]
    return len(norms)
