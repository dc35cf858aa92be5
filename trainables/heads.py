"""Classifier heads: from pooled features to class logits."""

from __future__ import annotations

from torch import nn


def build_head(features: int, classes: int, dropout: float) -> nn.Module:
    """(B, features) -> (B, classes): dropout and one linear layer."""
    return nn.Sequential(nn.Dropout(dropout), nn.Linear(features, classes))
