"""How a classifier's logits become log-probabilities; each training loss goes with one of these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Activation:
    """One row of the table; both functions of (B, C) logits."""

    name: str
    doc: str
    log_probs: Callable[[Tensor], Tensor]
    """Natural logarithms of probabilities that sum to 1 in each row."""
    trained: Callable[[Tensor], Tensor]
    """What the losses train: a distribution over the classes, or one of two outcomes a class."""


def _softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=1)


def _sigmoid(logits: Tensor) -> Tensor:
    """p_c = sigmoid(z_c) / sum_j sigmoid(z_j): binary cross-entropy trains each class by itself."""
    return torch.log_softmax(functional.logsigmoid(logits), dim=1)


ACTIVATIONS: dict[str, Activation] = {
    activation.name: activation
    for activation in (
        Activation(
            "softmax", "classes compete: cross-entropy and its kin",
            _softmax, lambda logits: torch.softmax(logits, dim=1),
        ),
        Activation(
            "sigmoid", "one sigmoid a class, normalised: binary cross-entropy",
            _sigmoid, torch.sigmoid,
        ),
    )
}  # fmt: skip


def log_probs(logits: Tensor, activation: str) -> Tensor:
    """(B, C) logits of any float type -> (B, C) natural-log probabilities in float32."""
    return ACTIVATIONS[activation].log_probs(logits.float())
