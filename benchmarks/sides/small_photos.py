"""Small photos of 10 classes, learned by two backbones of unlike cost from ImageNet weights: the
second data set of the race's benchmark.

Takes a folder and numbers of candidates and epochs, gives the path of a config that is ready to
run. Two environment variables name what it is made of: `SMALL_PHOTOS` a folder with train.zip (a
folder of JPEGs a class), test.zip (`test/<id>.jpg`) and test_labels.csv (id,label), `LITE_WEIGHTS`
one with `efficientnet_lite0.safetensors` and `efficientnet_lite2.safetensors`.
"""

from __future__ import annotations

import csv
import os
import zipfile
from pathlib import Path

import numpy as np
from sides.hard_digits import hidden_labels, write_labels

_TRAIN, _TEST = 600, 400  # images
_SEED = 0
# An epoch at 64 px costs several at 32 px; candidates differ much.
_CONFIG = """\
name: small_photos
data:
  train: data/train.csv
folds: {{k: 3}}
search:
  backbones: [timm/efficientnet_lite0, timm/efficientnet_lite2]
  candidates: {candidates}
  space:
    lr: {{low: 1.0e-4, high: 5.0e-3, log: true}}
    weight_decay: {{low: 1.0e-3, high: 0.3, log: true}}
    warmup: {{low: 0.0, high: 0.3}}
    dropout: {{low: 0.0, high: 0.5}}
    drop_path: {{low: 0.0, high: 0.2}}
    mixup_prob: {{low: 0.0, high: 0.8}}
    mixup_alpha: 0.4
    label_smoothing: {{low: 0.0, high: 0.1}}
    random_erasing: {{low: 0.0, high: 0.4}}
    ema_epochs: {{choices: [0.25, 0.5, 1.0]}}
    image_size: 32
  per_backbone:
    timm/efficientnet_lite2: {{image_size: 64}}
training: {{epochs: {epochs}, pretrained: {weights}}}
augment: {{policy: light, flip: 0.5}}
resources: {{cpus_per_trial: 1}}
"""


def write_small_photos(folder: Path, candidates: int, epochs: int) -> Path:
    """Write images, tables and config under `folder`; gives the config's path."""
    from sklearn.model_selection import train_test_split

    photos, weights = _given("SMALL_PHOTOS"), _given("LITE_WEIGHTS")
    data = folder / "data"
    for name in ("train.zip", "test.zip"):
        with zipfile.ZipFile(photos / name) as archive:
            archive.extractall(data)
    files = sorted((data / "train").rglob("*.jpg"))
    rows, _ = train_test_split(
        np.arange(len(files)),
        train_size=_TRAIN,
        stratify=[file.parent.name for file in files],
        random_state=_SEED,
    )
    chosen = [files[row] for row in sorted(rows)]
    labels = ((str(file.relative_to(data)), file.parent.name) for file in chosen)
    write_labels(data / "train.csv", labels)
    with (photos / "test_labels.csv").open(newline="", encoding="utf-8") as file:
        hidden = [(f"test/{row['id']}.jpg", row["label"]) for row in csv.DictReader(file)]
    write_labels(hidden_labels(folder), hidden[:_TEST])
    config = folder / "small_photos.yaml"
    text = _CONFIG.format(candidates=candidates, epochs=epochs, weights=weights)
    config.write_text(text, encoding="utf-8")
    return config


def _given(variable: str) -> Path:
    """The folder that an environment variable names."""
    value = os.environ.get(variable)
    if not value or not Path(value).is_dir():
        raise SystemExit(f"{variable}: should name a folder; see benchmarks/sides/small_photos.py")
    return Path(value).resolve()
