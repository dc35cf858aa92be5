"""Photos of hands that show a digit (Mavi 2020, arXiv:2011.08927), with test images of our own: the
competition's test labels are withheld.

Takes the folder with train.zip, gives the path of a config with the same search as the hard digits'
one, and the same files beside it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sides.hard_digits import CONFIG, hidden_labels, write_labels

from foldrace.config.schema import DataConfig
from foldrace.dataset.manifest import read_manifest

_TEST_PART = 0.25
_SIDE = 40  # pixels
_SEED = 0


def write_sign_photos(folder: Path, data: Path, candidates: int, epochs: int) -> Path:
    """Write tables and config under `folder`; gives the config's path."""
    from sklearn.model_selection import train_test_split

    manifest = read_manifest(DataConfig(train=str((data / "train.zip").resolve())))
    train, test = train_test_split(
        np.arange(len(manifest)),
        test_size=_TEST_PART,
        stratify=manifest.labels,
        random_state=_SEED,
    )
    (folder / "data").mkdir(parents=True)
    for path, rows in ((folder / "data" / "train.csv", train), (hidden_labels(folder), test)):
        labels = (manifest.classes[manifest.labels[row]] for row in sorted(rows))
        files = (str(manifest.file(int(row))) for row in sorted(rows))
        write_labels(path, zip(files, labels, strict=True))
    config = folder / "sign_digits.yaml"
    text = CONFIG.format(
        name="sign_digits", candidates=candidates, epochs=epochs, image_size=_SIDE, flip=0.5
    )
    config.write_text(text, encoding="utf-8")
    return config
