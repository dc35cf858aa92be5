"""Image sets with label errors planted into them, and a small run over each.

Takes a folder with train.zip (a folder of JPEGs a class), gives a table with the wrong labels, the
rows that they were planted into, and the run folder of a short sweep of our own, or of the folds of
one candidate.
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

from foldrace.checks.preflight import preflight
from foldrace.commands.ensemble import Changes, reblend
from foldrace.commands.plugins import parse_with_plugins
from foldrace.console.machine import cores
from foldrace.console.terminal import Terminal
from foldrace.dataset.folds import folds_csv
from foldrace.run_folder.records import CandidateRecord
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.nodes import this_machine
from foldrace.trainables.spec import EpochReport, TrialSpec
from foldrace.trainables.trial import run_trial

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


def fold_trials(folder: Path, learner: Learner) -> Path:
    """The folds of one candidate, each backbone's default, trained in this process without Ray.

    Where a machine has other work to do, that starts at once.
    """
    run = folder / "run"
    if (run / "ensemble" / "ensemble.json").is_file():
        return run
    parsed, parts = parse_with_plugins(_write_config(folder, learner), ())
    plan = preflight(parsed, None, this_machine(), cores(), parts)
    store = RunStore(run)
    store.create(plan.config, folds_csv(plan.manifest, plan.fold), plan.manifest.classes)
    for number, backbone in enumerate(learner.backbones.split(", ")):
        params = plan.space.default(backbone).as_dict()
        candidate = CandidateRecord(candidate=f"c{number:04d}", backbone=backbone, params=params)
        store.save_candidate(candidate)
        for fold in range(store.fold_count):
            spec = TrialSpec(store.root, str(plan.manifest.image_root), candidate.candidate, fold)
            print(run_trial(spec, Silent()).variants, flush=True)
    reblend(store.root, Changes(), (), (), Terminal())
    return run


class Silent:
    """A monitor that hears of each epoch and never stops a trial."""

    def report(self, epoch: EpochReport) -> None:
        print(f"epoch {epoch.epoch}: log loss {epoch.val_logloss:.3f}", flush=True)

    def stop_requested(self) -> bool:
        return False


def sweep(folder: Path, learner: Learner) -> Path:
    """`foldrace run` over the table; its run folder, of an earlier call where that has ended."""
    run = folder / "run"
    if (run / "ensemble" / "ensemble.json").is_file():
        return run
    config = _write_config(folder, learner)
    command = "resume" if (run / "sweep.yaml").is_file() else "run"
    words = [str(run)] if command == "resume" else [str(config), "--out", str(run)]
    subprocess.run(
        [sys.executable, str(ROOT / "sweep.py"), command, *words], env=environment(), check=True
    )
    return run


def _write_config(folder: Path, learner: Learner) -> Path:
    config = folder / "sweep.yaml"
    config.write_text(
        _CONFIG.format(
            name=folder.name, backbones=learner.backbones, candidates=learner.candidates,
            epochs=learner.epochs, size=learner.size,
        ),
        encoding="utf-8",
    )  # fmt: skip
    return config
