"""Training losses by name, on logits and soft targets.

Takes (B, C) logits and (B, C) target probabilities, gives a scalar mean over the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from experiment.config import closest
from experiment.errors import Problem


@dataclass(frozen=True)
class Loss:
    """One row of the table."""

    name: str
    doc: str
    activation: str
    function: Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-sum_c target_c log softmax(logits)_c, mean over the batch."""
    return functional.cross_entropy(logits, targets)


LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss("cross_entropy", "softmax cross-entropy with soft targets", "softmax", cross_entropy),
    )
}


def check_loss(name: str) -> Problem | None:
    """A problem where there is no such loss."""
    if name in LOSSES:
        return None
    near = closest(name, LOSSES)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return Problem("training.loss", f"got {name!r}; {hint}allowed: {', '.join(LOSSES)}")
