"""Classifier heads by name.

A head takes pooled features (and meta features, where there are some), gives class logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from foldrace.core.plugins import Table

_HIDDEN = 512  # of the mlp head
_EPS = 1e-6  # as in ConvNeXt (Liu et al., A ConvNet for the 2020s, CVPR 2022)


@dataclass(frozen=True)
class Head:
    """One row of the table."""

    name: str
    doc: str
    build: Callable[[int, int, float], nn.Module]
    """(features, classes, dropout) -> a module from (B, features) to (B, classes)."""
    norms_features: bool = False
    """True: it begins with a norm, and the backbone's own last norm is left out."""


def _linear(features: int, classes: int, dropout: float) -> nn.Module:
    return nn.Sequential(nn.Dropout(dropout), nn.Linear(features, classes))


def _layernorm(features: int, classes: int, dropout: float) -> nn.Module:
    norm = nn.LayerNorm(features, eps=_EPS)
    return nn.Sequential(norm, nn.Dropout(dropout), nn.Linear(features, classes))


def _mlp(features: int, classes: int, dropout: float) -> nn.Module:
    return nn.Sequential(
        nn.Linear(features, _HIDDEN),
        nn.LayerNorm(_HIDDEN, eps=_EPS),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(_HIDDEN, classes),
    )


HEADS = Table(
    Head,
    "head",
    (
        Head("linear", "dropout and one linear layer", _linear),
        Head(
            "layernorm", "a fresh layer norm of the pooled features, dropout, one linear layer",
            _layernorm, norms_features=True,
        ),
        Head("mlp", f"one hidden layer of {_HIDDEN} with layer norm, GELU and dropout", _mlp),
    ),
)  # fmt: skip
