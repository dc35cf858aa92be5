"""The used-cars augmentation as its authors would write it: ImageFolder and DataLoader.

Takes a folder per class, gives loaders of float batches in [0, 1]. The ranges are those of our
`vehicles` policy, as far as the two mean the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchvision import transforms as v1
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2


def on_pil(folder: Path, size: int, batch_size: int, workers: int) -> DataLoader[Any]:
    """torchvision's transforms on Pillow's images."""
    transform = v1.Compose(
        [
            v1.RandomResizedCrop(size, scale=(0.6, 1.0), ratio=(3 / 4, 4 / 3)),
            v1.RandomHorizontalFlip(),
            v1.RandomRotation(15),
            v1.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05),
            v1.RandomAffine(0, translate=(0.1, 0.1), scale=(0.9, 1.1), shear=10),
            v1.RandomPerspective(distortion_scale=0.2, p=0.5),
            v1.ToTensor(),
        ]
    )
    return _loader(ImageFolder(str(folder), transform), batch_size, workers)


def on_tensors(folder: Path, size: int, batch_size: int, workers: int) -> DataLoader[Any]:
    """torchvision's transforms v2 on uint8 tensors, JPEGs decoded by torchvision itself."""
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.6, 1.0), ratio=(3 / 4, 4 / 3), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomRotation(15),
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05),
            v2.RandomAffine(0, translate=(0.1, 0.1), scale=(0.9, 1.1), shear=10),
            v2.RandomPerspective(distortion_scale=0.2, p=0.5),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    return _loader(ImageFolder(str(folder), transform, loader=_decode), batch_size, workers)


def _decode(path: str) -> torch.Tensor:
    return decode_image(path, mode=ImageReadMode.RGB)


def _loader(dataset: ImageFolder, batch_size: int, workers: int) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers > 0 else None,
    )


PEERS: dict[str, Callable[[Path, int, int, int], DataLoader[Any]]] = {
    "torchvision on PIL": on_pil,
    "torchvision v2 on tensors": on_tensors,
}
