"""scikit-learn's handwritten digits made hard, as a competition's files: the small data set of the
race's benchmarks.

Takes a folder and numbers of candidates and epochs, gives the path of a config that is ready to
run. Noise, a grey patch and dim ink are put on the 8 × 8 images, once, so that no model can undo
them; the labels of the test images lie in a file that no trial reads.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_TEST_IMAGES = 497
_SIDE = 32  # pixels, from the 8 × 8 of the data set
_NOISE = 0.15  # standard deviation, where ink is 1
_PATCH = 2  # side of the grey patch, of 8
_SEED = 0
# Small backbones from scratch, and a space in which candidates differ much.
CONFIG = """\
name: {name}
data:
  train: data/train.csv
folds: {{k: 5}}
search:
  backbones: [timm/test_resnet, timm/test_efficientnet, timm/test_convnext, timm/test_mambaout]
  candidates: {candidates}
  space:
    lr: {{low: 8.0e-4, high: 2.5e-2, log: true}}   # high: small models, few epochs from scratch
    weight_decay: {{low: 1.0e-3, high: 0.3, log: true}}
    warmup: {{low: 0.0, high: 0.3}}
    dropout: {{low: 0.0, high: 0.5}}
    drop_path: {{low: 0.0, high: 0.2}}
    mixup_prob: {{low: 0.0, high: 0.8}}
    mixup_alpha: 0.4
    label_smoothing: {{low: 0.0, high: 0.1}}
    random_erasing: {{low: 0.0, high: 0.4}}
    ema_epochs: {{choices: [0.5, 1.0, 2.0]}}
training: {{epochs: {epochs}, image_size: {image_size}, pretrained: false}}
augment: {{policy: light, flip: {flip}}}
resources: {{cpus_per_trial: 1}}
"""


def write_hard_digits(folder: Path, candidates: int, epochs: int) -> Path:
    """Write images, tables and config under `folder`; gives the config's path."""
    from sklearn.model_selection import train_test_split

    images, labels = digit_images(hard=True)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=_TEST_IMAGES, stratify=labels, random_state=_SEED
    )
    data = folder / "data"
    names = {int(row): f"train/digit_{row:04d}.png" for row in sorted(train)}
    hidden = {int(row): f"test/digit_{row:04d}.png" for row in sorted(test)}
    for row, name in (names | hidden).items():
        path = data / name
        path.parent.mkdir(parents=True, exist_ok=True)
        images[row].save(path)
    write_labels(data / "train.csv", ((n, str(labels[r])) for r, n in names.items()))
    write_labels(hidden_labels(folder), ((n, str(labels[r])) for r, n in hidden.items()))
    config = folder / "hard_digits.yaml"
    text = CONFIG.format(
        name="hard_digits", candidates=candidates, epochs=epochs, image_size=_SIDE, flip=0
    )
    config.write_text(text, encoding="utf-8")
    return config


def digit_images(hard: bool) -> tuple[list[Image.Image], NDArray[np.int64]]:
    """scikit-learn's digits and their (n,) classes; `hard`: with noise, patch and dim ink."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    ink = digits.images / 16.0
    labels: NDArray[np.int64] = digits.target
    return [_picture(one) for one in (_harder(ink) if hard else ink)], labels


def hidden_labels(folder: Path) -> Path:
    """image_path,target of the test images."""
    return folder / "data" / "hidden_test_labels.csv"


def test_images(folder: Path) -> tuple[list[Path], list[str]]:
    """The test images and their labels."""
    path = hidden_labels(folder)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [path.parent / row["image_path"] for row in rows], [row["target"] for row in rows]


def _harder(images: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, 8, 8), ink from 0 to 1: dimmed, a patch of grey laid over, noise added."""
    rng = np.random.default_rng(_SEED)
    harder = images * rng.uniform(0.6, 1.0, (len(images), 1, 1))
    for image, (top, left) in zip(
        harder, rng.integers(0, 9 - _PATCH, (len(images), 2)), strict=True
    ):
        image[top : top + _PATCH, left : left + _PATCH] = rng.uniform()
    return np.clip(harder + rng.normal(0.0, _NOISE, images.shape), 0.0, 1.0)


def _picture(ink: NDArray[np.float64]) -> Image.Image:
    """`ink` (8, 8) with values 0 to 1."""
    grey = Image.fromarray(np.round(ink * 255).astype(np.uint8))
    return grey.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)


def write_labels(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """image_path,target: paths relative to the file, or absolute."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image_path", "target"])
        writer.writerows(rows)
