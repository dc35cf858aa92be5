"""The one definition of the score, and the classification metrics of the report.

Takes probabilities (n, C) or predicted classes (n,) with labels (n,); gives float64 numbers.
Wrong input is a ValueError that names the row. `METRICS` is the table of what a report
shows of a blend.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from foldrace.core.class_metrics import (
    ClassCounts,
    ClassScore,
    accuracy_of,
    balanced_accuracy_of,
    macro_f1_of,
    quadratic_kappa_of,
)
from foldrace.core.errors import Problem, check_name
from foldrace.core.plugins import NO_PARTS, Parts, Table

Number = TypeVar("Number", np.int64, np.float64)

CLIP = 1e-15
"""The least probability that a row's true class may have; the score is finite because of it."""

_ABOVE_ONE = 1e-6
"""Rounding may lift a float32 probability above 1 by this much; more is an unnormalised row."""


@dataclass(frozen=True)
class MetricScore:
    """Value of one metric for a blend."""

    name: str
    value: float
    greater_is_better: bool
    se: float | None = None
    """Standard error over rows, or over groups; None where nothing tells it."""


class UnfitMetric(ValueError):
    """A metric gave no finite number."""


class ClassScores(NamedTuple):
    """Scores by class, (C,) float64 each; 0 where a class never occurs or is never predicted."""

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    f1: NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """One row of the table of metrics."""

    name: str
    doc: str
    function: Callable[[NDArray[np.float64], NDArray[np.int64]], float]
    """Probabilities (n, C) whose rows sum to 1, and labels (n,) -> a finite number."""
    greater_is_better: bool
    of_classes: ClassScore | None = None
    """The same of predicted classes alone: decision rules can be fitted to it."""
    of_row: Callable[[ArrayLike, ArrayLike], NDArray[np.float64]] | None = None
    """Predictions and labels (n,) -> the values of the rows (n,), where it is their mean."""
    is_ordinal: bool = False
    """It takes the classes in their order: it is shown only where it is chosen."""


def normalise(prob: ArrayLike) -> NDArray[np.float64]:
    """Rows (n, C) scaled to sum to 1, then clipped to [CLIP, 1]."""
    rows, sums = _rows_and_sums(prob)
    scaled: NDArray[np.float64] = rows / sums[:, None]
    return np.clip(scaled, CLIP, 1.0, out=scaled)


def read_only(array: NDArray[Number]) -> NDArray[Number]:
    """A read-only view, so that one metric cannot change what the next one gets."""
    view = array.view()
    view.flags.writeable = False
    return view


def true_class_probability(prob: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
    """Probability (n,) of each row's own label; prob (n, C), labels (n,).

    The same numbers as `normalise(prob)[row, label]`, without its (n, C) copy.
    """
    rows, sums = _rows_and_sums(prob)
    classes = _classes(labels, "label", len(rows), rows.shape[1])
    return clip_true(rows[np.arange(len(rows)), classes] / sums)


def clip_true(true_prob: ArrayLike) -> NDArray[np.float64]:
    """True-class probabilities (n,), float64, clipped to [CLIP, 1]."""
    values = np.asarray(true_prob, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"true-class probabilities have shape {values.shape}, should be (rows,)")
    wrong = ~((values >= 0.0) & (values <= 1.0 + _ABOVE_ONE))
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(f"row {row}: {values[row]} is not a probability between 0 and 1")
    return np.clip(values, CLIP, 1.0)


def row_losses(true_prob: ArrayLike) -> NDArray[np.float64]:
    """-log of the clipped true-class probabilities (n,), natural log."""
    return -np.log(clip_true(true_prob))


def log_loss_of_true(true_prob: ArrayLike) -> float:
    """The score: the mean over all rows of -log p(true class), in nats."""
    return float(row_losses(true_prob).mean())


def log_loss(prob: ArrayLike, labels: ArrayLike) -> float:
    """The score of probabilities (n, C) for labels (n,)."""
    return log_loss_of_true(true_class_probability(prob, labels))


def accuracy(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Share of rows whose class is right; predicted is (n, C) probabilities or (n,) classes."""
    guesses = _guesses(predicted, None)
    return float((guesses == _classes(labels, "label", len(guesses), None)).mean())


def macro_f1(predicted: ArrayLike, labels: ArrayLike, n_classes: int) -> float:
    """The mean F1 over the classes that occur in the labels or in the predictions."""
    guesses = _guesses(predicted, n_classes)
    return macro_f1_of(_classes(labels, "label", len(guesses), n_classes), guesses, n_classes)


def precision_recall_f1(predicted: ArrayLike, labels: ArrayLike, n_classes: int) -> ClassScores:
    """Precision, recall and F1 of each class; predicted as in `accuracy`."""
    guesses = _guesses(predicted, n_classes)
    truth = _classes(labels, "label", len(guesses), n_classes)
    counts = ClassCounts.of(truth, guesses, n_classes)
    return ClassScores(counts.precision, counts.recall, counts.f1)


def confusion(predicted: ArrayLike, labels: ArrayLike, n_classes: int) -> NDArray[np.int64]:
    """(C, C) counts: row = label, column = predicted class; predicted as in `accuracy`."""
    guesses = _guesses(predicted, n_classes)
    truth = _classes(labels, "label", len(guesses), n_classes)
    counts = np.bincount(truth * n_classes + guesses, minlength=n_classes * n_classes)
    return counts.reshape(n_classes, n_classes).astype(np.int64, copy=False)


def _rows_and_sums(prob: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Checked probabilities (n, C) and their row sums (n,), both float64."""
    rows = np.asarray(prob, dtype=np.float64)
    if rows.ndim != 2 or rows.size == 0:
        raise ValueError(f"probabilities have shape {rows.shape}, should be (rows, classes)")
    sums = rows.sum(axis=1)
    wrong = ~((rows.min(axis=1) >= 0.0) & (sums > 0.0) & (sums < np.inf))
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(f"row {row}: {_reason(rows[row])}")
    return rows, sums


def _reason(row: NDArray[np.float64]) -> str:
    """The fault of one row (C,) of probabilities, in words."""
    for column, value in enumerate(row):
        if not 0.0 <= value < np.inf:
            return f"class {column} has the probability {value}, should be finite and >= 0"
    return f"the probabilities sum to {row.sum()}, should be finite and > 0"


def _guesses(predicted: ArrayLike, n_classes: int | None) -> NDArray[np.int64]:
    """Classes (n,) from probabilities (n, C), the lowest class on a tie, or from classes (n,)."""
    values = np.asarray(predicted)
    if values.ndim != 2:
        return _classes(values, "predicted class", None, n_classes)
    rows, _ = _rows_and_sums(values)
    if n_classes not in (None, rows.shape[1]):
        raise ValueError(f"the probabilities have {rows.shape[1]} classes, should be {n_classes}")
    best: NDArray[np.int64] = rows.argmax(axis=1).astype(np.int64, copy=False)
    return best


def _classes(
    values: ArrayLike, name: str, n_rows: int | None, n_classes: int | None
) -> NDArray[np.int64]:
    """Checked class indices (n,) in [0, n_classes); None leaves that size open."""
    classes = np.asarray(values)
    if classes.ndim != 1 or classes.size == 0 or n_rows not in (None, len(classes)):
        expected = "rows" if n_rows is None else n_rows
        raise ValueError(f"{name}: the shape is {classes.shape}, should be ({expected},)")
    if not np.issubdtype(classes.dtype, np.integer):
        raise ValueError(f"{name}: the type is {classes.dtype}, should be an integer type")
    wrong = (classes < 0) | (classes >= (np.inf if n_classes is None else n_classes))
    if wrong.any():
        row = int(wrong.argmax())
        allowed = ">= 0" if n_classes is None else f"in 0..{n_classes - 1}"
        raise ValueError(f"row {row}: the {name} is {classes[row]}, should be {allowed}")
    indices: NDArray[np.int64] = classes.astype(np.int64, copy=False)
    return indices


def most_probable(predictions: NDArray[Any]) -> NDArray[np.int64]:
    """Classes (n,) of probabilities (n, C), the lowest on a tie; classes are given back."""
    classes = predictions.argmax(axis=1) if predictions.ndim == 2 else predictions
    return np.asarray(classes, dtype=np.int64)


def _hits(predicted: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(most_probable(np.asarray(predicted)) == labels, dtype=np.float64)


def _of_classes(
    name: str, doc: str, score: ClassScore, is_mean: bool = False, is_ordinal: bool = False
) -> Metric:
    """A metric of predicted classes, the most probable ones where probabilities are given."""
    return Metric(
        name,
        doc,
        lambda prob, labels: score(labels, most_probable(prob), prob.shape[1], None),
        greater_is_better=True,
        of_classes=score,
        of_row=_hits if is_mean else None,
        is_ordinal=is_ordinal,
    )


_SHOWN = 8
"""Classes that a message names."""
LOG_LOSS = "log_loss"
METRICS = Table(
    Metric,
    "metric",
    (
        Metric(
            LOG_LOSS,
            "the score: mean of -log p(true class)",
            log_loss,
            False,
            of_row=lambda prob, labels: row_losses(true_class_probability(prob, labels)),
        ),
        _of_classes("accuracy", "share of rows whose class is right", accuracy_of, is_mean=True),
        _of_classes("macro_f1", "mean F1 over the classes", macro_f1_of),
        _of_classes("balanced_accuracy", "mean recall over the classes", balanced_accuracy_of),
        _of_classes(
            "qwk", "Cohen's kappa with quadratic weights", quadratic_kappa_of, is_ordinal=True
        ),
    ),
)


def check_metric(name: str, parts: Parts = NO_PARTS) -> Problem | None:
    """Say what is wrong with the name in `ensemble.metric`, or None."""
    return check_name("ensemble.metric", name, parts[METRICS])


def order_problem(name: str, classes: Sequence[str], parts: Parts = NO_PARTS) -> Problem | None:
    """Tell the order of classes that a metric takes them in, where their names have no numbers."""
    metric = parts[METRICS].get(name)
    if metric is None or not metric.is_ordinal or all(re.search(r"\d", c) for c in classes):
        return None
    order = " < ".join(classes if len(classes) <= _SHOWN else (*classes[:_SHOWN], "..."))
    return Problem(
        "ensemble.metric",
        f"{name} takes the classes in the order of their names, {order}; where they have another "
        "order, number them (0_none, 1_mild, ...); where they have none, it means nothing",
    )


def metric_value(metric: Metric, prob: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """The metric of prob (n, C) for labels (n,); UnfitMetric where it is no finite number."""
    found = metric.function(read_only(prob), read_only(labels))
    try:
        value = float(found)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise UnfitMetric(f"gives {found!r:.60}, should be a finite number")
    return value
