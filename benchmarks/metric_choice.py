"""What `ensemble.metric: macro_f1` gains on held-out images of unbalanced data.

Images are thinned to a long tail (the rarest class has a tenth of the most frequent one's), half of
them are held out, likewise unbalanced; scikit-learn's classifiers give out-of-fold probabilities on
the other half, from which `auto` chooses by log loss, and again with macro-F1 for the last
selection. The held-out images are predicted as a run predicts them: the geometric mean over the
fold models. Which images are thinned and held out is drawn anew each time.

digits       scikit-learn's handwritten digits, noised (`sides/digit_models.py`)
sign_digits  photos of hands, 16 px, grey; `--data` names the folder with sign_digits' train.zip
             (left out without it)

Columns, means over draws: macro-F1 of the blend of the least log loss; the gain by the selection
alone, and by selection and decision rule, each with its standard error over the images of one draw
(`se_images`, a paired bootstrap) and over draws (`se_draws`; they share images, so that it is too
small rather than too large); `crossfitted`: the gain that the selection promised; `kept`: the share
of the draws with another blend, or with a decision rule; `accuracy`: its change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from harness import Results, options
from numpy.typing import NDArray
from sides.digit_models import noised_digits
from sklearn.base import clone
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, train_test_split
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from foldrace.config.schema import DataConfig
from foldrace.core.metrics import METRICS, normalise
from foldrace.core.standard_errors import Measured, measure
from foldrace.core.temperature import at_temperature
from foldrace.dataset.images import read_rgb
from foldrace.dataset.manifest import read_manifest
from foldrace.ensemble.calibration import (
    CalibrationChoice,
    choose_method,
    final_fit,
    methods_to_try,
)
from foldrace.ensemble.decisions import decide
from foldrace.ensemble.fold_mean import fold_mean
from foldrace.ensemble.methods import AUTO, fit_method
from foldrace.ensemble.metric_choice import pick_by_metric
from foldrace.ensemble.pool import MemberRows, Pool, member_rows
from foldrace.ensemble.pooling import Fit, Settings, pool_terms

_FOLDS = 5
_RAREST = 0.1
_SIDE = 16  # pixels
_METRIC = METRICS["macro_f1"]
Floats = NDArray[np.float64]
Labels = NDArray[np.int64]


def _learners() -> list[object]:
    return [
        make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500)),
        make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=500)),
        LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"),
        make_pipeline(StandardScaler(), GaussianNB(var_smoothing=0.1)),
        KNeighborsClassifier(10, weights="distance"),
        ExtraTreesClassifier(60, random_state=0),
        ExtraTreesClassifier(60, min_samples_leaf=3, random_state=1),
    ]


def sign_digits(folder: Path) -> tuple[Floats, Labels]:
    """Pixels (n, 256) in grey, and labels (n,)."""
    manifest = read_manifest(DataConfig(train=str((folder / "train.zip").resolve())))
    images = (read_rgb(manifest.file(row), _SIDE) for row in range(len(manifest)))
    pixels = [np.asarray(i.convert("L").resize((_SIDE, _SIDE))).ravel() / 255.0 for i in images]
    return np.stack(pixels), manifest.labels


def long_tail(labels: Labels, rng: np.random.Generator) -> NDArray[np.intp]:
    """Rows of which each class, in an order drawn by chance, has fewer than the one before."""
    classes = rng.permutation(np.unique(labels))
    shares = _RAREST ** (np.arange(len(classes)) / (len(classes) - 1))
    kept = [
        rng.permutation(np.flatnonzero(labels == c))[: round(share * (labels == c).sum())]
        for c, share in zip(classes, shares, strict=True)
    ]
    return np.sort(np.concatenate(kept))


@dataclass(frozen=True, eq=False)
class Draw:
    """M members on the rows of the selection, and their fold models on the held-out ones."""

    rows: MemberRows
    held: NDArray[np.float32]  # (folds, M, n, C) log-probabilities
    labels: Labels  # (n,) of the held-out rows


def draw(pixels: Floats, labels: Labels, seed: int) -> Draw:
    rng = np.random.default_rng(seed)
    kept = long_tail(labels, rng)
    train, test = train_test_split(kept, test_size=0.5, stratify=labels[kept], random_state=seed)
    own, n_classes, learners = labels[train], int(labels.max()) + 1, _learners()
    folds = np.empty(len(train), dtype=np.int64)
    oof = np.empty((len(learners), len(train), n_classes), dtype=np.float32)
    held = np.empty((_FOLDS, len(learners), len(test), n_classes), dtype=np.float32)
    split = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed).split(train, own)
    for fold, (fit_on, score) in enumerate(split):
        folds[score] = fold
        for m, learner in enumerate(learners):
            model = clone(learner).fit(pixels[train[fit_on]], own[fit_on])
            oof[m, score] = _log_prob(model, pixels[train[score]])
            held[fold, m] = _log_prob(model, pixels[test])
    return Draw(member_rows(list(oof), own, folds), held, labels[test])


def _log_prob(model: Any, pixels: Floats) -> NDArray[np.float32]:
    """A learner that is sure of what it has seen twice is not: a part in a thousand is shared."""
    prob = model.predict_proba(pixels)
    return np.log(normalise(0.999 * prob + 0.001 / prob.shape[1])).astype(np.float32)


def predicted(found: Draw, fit: Fit, temperatures: Floats, blend: float) -> Floats:
    """(n, C) as `Predictor` joins the fold models."""

    def of_fold(fold: NDArray[np.float32]) -> Floats:
        members = ((int(m), at_temperature(fold[m], float(temperatures[m]))) for m in fit.used)
        return np.asarray(np.log(normalise(pool_terms(fit.combiner, members))))

    return fold_mean(map(of_fold, found.held), blend).prob


def arms(found: Draw) -> Iterator[tuple[str, Labels, float, bool]]:
    """Each way to choose: held-out classes, the cross-fitted gain, and whether it moved."""
    rows = found.rows

    def fit(method: str, pool: Pool) -> Fit:
        return fit_method(method, pool, Settings())

    def held_out(one: Callable[[Pool], Fit], choice: CalibrationChoice) -> tuple[Floats, Floats]:
        chosen, temperature, prob = final_fit(rows, one, choice)
        own = rows.temperatures[0] if choice.members else np.ones(len(rows.members))
        return prob, predicted(found, chosen, own, temperature)

    choice = choose_method(rows, methods_to_try(AUTO), fit)
    _, prob = held_out(partial(fit, choice.method), choice.calibration)
    yield "log loss", prob.argmax(axis=1), 0.0, False
    pick = pick_by_metric(rows, choice, fit, _METRIC, range(len(rows.members)))
    own, prob = held_out(pick.fit, pick.calibration)
    first, kept = pick.record.tried[0], pick.record.tried[pick.record.kept]
    yield "selection", prob.argmax(axis=1), kept.value - first.value, pick.record.kept > 0
    rule = pick.final_record(own, rows.labels).rule
    promised = pick.record.value - first.value
    yield "selection and rule", decide(rule, prob), promised, rule is not None


def _scored(found: Draw) -> dict[str, tuple[Measured, float, float, bool]]:
    n_classes = found.rows.n_classes
    return {
        name: (
            measure(_METRIC, classes, found.labels, n_classes),
            float((classes == found.labels).mean()),
            promised,
            moved,
        )
        for name, classes, promised, moved in arms(found)
    }


def main() -> None:
    given = options(__doc__, data="the folder with sign_digits' train.zip")
    results = Results("metric_choice")
    pixels, labels, _ = noised_digits()
    sources = {"digits": (pixels, labels)}
    if given.data is not None:
        sources["sign_digits"] = sign_digits(given.data)
    for name, (x, y) in sources.items():
        draws = [_scored(draw(x, y, seed)) for seed in range(2 if given.quick else 10)]
        for arm in list(draws[0])[1:]:
            pairs = [(d[arm], d["log loss"]) for d in draws]
            gains = np.array([a[0].better_by(b[0]) for a, b in pairs], dtype=np.float64)
            results.add(
                f"{name}, {len(draws)} draws",
                arm=arm,
                macro_f1_log_loss=float(np.mean([b[0].value for _, b in pairs])),
                gain=float(gains[:, 0].mean()),
                se_images=float(gains[:, 1].mean()),
                se_draws=float(gains[:, 0].std(ddof=1) / np.sqrt(len(gains))),
                crossfitted=float(np.mean([a[2] for a, _ in pairs])),
                kept=float(np.mean([a[3] for a, _ in pairs])),
                accuracy=float(np.mean([a[1] - b[1] for a, b in pairs])),
            )
    results.publish(given)


if __name__ == "__main__":
    main()
