"""MixUp and CutMix: a batch mixed with itself in another order, images and soft targets alike.

Takes float images and soft targets on the device, and a NumPy generator for every decision.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from search_spaces.params import TrialParams


def soft_targets(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """(B,) class indices -> (B, classes) rows that sum to 1: 1 - smoothing on the true class,
    and smoothing spread over all classes."""
    one_hot = functional.one_hot(labels, classes).to(torch.float32)
    return one_hot * (1.0 - smoothing) + smoothing / classes


def mix(
    images: Tensor, vectors: tuple[Tensor, ...], params: TrialParams, rng: np.random.Generator
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(B, 3, H, W) images and what belongs to them, such as (B, C) targets -> the same shapes:
    MixUp on `mixup_prob` of the batches, CutMix on `cutmix_prob` of them, but never both: CutMix
    takes at most what is left.

    Each of the two that is on draws from `rng`, MixUp first: one number that decides, and then,
    where it mixes, what its own function says. A batch that was mixed up draws no more.
    """
    mixed = mixup(images, vectors, params.mixup_alpha, params.mixup_prob, rng)
    if mixed[0] is not images:
        return mixed
    left = 1.0 - (params.mixup_prob if params.mixup_alpha > 0 else 0.0)
    share = min(params.cutmix_prob / left, 1.0) if left > 0 else 0.0  # of the batches left
    return cutmix(images, vectors, params.cutmix_alpha, share, rng)


def mixup(
    images: Tensor,
    vectors: tuple[Tensor, ...],
    alpha: float,
    probability: float,
    rng: np.random.Generator,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Blended with one weight lambda ~ Beta(alpha, alpha), or unchanged with probability
    1 - `probability`. Draws a uniform number, lambda and the order.

    Zhang, Cisse, Dauphin and Lopez-Paz, mixup: Beyond Empirical Risk Minimization, ICLR 2018.
    """
    if alpha <= 0 or rng.random() >= probability:
        return images, vectors
    weight = float(rng.beta(alpha, alpha))
    order = _order(images, rng)
    return torch.lerp(images[order], images, weight), _blended(vectors, order, weight)


def cutmix(
    images: Tensor,
    vectors: tuple[Tensor, ...],
    alpha: float,
    probability: float,
    rng: np.random.Generator,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One box of each image replaced by another image's. lambda ~ Beta(alpha, alpha) is the area
    that stays; the box is cut at the border and the vectors get the true areas. Or unchanged with
    probability 1 - `probability`. Draws a uniform number, lambda, the centre's y and x, the order.

    Yun, Han, Oh, Chun, Choe and Yoo, CutMix, ICCV 2019.
    """
    if alpha <= 0 or rng.random() >= probability:
        return images, vectors
    height, width = images.shape[2:]
    top, bottom, left, right = _cut_box(height, width, float(rng.beta(alpha, alpha)), rng)
    order = _order(images, rng)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[order, :, top:bottom, left:right]
    weight = 1.0 - (bottom - top) * (right - left) / (height * width)
    return mixed, _blended(vectors, order, weight)


def _order(images: Tensor, rng: np.random.Generator) -> Tensor:
    """(B,) on the images' device. From page-locked memory, so that nobody waits for the copy."""
    order = torch.from_numpy(rng.permutation(len(images)))
    if images.device.type == "cuda":
        order = order.pin_memory()
    return order.to(images.device, non_blocking=True)


def _blended(vectors: tuple[Tensor, ...], order: Tensor, weight: float) -> tuple[Tensor, ...]:
    return tuple(torch.lerp(vector[order], vector, weight) for vector in vectors)


def _cut_box(
    height: int, width: int, weight: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of a box with the image's shape and 1 - `weight` of its area,
    around any pixel, as far as it lies inside."""
    y, x = int(rng.integers(height)), int(rng.integers(width))
    half_height = int(0.5 * math.sqrt(1.0 - weight) * height)
    half_width = int(0.5 * math.sqrt(1.0 - weight) * width)
    return (
        max(y - half_height, 0),
        min(y + half_height, height),
        max(x - half_width, 0),
        min(x + half_width, width),
    )
