"""How the folds' predictions of a test image are joined: arithmetic or geometric mean.

Of each image set one `foldrace run DATA --time 10m`, then with the hidden labels of its test
images: the log loss of one fold's models (mean over the folds), of the arithmetic mean of their
probabilities, and of the geometric one, which is what is submitted; `difference` of the two with
its standard error over images, and the inverse temperature that would suit each mean best, found
with the labels (1: it needs none).

`--only clothing,digits` runs these sets alone. `--record FOLDER` keeps the run folders, and takes
those that are there. `IMAGE_SETS` (environment variable): see `sides/image_sets.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from harness import ROOT, Results, environment, options
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from sides.image_sets import IMAGE_SETS, test_labels, write_image_set

from foldrace.core.metrics import CLIP
from foldrace.dataset.test_set import read_test_set
from foldrace.inference.predictor import Predictor, _Images

_SETS = ("hard_digits", "sign_digits", "small_photos", "clothing")
Floats = NDArray[np.float64]


def _run(name: str, folder: Path, seconds: int) -> Path:
    """The run folder of an image set; `folder` gets its images and labels, too."""
    data = write_image_set(IMAGE_SETS[name], folder)
    run = folder / "run"
    if not run.is_dir():
        words = [sys.executable, str(ROOT / "sweep.py"), "run", str(data), "--out", str(run)]
        env = environment() | {"HF_HUB_OFFLINE": "1"}
        subprocess.run([*words, "--time", f"{seconds}s"], env=env, capture_output=True, check=True)
    return run


def _of_folds(run: Path, folder: Path) -> tuple[Floats, NDArray[np.int64]]:
    """(K, n, C) log-probabilities of each fold's models, and the test images' classes (n,)."""
    predictor = Predictor(str(run))
    test = read_test_set(predictor.store.config().data, predictor.classes)
    assert test is not None
    rows = np.arange(len(test))
    images = _Images(tuple(test.file(row) for row in rows), test.ids, rows)
    cold = np.array([*predictor._of_folds(images, lambda done: None)])
    labels = test_labels(folder)
    true = [predictor.classes.index(labels[Path(name).stem]) for name in test.ids]
    return _logs(cold / predictor.ensemble.blend_temperature), np.array(true)


def _logs(logits: Floats) -> Floats:
    """Log-probabilities of logits, at least those of the metric's clip."""
    logits = logits - logits.max(axis=-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return np.maximum(logits, np.log(CLIP))


def _compare(name: str, folds: Floats, true: NDArray[np.int64], results: Results) -> None:
    def losses(log_prob: Floats) -> Floats:
        return -log_prob[..., np.arange(len(true)), true]

    def best(log_prob: Floats) -> float:
        found = minimize_scalar(
            lambda factor: losses(_logs(factor * log_prob)).mean(),
            bounds=(0.3, 3),
            method="bounded",
        )
        return float(found.x)

    arithmetic = _logs(np.log(np.exp(folds).mean(axis=0)))
    geometric = _logs(folds.mean(axis=0))
    gain = losses(geometric) - losses(arithmetic)
    results.add(
        "held-out log loss",
        set=name,
        folds=len(folds),
        images=len(true),
        one_fold=float(losses(folds).mean()),
        arithmetic=float(losses(arithmetic).mean()),
        geometric=float(losses(geometric).mean()),
        difference=float(gain.mean()),
        se=float(gain.std(ddof=1) / np.sqrt(len(gain))),
        arithmetic_wants=best(arithmetic),
        geometric_wants=best(geometric),
    )


def main() -> None:
    """Print the table and write the JSON."""
    given = options(__doc__, record="folder of the runs", only="image sets, with commas")
    results = Results("fold_mean")
    names = given.only.split(",") if given.only else ["digits"] if given.quick else _SETS
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["FOLDRACE_CACHE"] = f"{scratch}/cache"
        for name in names:
            folder = (given.record or Path(scratch)) / name
            run = _run(name, folder, 60 if given.quick else 600)
            _compare(name, *_of_folds(run, folder), results)
    results.publish(given)


if __name__ == "__main__":
    main()
