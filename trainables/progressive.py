"""Progressive image size: small training images first, the whole size at the end.

Takes the epoch and the hyperparameters, gives a side in pixels. Tan and Le, EfficientNetV2: Smaller
Models and Faster Training, ICML 2021.
"""

from __future__ import annotations


def training_size(epoch: int, epochs: int, image_size: int, size_start: float) -> int:
    """Side of the square training images in `epoch` (from 0): from `size_start` of `image_size`,
    linearly to the whole after two thirds of the epochs, so that the last third (and a single
    epoch) trains at the size of scoring. Rounded to 32 pixels, below 128 pixels to 8."""
    growing = 2 * epochs // 3  # epochs
    if epoch >= growing or size_start >= 1.0:
        return image_size
    side = image_size * (size_start + (1.0 - size_start) * epoch / growing)
    step = 32 if image_size >= 128 else 8
    return min(max(step, step * int(side / step + 0.5)), image_size)
