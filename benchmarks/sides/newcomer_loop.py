"""A plain PyTorch loop, as somebody writes it in an evening: one backbone, K folds, AdamW with one
cycle, shifts and flips, the mean of the fold models; of three learning rates the best by OOF.

`python newcomer_loop.py DATA OUT SECONDS SIZE [WEIGHTS]`: DATA has `train/<class>/` and `test/`.
Leaves `OUT/<seconds since the start>.npz` (ids, classes, prob) whenever there is something better:
the mean of the folds so far of the first rate, then of each whole rate that is the best one.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn
from torch.nn import functional as F

_FOLDS, _BATCH = 3, 32
_SCRATCH = ("test_resnet", 20, (5e-3, 2e-3, 1e-2))  # backbone, epochs, rates in their order
_PRETRAINED = ("efficientnet_lite0", 10, (1e-3, 3e-4, 3e-3))
_SHIFT = 0.1  # of the side


def _pixels(files: list[Path], size: int) -> Tensor:
    images = [Image.open(f).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
              for f in files]  # fmt: skip
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((stacked / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def _varied(images: Tensor) -> Tensor:
    """Each flipped with probability 1/2 and shifted by up to a tenth of its side."""
    n = len(images)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = torch.where(torch.rand(n) < 0.5, -1.0, 1.0)
    theta[:, 1, 1] = 1.0
    theta[:, :, 2] = (torch.rand(n, 2) * 2 - 1) * 2 * _SHIFT
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _fitted(
    images: Tensor, labels: Tensor, classes: int, lr: float, start: Path | None
) -> nn.Module:
    name, epochs, _ = _SCRATCH if start is None else _PRETRAINED
    model: nn.Module = timm.create_model(name, num_classes=classes)
    if start is not None:
        weights = load_file(start / f"{name}.safetensors")
        model.load_state_dict(
            {k: v for k, v in weights.items() if not k.startswith("classifier")}, strict=False
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.02)
    steps = len(images) // _BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(images))[: steps * _BATCH]
        for rows in order.split(_BATCH):
            loss = F.cross_entropy(model(_varied(images[rows])), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.inference_mode()
def _probabilities(model: nn.Module, images: Tensor) -> NDArray[np.float64]:
    logits = torch.cat([model(part) for part in images.split(128)])
    found: NDArray[np.float64] = logits.double().softmax(1).numpy()
    return found


def main(data: Path, out: Path, seconds: float, size: int, start: Path | None) -> None:
    begun = time.monotonic()
    torch.manual_seed(0)
    out.mkdir(parents=True)
    files = sorted((data / "train").glob("*/*"))
    classes = sorted({file.parent.name for file in files})
    labels = np.array([classes.index(file.parent.name) for file in files])
    tests = sorted((data / "test").iterdir())
    images, test_images = _pixels(files, size), _pixels(tests, size)

    def write(prob: NDArray[np.float64]) -> None:
        np.savez(out / f"{time.monotonic() - begun:.1f}.npz", ids=[t.stem for t in tests],
                 classes=classes, prob=prob)  # fmt: skip

    folds = list(StratifiedKFold(_FOLDS, shuffle=True, random_state=0).split(labels, labels))
    targets = torch.from_numpy(labels)
    best = float("inf")
    _, _, rates = _SCRATCH if start is None else _PRETRAINED
    for rate in rates:
        oof, test = np.zeros((len(labels), len(classes))), []
        for train, valid in folds:
            if time.monotonic() - begun > seconds:
                return
            model = _fitted(images[train], targets[train], len(classes), rate, start)
            oof[valid] = _probabilities(model, images[valid])
            test.append(_probabilities(model, test_images))
            if rate == rates[0]:
                write(np.mean(test, axis=0))
        loss = -np.log(np.maximum(oof[np.arange(len(labels)), labels], 1e-15)).mean()
        print(
            f"lr {rate:g}: OOF log loss {loss:.4f} after {time.monotonic() - begun:.0f} s",
            flush=True,
        )
        if loss < best:
            best = float(loss)
            write(np.mean(test, axis=0))


if __name__ == "__main__":
    words = sys.argv[1:]
    weights = Path(words[4]) if len(words) > 4 else None
    main(Path(words[0]), Path(words[1]), float(words[2]), int(words[3]), weights)
