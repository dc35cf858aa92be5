"""Image sets with label errors planted into them, and a small run over each.

Takes a folder with train.zip (a folder of JPEGs a class), gives a table with the wrong labels, the
rows that they were planted into, and the run folder of a short sweep of our own.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from harness import ROOT, environment
from numpy.typing import NDArray
from sides.hard_digits import write_labels

_CONFIG = """\
name: {name}
data: {{train: train.csv}}
folds: {{k: 3}}
search:
  backbones: [{backbones}]
  candidates: {candidates}
  space:
    lr: {{low: 5.0e-3, high: 1.0e-2, log: true}}
    label_smoothing: 0
    drop_path: 0
race: {{rule: none}}
training: {{epochs: {epochs}, image_size: {size}, pretrained: false}}
augment: {{policy: light, flip: 0.5}}
resources: {{cpus_per_trial: 1}}
"""


@dataclass(frozen=True)
class Learner:
    """What is trained on a set: a short sweep whose every candidate gets all its folds."""

    backbones: str
    candidates: int
    epochs: int
    size: int
    """Side of the images, in pixels."""


@dataclass(frozen=True, eq=False)
class PlantedErrors:
    """Rows in the order of the table."""

    files: tuple[str, ...]
    true: NDArray[np.int64]
    given: NDArray[np.int64]
    classes: tuple[str, ...]

    @property
    def wrong(self) -> NDArray[np.bool_]:
        return self.given != self.true


def plant(archive: Path, folder: Path, share: float, seed: int) -> PlantedErrors:
    """Unpack the images into `folder`, write train.csv: a share of the rows has another label.

    Which rows and which of the other classes: uniform.
    """
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder / "images")
    found = (folder / "images").rglob("*")
    names = sorted(str(p.relative_to(folder)) for p in found if p.suffix.lower() == ".jpg")
    classes = tuple(sorted({Path(name).parent.name for name in names}))
    true = np.array([classes.index(Path(name).parent.name) for name in names])
    rng = np.random.default_rng(seed)
    rows = rng.choice(len(true), round(share * len(true)), replace=False)
    given = true.copy()
    given[rows] = (given[rows] + rng.integers(1, len(classes), len(rows))) % len(classes)
    write_labels(folder / "train.csv", ((n, classes[g]) for n, g in zip(names, given, strict=True)))
    return PlantedErrors(tuple(names), true, given, classes)


def sweep(folder: Path, learner: Learner) -> Path:
    """`foldrace run` over the table; its run folder, of an earlier call where that has ended."""
    run = folder / "run"
    if (run / "ensemble" / "ensemble.json").is_file():
        return run
    config = folder / "sweep.yaml"
    config.write_text(
        _CONFIG.format(
            name=folder.name, backbones=learner.backbones, candidates=learner.candidates,
            epochs=learner.epochs, size=learner.size,
        ),
        encoding="utf-8",
    )  # fmt: skip
    command = "resume" if (run / "sweep.yaml").is_file() else "run"
    words = [str(run)] if command == "resume" else [str(config), "--out", str(run)]
    subprocess.run(
        [sys.executable, str(ROOT / "sweep.py"), command, *words], env=environment(), check=True
    )
    return run
