"""The demo's data set: scikit-learn's handwritten digits as PNG files, with a competition's files.

Takes a folder, gives the path of a config that is ready to run. The test labels go to a file of
their own that no trial reads.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_TEST_IMAGES = 360
_SIDE = 32  # pixels, from the 8 × 8 of the data set
_CONFIG = """\
# foldrace run {config} --out {run}
name: digits
data:
  train: data/train.csv
  test: data/test.csv
  sample_submission: data/sample_submission.csv
folds: {{k: 3}}
search:
  backbones: [timm/test_resnet, timm/test_efficientnet, timm/test_convnext]
  candidates: 12
  space:
    lr: {{low: 4e-3, high: 1.2e-2, log: true}}   # high: small models, 8 epochs from scratch
    mixup_prob: {{low: 0.0, high: 0.4}}
    dropout: {{low: 0.0, high: 0.3}}
    label_smoothing: 0
    drop_path: 0
    warmup: 0.1
training: {{epochs: 8, image_size: 32, pretrained: false}}
augment: {{policy: light, flip: 0}}
resources: {{cpus_per_trial: 1}}
"""


def write_demo(folder: Path, seed: int = 0) -> Path:
    """Write images, tables and config under `folder`; gives the config's path.

    `seed` draws the images whose labels are hidden.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    labels: NDArray[np.int64] = digits.target
    train, test = train_test_split(
        np.arange(len(labels)), test_size=_TEST_IMAGES, stratify=labels, random_state=seed
    )
    data = folder / "data"
    names = {row: f"train/digit_{row:04d}.png" for row in sorted(train)}
    names |= {row: f"test/digit_{row:04d}.png" for row in sorted(test)}
    for row, name in names.items():
        _write_png(digits.images[row], data / name)
    train, test = sorted(train), sorted(test)
    _write_csv(data / "train.csv", ["image_path", "target"], ((names[r], labels[r]) for r in train))
    _write_csv(data / "test.csv", ["id", "image_path"], ((_id(r), names[r]) for r in test))
    classes = [str(c) for c in range(10)]
    rows = ([_id(r), *[0.1] * 10] for r in test)
    _write_csv(data / "sample_submission.csv", ["id", *classes], rows)
    _write_csv(hidden_labels(folder), ["id", "target"], ((_id(r), labels[r]) for r in test))
    config = folder / "demo.yaml"
    config.write_text(_CONFIG.format(config=config, run=folder / "run"), encoding="utf-8")
    return config


def hidden_labels(folder: Path) -> Path:
    """The test labels, for the score that the demo prints at its end."""
    return folder / "data" / "hidden_test_labels.csv"


def _id(row: int) -> str:
    return f"digit_{row:04d}"


def _write_png(image: NDArray[np.float64], path: Path) -> None:
    """`image` (8, 8) with values 0 to 16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8))
    grey.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC).save(path)


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
