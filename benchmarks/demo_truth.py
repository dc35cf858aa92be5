"""The log loss that a demo run prints for its submission, beside that on its hidden labels.

`foldrace run` on the demo's digits, ten times: each with other hidden images, other folds and
another search. `printed` is the receipt's expected loss of the submission, `hidden` the loss on the
360 hidden labels; `off` is their difference in standard errors, those of both taken together.

`--record FOLDER` keeps each run's submission, and goes on with those that are there.
"""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from harness import ROOT, Results, environment, options
from numpy.typing import NDArray

from foldrace.core.metrics import row_losses, true_class_probability
from foldrace.dataset.demo import hidden_labels, write_demo

_SEEDS = 10


def _run(seed: int, folder: Path) -> Path:
    """The run folder of a demo, which is made where it is not there."""
    run = folder / "run"
    if not (run / "submission.receipt.json").is_file():
        config = write_demo(folder, seed)
        command = [
            *(sys.executable, str(ROOT / "sweep.py"), "run", str(config), "--out", str(run)),
            *("--set", f"search.seed={seed}", "--set", f"folds.seed={seed}"),
        ]
        with (folder / "log.txt").open("wb") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, env=environment())
    return run


def _hidden_losses(folder: Path) -> NDArray[np.float64]:
    """(n,) loss of each test image."""
    with hidden_labels(folder).open(encoding="utf-8", newline="") as file:
        target = {row["id"]: row["target"] for row in csv.DictReader(file)}
    with (folder / "run" / "submission.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    prob = np.array([row[1:] for row in rows], dtype=np.float64)
    labels = np.array([header[1:].index(target[row[0]]) for row in rows])
    return row_losses(true_class_probability(prob, labels))


def _measure(seed: int, folder: Path, results: Results) -> float:
    """Add a row; gives how far printed and hidden are apart [their standard error]."""
    run = _run(seed, folder)
    receipt = json.loads((run / "submission.receipt.json").read_text(encoding="utf-8"))
    losses = _hidden_losses(folder)
    hidden, hidden_se = float(losses.mean()), float(losses.std(ddof=1) / math.sqrt(len(losses)))
    printed, se = receipt["submitted_logloss"], receipt["submitted_se"]
    off = (printed - hidden) / math.hypot(se, hidden_se)
    results.add(
        "demo",
        seed=seed,
        one_fold=receipt["crossfit_logloss"],
        printed=printed,
        se=se,
        hidden=hidden,
        hidden_se=hidden_se,
        off=off,
    )
    return float(off)


def main() -> None:
    given = options(__doc__, record="folder that keeps the runs")
    results = Results("demo_truth")
    with tempfile.TemporaryDirectory() as made:
        kept = (given.record or Path(made)).resolve()
        seeds = range(1 if given.quick else _SEEDS)
        off = np.array([_measure(seed, kept / str(seed), results) for seed in seeds])
    spread = float(off.std(ddof=1) / math.sqrt(len(off))) if len(off) > 1 else math.nan
    results.add("of all", within_1_se=float((abs(off) <= 1).mean()),
                within_2_se=float((abs(off) <= 2).mean()), mean_off=float(off.mean()),
                se_of_mean_off=spread)  # fmt: skip
    results.publish(given)


if __name__ == "__main__":
    main()
