"""MixUp: a batch blended with itself in another order, images and soft targets alike.

Zhang, Cisse, Dauphin and Lopez-Paz, mixup: Beyond Empirical Risk Minimization, ICLR 2018.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


def soft_targets(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """(B,) class indices -> (B, classes) rows that sum to 1: 1 - smoothing on the true class,
    and smoothing spread over all classes."""
    one_hot = functional.one_hot(labels, classes).to(torch.float32)
    return one_hot * (1.0 - smoothing) + smoothing / classes


def mixup(
    images: Tensor, targets: Tensor, alpha: float, probability: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W) images and (B, C) targets -> the same shapes, mixed with one weight
    lambda ~ Beta(alpha, alpha), or unchanged with probability 1 - `probability`."""
    if alpha <= 0 or rng.random() >= probability:
        return images, targets
    weight = float(rng.beta(alpha, alpha))
    order = torch.from_numpy(rng.permutation(len(images))).to(images.device)
    return torch.lerp(images[order], images, weight), torch.lerp(targets[order], targets, weight)
