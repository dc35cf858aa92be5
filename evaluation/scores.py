"""How good the predictions of labelled images are: metrics with standard errors, and by class.

Takes an `EvaluatedRows`, gives frozen records. A metric of classes is that of the predicted ones,
which follow the blend's decision rule; the log loss is that of the probabilities.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foldrace.core.class_metrics import ClassCounts, Classes, Weights
from foldrace.core.metrics import Metric, MetricScore, UnfitMetric, confusion, normalise, read_only
from foldrace.core.plugin_files import error_with_place
from foldrace.core.plugins import NO_PARTS, Parts
from foldrace.core.standard_errors import measure, shown_metrics
from foldrace.evaluation.rows import EvaluatedRows

_log = logging.getLogger("foldrace")


@dataclass(frozen=True)
class ClassRow:
    """One class of the table of classes."""

    name: str
    rows: int
    predicted: int
    """Number of rows that are predicted as it."""
    precision: float
    recall: float
    f1: float
    mean_loss: float
    """Mean of -log p(label) over its rows, in nats; 0 without any."""


@dataclass(frozen=True)
class ConfusedPair:
    """Rows of one label that are predicted as one other class."""

    label: str
    predicted: str
    rows: int
    share: float
    """Share of the label's rows."""


@dataclass(frozen=True, eq=False)
class Scores:
    """The scores of one set of rows."""

    metrics: tuple[MetricScore, ...]
    classes: tuple[ClassRow, ...]
    confusion: NDArray[np.int64]
    """(C, C) counts: row = label, column = predicted class."""
    pairs: tuple[ConfusedPair, ...]
    """Every confusion that occurs, the most frequent first."""

    def metric(self, name: str) -> MetricScore:
        """The score by one of `metrics`."""
        return next(score for score in self.metrics if score.name == name)


def scores(found: EvaluatedRows, parts: Parts = NO_PARTS, chosen: str = "") -> Scores:
    """The scores of at least one row; `chosen` is the user's `ensemble.metric`.

    A plugin's metric that fails is left out, with a warning in the log.
    """
    counts = confusion(found.predicted, found.labels, len(found.classes))
    return Scores(
        metrics=tuple(_metrics(found, parts, chosen)),
        classes=tuple(_class_rows(found, counts)),
        confusion=counts,
        pairs=tuple(confused_pairs(counts, found.classes)),
    )


def confused_pairs(counts: NDArray[np.int64], names: tuple[str, ...]) -> Iterator[ConfusedPair]:
    """The confusions of (C, C) counts, the most frequent first."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    of_label = counts.sum(axis=1)
    for place in np.argsort(-wrong, axis=None, kind="stable")[: np.count_nonzero(wrong)]:
        a, b = divmod(int(place), len(names))
        rows = int(wrong[a, b])
        yield ConfusedPair(names[a], names[b], rows, rows / int(of_label[a]))


def _class_rows(found: EvaluatedRows, counts: NDArray[np.int64]) -> Iterator[ClassRow]:
    of = ClassCounts.of(found.labels, found.predicted, len(found.classes))
    loss = np.bincount(found.labels, found.losses, len(found.classes))
    for i, name in enumerate(found.classes):
        rows = int(of.actual[i])
        yield ClassRow(
            name, rows, int(counts[:, i].sum()), float(of.precision[i]), float(of.recall[i]),
            float(of.f1[i]), float(loss[i]) / max(rows, 1),
        )  # fmt: skip


def _metrics(found: EvaluatedRows, parts: Parts, chosen: str) -> Iterator[MetricScore]:
    prob, labels = normalise(found.prob), read_only(found.labels)
    for metric in (*shown_metrics(parts, chosen), *_FURTHER):
        given = prob if metric.of_classes is None else found.predicted
        try:
            yield measure(metric, given, labels, len(found.classes), found.groups).score
        except UnfitMetric as error:
            _log.warning("metric %s is left out: it %s", metric.name, error)
        except Exception as error:  # a user's own metric may raise anything
            _log.warning("metric %s is left out: %s", metric.name, error_with_place(error))


def _weighted(column: Callable[[ClassCounts], NDArray[np.float64]]) -> Callable[..., float]:
    """A mean over the classes, each with the weight of its rows."""

    def score(
        labels: Classes, predicted: Classes, n_classes: int, weights: Weights | None = None
    ) -> float:
        counts = ClassCounts.of(labels, predicted, n_classes, weights)
        return float(np.average(column(counts), weights=counts.actual))

    return score


def _macro_precision(
    labels: Classes, predicted: Classes, n_classes: int, weights: Weights | None = None
) -> float:
    """The mean precision over the classes that occur in the labels or in the predictions."""
    counts = ClassCounts.of(labels, predicted, n_classes, weights)
    return float(counts.precision[counts.predicted + counts.actual > 0].mean())


def _macro_recall(
    labels: Classes, predicted: Classes, n_classes: int, weights: Weights | None = None
) -> float:
    """The mean recall over the same classes, as scikit-learn has it."""
    counts = ClassCounts.of(labels, predicted, n_classes, weights)
    return float(counts.recall[counts.predicted + counts.actual > 0].mean())


def _further(name: str, doc: str, score: Callable[..., float]) -> Metric:
    return Metric(name, doc, lambda prob, labels: 0.0, greater_is_better=True, of_classes=score)


_FURTHER = (
    _further("weighted_f1", "mean F1 over the rows", _weighted(lambda c: c.f1)),
    _further("macro_precision", "mean precision over the classes", _macro_precision),
    _further("macro_recall", "mean recall over the classes", _macro_recall),
    _further(
        "weighted_precision", "mean precision over the rows", _weighted(lambda c: c.precision)
    ),
    _further("weighted_recall", "mean recall over the rows", _weighted(lambda c: c.recall)),
)
