"""Random erasing, MixUp and CutMix: batches changed on the device.

Takes float images and soft targets on the device, and a NumPy generator for every decision. Random
erasing, in which a rectangle becomes noise: Zhong, Zheng, Kang, Li and Yang, Random Erasing Data
Augmentation, AAAI 2020.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from foldrace.config.hyperparameters import TrialParams

_AREA = (0.02, 0.33)  # of the image
_RATIO = (0.3, 3.3)  # height to width, log-uniform
_NOISE = (0.5, 0.25)  # mean and standard deviation, of full scale; cut to [0, 1]


def erase_(images: Tensor, probability: float, rng: np.random.Generator) -> None:
    """(B, 3, H, W) in [0, 1]: each image loses one box with `probability`, in place.

    `rng` gives five uniform numbers per image, whatever they decide, and the seed of the noise,
    which is drawn on the images' device. A probability of 0 draws nothing.
    """
    if probability <= 0:
        return
    u = rng.random((len(images), 5))
    seed = int(rng.integers(2**63))
    noise = torch.Generator(images.device).manual_seed(seed)
    boxes = erasing_boxes(u[:, 1:], *images.shape[2:])
    for i in np.flatnonzero(u[:, 0] < probability):
        top, left, height, width = boxes[i].tolist()
        box = torch.empty(3, height, width, device=images.device)
        box.normal_(*_NOISE, generator=noise).clamp_(0.0, 1.0)
        images[int(i), :, top : top + height, left : left + width] = box


def erasing_boxes(u: NDArray[np.float64], height: int, width: int) -> NDArray[np.int64]:
    """(n, 4) uniform numbers -> (n, 4) top, left, height, width of boxes inside the image.

    Area and shape first, then the place. A box longer than the image's side is cut to it.
    """
    area = height * width * (_AREA[0] + u[:, 0] * (_AREA[1] - _AREA[0]))
    ratio = _RATIO[0] * (_RATIO[1] / _RATIO[0]) ** u[:, 1]
    tall = np.clip(np.rint(np.sqrt(area * ratio)), 1, height)
    wide = np.clip(np.rint(np.sqrt(area / ratio)), 1, width)
    top = np.floor(u[:, 2] * (height - tall + 1))
    left = np.floor(u[:, 3] * (width - wide + 1))
    return np.column_stack([top, left, tall, wide]).astype(np.int64)


def soft_targets(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """(B,) class indices -> (B, classes) rows that sum to 1.

    1 - smoothing on the true class, and smoothing spread over all classes. Szegedy, Vanhoucke,
    Ioffe, Shlens and Wojna, Rethinking the Inception Architecture, CVPR 2016.
    """
    one_hot = functional.one_hot(labels, classes).to(torch.float32)
    return one_hot * (1.0 - smoothing) + smoothing / classes


def mixed_epochs(params: TrialParams) -> int:
    """Number of epochs, from the first one on, that have MixUp and CutMix.

    Off at the end, as by timm's `--mixup-off-epoch`: images as they are scored.
    """
    return round((1.0 - params.mix_off) * params.epochs)


def mix(
    images: Tensor, vectors: tuple[Tensor, ...], params: TrialParams, rng: np.random.Generator
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(B, 3, H, W) images and what belongs to them, such as (B, C) targets -> the same, mixed.

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
    """A batch blended with itself in another order, with `probability`, or unchanged.

    One weight lambda ~ Beta(alpha, alpha). Draws a uniform number, lambda and the order.

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
    """A batch with one box of each image replaced by another's, with `probability`, or unchanged.

    lambda ~ Beta(alpha, alpha) is the area that stays; the box is cut at the border and the vectors
    get the true areas. Draws a uniform number, lambda, the centre's y and x, the order.

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
    """(B,) on the images' device, copied from page-locked memory so that the CPU does not wait."""
    order = torch.from_numpy(rng.permutation(len(images)))
    if images.device.type == "cuda":
        order = order.pin_memory()
    return order.to(images.device, non_blocking=True)


def _blended(vectors: tuple[Tensor, ...], order: Tensor, weight: float) -> tuple[Tensor, ...]:
    return tuple(torch.lerp(vector[order], vector, weight) for vector in vectors)


def _cut_box(
    height: int, width: int, weight: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of a box around any pixel, as far as it lies inside.

    It has the image's shape and 1 - `weight` of its area.
    """
    y, x = int(rng.integers(height)), int(rng.integers(width))
    half_height = int(0.5 * math.sqrt(1.0 - weight) * height)
    half_width = int(0.5 * math.sqrt(1.0 - weight) * width)
    return (
        max(y - half_height, 0),
        min(y + half_height, height),
        max(x - half_width, 0),
        min(x + half_width, width),
    )
