"""Random erasing: a rectangle of a training image becomes noise.

Takes a float batch on the device, changes it in place. Zhong, Zheng, Kang, Li and Yang, Random
Erasing Data Augmentation, AAAI 2020.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_AREA = (0.02, 0.33)  # of the image
_RATIO = (0.3, 3.3)  # height to width, log-uniform
_NOISE = (0.5, 0.25)  # mean and standard deviation, of full scale; cut to [0, 1]


def erase_(images: Tensor, probability: float, rng: np.random.Generator) -> None:
    """(B, 3, H, W) in [0, 1]: each image loses one box with `probability`, in place.

    `rng` gives five uniform numbers an image, whatever they decide, and the seed of the noise,
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
    """(n, 4) uniform numbers -> (n, 4) top, left, height, width of boxes inside the image: area
    and shape first, then the place. A box longer than the image's side is cut to it."""
    area = height * width * (_AREA[0] + u[:, 0] * (_AREA[1] - _AREA[0]))
    ratio = _RATIO[0] * (_RATIO[1] / _RATIO[0]) ** u[:, 1]
    tall = np.clip(np.rint(np.sqrt(area * ratio)), 1, height)
    wide = np.clip(np.rint(np.sqrt(area / ratio)), 1, width)
    top = np.floor(u[:, 2] * (height - tall + 1))
    left = np.floor(u[:, 3] * (width - wide + 1))
    return np.column_stack([top, left, tall, wide]).astype(np.int64)
