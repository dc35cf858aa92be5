"""Optimisers that are rows of a table: torch's own, and those of plugins.

Takes parameter groups with their learning rates and weight decays, gives a torch optimiser.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Group = dict[str, Any]  # torch's own form of a parameter group


@dataclass(frozen=True)
class Optimizer:
    """One row of the table."""

    name: str
    doc: str
    source: str
    build: Callable[[list[Group], float, float], torch.optim.Optimizer]
    """(groups, lr, momentum) -> optimiser; a group's own `lr` and `weight_decay` count."""


OPTIMIZERS: dict[str, Optimizer] = {
    row.name: row
    for row in (
        Optimizer(
            "adamw", "Adam with decoupled weight decay; momentum is its first beta",
            "Loshchilov and Hutter, Decoupled Weight Decay Regularization, ICLR 2019",
            lambda groups, lr, momentum: torch.optim.AdamW(
                groups, lr=lr, betas=(momentum, 0.999), fused=True
            ),
        ),
        Optimizer(
            "sgd", "stochastic gradient descent with Nesterov's momentum",
            "Sutskever, Martens, Dahl and Hinton, On the importance of initialization and "
            "momentum in deep learning, ICML 2013",
            lambda groups, lr, momentum: torch.optim.SGD(
                groups, lr=lr, momentum=momentum, nesterov=momentum > 0
            ),
        ),
    )
}  # fmt: skip
