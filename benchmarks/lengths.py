"""How long a network should be trained: the same configuration for ever more epochs, on many small
data sets, against a second network in the time of the longer training.

`loss` is the calibrated log loss of one fold, `train_share` the training loss of the last epoch as
a share of it (near 0: the images are learnt by heart), `doubled` the loss of twice the epochs / the
loss, `second` the loss of the blend with the best second configuration of the same backbone and as
many epochs / the loss, from the portfolio's table, where that has one.

`--record FOLDER` keeps each training (an hour on two cores; goes on where it was cut off).
`IMAGE_SETS` and `LITE_WEIGHTS` (environment variables): see `sides/image_sets.py` and
`sides/portfolio_recorder.py`. `--only` takes names of data sets, with commas.
"""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import portfolio
from harness import Results, options
from sides.portfolio_recorder import STARTS, configuration, prepare, train_fold

_PROCESSES = 2


@dataclass(frozen=True)
class Lengths:
    """A configuration of the portfolio's recording (`number`), for these numbers of epochs."""

    start: str
    number: int
    epochs: tuple[int, ...]
    backbone: str | None = None
    """Another backbone than the configuration's."""


_ROWS = (
    Lengths("scratch", 12, (8, 16, 32, 64)),
    Lengths("scratch", 12, (16, 32, 64), "timm/test_efficientnet"),
    Lengths("pretrained", 1, (5, 10, 20)),
)


@dataclass(frozen=True)
class Job:
    """One fold trial."""

    row: Lengths
    set: str
    epochs: int

    @property
    def backbone(self) -> str:
        return self.row.backbone or configuration(STARTS[self.row.start], self.row.number)[0]

    @property
    def file(self) -> str:
        return f"{self.row.start} {self.backbone.split('/')[1]} {self.set} {self.epochs}.json"


def _train(folder: Path, job: Job) -> str:
    """Train it, leave its JSON in the folder."""
    start = replace(STARTS[job.row.start], epochs=job.epochs)
    _, drawn = configuration(start, job.row.number)
    with tempfile.TemporaryDirectory(dir=folder) as run:
        trained = train_fold(folder, start, job.set, job.backbone, drawn, Path(run) / "run")
        log = list(csv.DictReader(io.StringIO(trained.log())))
    losses = [v.calibrated_logloss for v in trained.result.variants.values()]
    facts = {
        "loss": min(losses),
        "train_share": float(log[-1]["train_loss"]) / min(losses),
        "seconds": trained.result.seconds,
    }
    (folder / job.file).write_text(json.dumps(facts), encoding="utf-8")
    return f"{job.file} {facts}"


def _second(start: str, set_name: str, number: int) -> float | None:
    """The blend with the best second configuration of the same backbone / the configuration."""
    with np.load(portfolio.TABLE) as stored:
        trials = portfolio.read(dict(stored), STARTS[start])[set_name]
    if number not in trials:
        return None
    backbone = trials[number].facts["backbone"]
    others = [i for i in trials if i != number and trials[i].facts["backbone"] == backbone]
    best = min((portfolio.blend(trials, [number, i]) for i in others), default=None)
    return None if best is None else best / portfolio.blend(trials, [number])


def _table(folder: Path, row: Lengths, sets: list[str], results: Results) -> None:
    for name in sets:
        jobs = [Job(row, name, epochs) for epochs in row.epochs]
        found: dict[int, dict[str, Any]] = {
            job.epochs: json.loads((folder / job.file).read_text()) for job in jobs
        }
        for job in jobs:
            facts, longer = found[job.epochs], found.get(2 * job.epochs)
            recorded = STARTS[row.start].epochs == job.epochs and row.backbone is None
            results.add(
                f"{row.start}: {job.backbone}",
                data=name,
                **{"epochs": job.epochs, **facts},
                doubled=longer["loss"] / facts["loss"] if longer else None,
                second=_second(row.start, name, row.number) if recorded else None,
            )


def main() -> None:
    given = options(__doc__, record="a folder for what is trained", only="names of data sets")
    results = Results("lengths")
    rows = (Lengths("scratch", 12, (1, 2)),) if given.quick else _ROWS
    asked = "digits" if given.quick else given.only
    with tempfile.TemporaryDirectory() as scratch:
        folder = (given.record or Path(scratch)).resolve()
        sets = {
            row: [s for s in STARTS[row.start].sets if asked is None or s in asked.split(",")]
            for row in rows
        }
        jobs = [Job(row, name, e) for row in rows for name in sets[row] for e in row.epochs]
        left = [job for job in jobs if not (folder / job.file).is_file()]
        prepare(folder, {job.set for job in left})
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(_PROCESSES, context, os.nice, (15,)) as pool:
            for line in pool.map(partial(_train, folder), left):
                print(line, flush=True)
        for row in rows:
            _table(folder, row, sets[row], results)
    results.publish(given)


if __name__ == "__main__":
    main()
