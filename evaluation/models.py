"""The blend's models run on labelled images: a labelled set, or the images they were trained on.

Takes a `Predictor`, gives an `EvaluatedRows`. Needs torch; stored OOF rows are
`evaluation.rows.oof_rows`'.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from foldrace.core.errors import RunFolderError
from foldrace.core.metrics import normalise
from foldrace.dataset.folds import HELD_OUT
from foldrace.dataset.manifest import Manifest
from foldrace.evaluation.labelled import LabelledImages
from foldrace.evaluation.rows import EvaluatedRows
from foldrace.inference.predictor import Predictor

OnModel = Callable[[int], None]


def labelled_rows(
    predictor: Predictor, images: LabelledImages, on_model: OnModel
) -> tuple[EvaluatedRows, float]:
    """What the blend and each of its members say of labelled images, and the blend's seconds.

    `on_model` is called with how many models have run.
    """
    started = time.perf_counter()
    prob = predictor.probabilities(images.files, on_model)
    seconds = time.perf_counter() - started
    alone = predictor.member_probabilities(images.files, on_model)
    found = EvaluatedRows(
        paths=images.paths,
        labels=images.labels,
        classes=predictor.classes,
        prob=prob,
        predicted=predictor.decide(prob),
        members=alone,
    )
    return found, seconds


def trained_rows(predictor: Predictor, data: Manifest, on_model: OnModel) -> EvaluatedRows:
    """What the fold models say of images that they were trained on.

    The geometric mean of the folds' blends that have trained on a row, at the blend's temperature.
    A row that no such blend has (with repeats a fold's blend is that of one model a repeat, and
    each repeat leaves other rows out) is left out. RunFolderError where that is every row.
    """
    seen = trained_on(predictor)
    total: NDArray[np.float64] = np.zeros((len(data), len(predictor.classes)))
    files = [data.file(row) for row in range(len(data))]
    for fold, log_prob in enumerate(predictor.fold_log_probabilities(files, on_model)):
        total += np.where(seen[fold][:, None], log_prob, 0.0)
    rows = np.flatnonzero(seen.any(axis=0))
    if not len(rows):
        message = "leaves every image out of some repeat of each fold: none is only trained on"
        raise RunFolderError.single(f"{predictor.store.root}/folds.csv", message)
    mean = total[rows] / seen.sum(axis=0)[rows, None] / predictor.ensemble.blend_temperature
    prob = normalise(np.exp(mean - mean.max(axis=1, keepdims=True)))
    folds = predictor.store.folds()
    return EvaluatedRows(
        paths=tuple(data.image_paths[row] for row in rows),
        labels=predictor.store.labels()[rows],
        classes=predictor.classes,
        prob=prob,
        predicted=predictor.decide(prob),
        splits=tuple(split[rows] for split in folds.by_repeat),
        groups=None if folds.group_numbers is None else folds.group_numbers[rows],
    )


def trained_on(predictor: Predictor) -> NDArray[np.bool_]:
    """(K, n) rows that all models of a fold's blend were trained on."""
    folds = predictor.store.folds()
    of_repeats = np.where(folds.by_repeat >= 0, folds.by_repeat % folds.k, folds.by_repeat)
    seen = [
        ((of_repeats != fold) & (of_repeats != HELD_OUT)).all(axis=0) for fold in range(folds.k)
    ]
    return np.stack(seen)
