"""Sharpness-aware minimisation: the gradient is taken where the loss is worst nearby.

Takes an optimiser whose parameters hold gradients, moves the weights there and back. Foret,
Kleiner, Mobahi and Neyshabur, Sharpness-Aware Minimization for Efficiently Improving
Generalization, ICLR 2021. pytorch-optimizer's SAM builds its base optimiser itself, keeps the old
weights in that one's state and cannot go back without a step; so the tests compare with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import get_total_norm


class SharpnessAware:
    """Around any optimiser, for one update:

    gradients at the weights; `perturb()`; gradients again, inside `kept_statistics(model)`;
    `restore()`; the optimiser's own step. With bf16 or fp32 only: fp16 scales gradients.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rho: float) -> None:
        self._optimizer, self._rho = optimizer, rho
        self._moved: list[Tensor] = []
        self._before: list[Tensor] = []

    @torch.no_grad()
    def perturb(self) -> None:
        """Weights w -> w + rho g / |g|, the norm over all gradients; the gradients are cleared."""
        groups = self._optimizer.param_groups
        self._moved = [p for group in groups for p in group["params"] if p.grad is not None]
        self._before = [p.clone() for p in self._moved]
        gradients = [p.grad for p in self._moved if p.grad is not None]
        scale = self._rho / (get_total_norm(gradients) + 1e-12)
        torch._foreach_add_(self._moved, torch._foreach_mul(gradients, scale))
        self._optimizer.zero_grad()

    @torch.no_grad()
    def restore(self) -> None:
        """The weights before `perturb`, bit for bit; also after an error in between."""
        if self._moved:
            torch._foreach_copy_(self._moved, self._before)
        self._moved, self._before = [], []


@contextmanager
def kept_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, batch norms normalise by the batch but do not learn from it: an image is counted
    once an update, and at the weights that it is scored with."""
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _NormBase) and module.training and module.track_running_stats
    ]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
