"""Planted label errors: how many are found, and how many of those named are right.

5 % of the labels of photos of hands and of small photos are another class, drawn uniformly. A short
`foldrace run` over the hands, and the three folds of one candidate on the photos
(`sides/planted_errors.py`), give the blend's calibrated OOF probabilities; `random forest` gives
those of a weaker learner on 16 px pixels, at a temperature of its own.

foldrace              the rows that `foldrace labels` names (`evaluation/confident_learning.py`)
cleanlab              `find_label_issues` as it is, of the same probabilities
cleanlab, RULE        its other rules

`precision` and `recall` are at the number that each names; `average_precision` is of each one's
order of all rows (foldrace: log p(best other class) - log p(label); cleanlab: p(label)), whatever
is named. `--data` is a folder with a folder a set, each with train.zip. `--record FOLDER` keeps the
runs, so that a second call only counts.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cleanlab.filter
import numpy as np
from harness import Options, Results, options
from numpy.typing import NDArray
from PIL import Image
from sides.planted_errors import Learner, PlantedErrors, fold_trials, plant, sweep
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold

from foldrace.core.temperature import at_temperature, fit_temperature
from foldrace.evaluation.confident_learning import estimate_noise
from foldrace.evaluation.rows import oof_rows
from foldrace.run_folder.store import RunStore

_SHARE = 0.05
_SWEEPS = {
    "sign_digits": Learner("timm/test_resnet, timm/test_efficientnet", 3, epochs=14, size=40)
}
_TRIALS = {"small_photos": Learner("timm/test_resnet", 1, epochs=12, size=32)}
_RULES = ("both", "confident_learning", "prune_by_class")
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Oof:
    """Out-of-fold probabilities, and what is known of the labels."""

    part: str
    prob: Floats
    labels: NDArray[np.int64]
    wrong: NDArray[np.bool_]


def _of_run(name: str, planted: PlantedErrors, run: Path) -> Oof:
    found = oof_rows(RunStore.open(run))
    row_of = {path: row for row, path in enumerate(planted.files)}
    rows = np.array([row_of[path] for path in found.paths])
    true = planted.true[rows]
    right = float((found.predicted == true).mean())
    return Oof(f"{name}: foldrace run, {100 * right:.1f} % right", found.prob, found.labels,
               planted.wrong[rows])  # fmt: skip


def _of_forest(name: str, planted: PlantedErrors, folder: Path) -> Oof:
    images = [Image.open(folder / file).convert("RGB").resize((16, 16)) for file in planted.files]
    pixels = np.stack([np.asarray(image, dtype=np.float32).ravel() for image in images])
    prob = np.zeros((len(pixels), len(planted.classes)))
    for fit, score in StratifiedKFold(3, shuffle=True, random_state=0).split(pixels, planted.given):
        forest = RandomForestClassifier(150, min_samples_leaf=2, random_state=0)
        prob[score] = forest.fit(pixels[fit], planted.given[fit]).predict_proba(pixels[score])
    logs = np.log(0.999 * prob + 0.001 / prob.shape[1]).astype(np.float32)
    prob = np.exp(at_temperature(logs, fit_temperature(logs, planted.given)), dtype=np.float64)
    right = float((prob.argmax(axis=1) == planted.true).mean())
    return Oof(f"{name}: random forest, {100 * right:.1f} % right", prob, planted.given,
               planted.wrong)  # fmt: skip


def _named(oof: Oof) -> Iterator[tuple[str, NDArray[np.bool_], Floats]]:
    """Side, the rows that it names, and a score by which it orders all rows."""
    rows = np.arange(len(oof.labels))
    own = oof.prob[rows, oof.labels]
    others = oof.prob.copy()
    others[rows, oof.labels] = 0.0
    suspects = np.zeros(len(rows), dtype=np.bool_)
    suspects[estimate_noise(oof.prob, oof.labels).suspects] = True
    yield "foldrace", suspects, np.log(others.max(axis=1) / np.maximum(own, 1e-15))
    yield "cleanlab", cleanlab.filter.find_label_issues(oof.labels, oof.prob, n_jobs=1), -own
    for rule in _RULES:
        found = cleanlab.filter.find_label_issues(oof.labels, oof.prob, filter_by=rule, n_jobs=1)
        yield f"cleanlab, {rule}", found, -own


def _count(results: Results, oof: Oof) -> None:
    figures = {}
    for side, named, order in _named(oof):
        hits = int((named & oof.wrong).sum())
        precision, recall = hits / max(int(named.sum()), 1), hits / int(oof.wrong.sum())
        figures[side] = precision, recall
        results.add(
            oof.part, side=side, rows=len(named), planted=int(oof.wrong.sum()),
            named=int(named.sum()), precision=precision, recall=recall,
            f1=2 * hits / (int(named.sum()) + int(oof.wrong.sum())),
            average_precision=float(average_precision_score(oof.wrong, order)),
        )  # fmt: skip
    for i, name in enumerate(("precision", "recall")):
        ours, theirs = figures["foldrace"][i], figures["cleanlab"][i]
        results.at_least(f"{oof.part}: {name} less cleanlab's", 0.0, ours - theirs)


def _seconds(results: Results) -> None:
    """Of what `labels` computes on 33,000 rows of 396 classes, without images."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 396, 33_000)
    prob = rng.dirichlet(np.full(396, 0.02), 33_000) * 0.5
    prob[np.arange(len(labels)), labels] += 0.5
    started = time.perf_counter()
    estimate_noise(prob, labels)
    ours = time.perf_counter() - started
    started = time.perf_counter()
    cleanlab.filter.find_label_issues(labels, prob, n_jobs=1)
    theirs = time.perf_counter() - started
    results.add("seconds, 33,000 rows of 396 classes", foldrace=ours, cleanlab=theirs)


def measure(given: Options, data: Path, work: Path) -> Results:
    results = Results("label_errors")
    for name, learner in (_SWEEPS | _TRIALS).items():
        folder = work / name
        folder.mkdir(parents=True, exist_ok=True)
        planted = plant(data / name / "train.zip", folder, _SHARE, seed=0)
        _count(results, _of_forest(name, planted, folder))
        if not given.quick:
            train = sweep if name in _SWEEPS else fold_trials
            _count(results, _of_run(name, planted, train(folder, learner)))
    _seconds(results)
    return results


def main() -> None:
    given = options(
        __doc__, data="folder of image sets", record="folder that keeps the runs over them"
    )
    if given.data is None:
        raise SystemExit("--data: should name a folder with sign_digits/ and small_photos/")
    with tempfile.TemporaryDirectory(prefix="label-errors-") as temporary:
        measure(given, given.data, given.record or Path(temporary)).publish(given)


if __name__ == "__main__":
    main()
