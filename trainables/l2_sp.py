"""A pull of the backbone's weights towards the pretrained ones, in place of weight decay.

Takes a classifier with its initial weights and its optimiser, changes the weights after each step.
Li, Grandvalet and Davoine, Explicit Inductive Bias for Transfer Learning with Convolutional
Networks, ICML 2018: the penalty strength / 2 · |w − w0|², here decoupled from the optimiser's
gradients as AdamW's weight decay is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foldrace.trainables.optimizers import in_backbone, without_decay


class StartingPoint:
    """A copy of the backbone's initial weights, as far as weight decay would act on them.

    It is no part of a saved state: a trial that goes on has the same initial weights again.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, strength: float) -> None:
        self._optimizer, self._strength = optimizer, strength
        free = without_decay(model)
        pulled = {p for n, p in model.named_parameters() if in_backbone(n) and n not in free}
        self._weights: list[list[Tensor]] = [
            [p for p in group["params"] if p in pulled] for group in optimizer.param_groups
        ]
        self._starts = [[p.detach().clone() for p in group] for group in self._weights]

    @torch.no_grad()
    def pull(self) -> None:
        """Take lr · strength · (w − w0) off each weight, at its group's own rate.

        Frozen weights are w0 already, and stay so bit for bit.

        torch's `_foreach` functions are private, but its own optimisers use them too.
        """
        groups = zip(self._optimizer.param_groups, self._weights, self._starts, strict=True)
        for group, weights, starts in groups:
            if weights:
                torch._foreach_lerp_(weights, starts, float(group["lr"]) * self._strength)
