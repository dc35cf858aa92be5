"""Report section: the blend class by class, and the classes that it confuses."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from foldrace.core.errors import RunFolderError
from foldrace.core.metrics import confusion, precision_recall_f1
from foldrace.reporting.charts import candidates as charts
from foldrace.reporting.content import Chart, Heading, Note, Part, Table, count, score, share
from foldrace.reporting.context import ReportContext

_MATRIX_CLASSES = 40
_MISTAKES = 20


def classes(ctx: ReportContext) -> list[Part]:
    """Show precision, recall and F1 of each class, and the mistakes; empty without a blend."""
    if ctx.ensemble is None:
        return []
    predicted = _predicted(ctx)
    n = len(ctx.classes)
    counts = confusion(predicted, ctx.scored_labels, n)
    return [
        Note("Out-of-fold predictions of the blend; rows counts the scored rows of the class."),
        _class_table(ctx, predicted, counts),
        *_mistakes(ctx, counts),
        *([_matrix(ctx, counts)] if n <= _MATRIX_CLASSES else []),
    ]


def _predicted(ctx: ReportContext) -> NDArray[np.int64]:
    """Most probable class of each scored row by the blend, (N,)."""
    prob = ctx.store.blend.oof()
    expected = (len(ctx.scored_labels), len(ctx.classes))
    if prob.shape != expected:
        raise RunFolderError.single(
            f"{ctx.store.root}/ensemble/oof.npy",
            f"has the shape {prob.shape}, should have {expected}; blend again with `ensemble DIR`",
        )
    return np.asarray(prob.argmax(axis=1), dtype=np.int64)


def _class_table(
    ctx: ReportContext, predicted: NDArray[np.int64], counts: NDArray[np.int64]
) -> Table:
    scores = precision_recall_f1(predicted, ctx.scored_labels, len(ctx.classes))
    rows = tuple(
        (name, count(int(n)), score(precision), score(recall), score(f1))
        for name, n, precision, recall, f1 in zip(
            ctx.classes, counts.sum(axis=1), *scores, strict=True
        )
    )
    return Table(("class", "rows", "precision", "recall", "F1"), rows, "Classes")


def _mistakes(ctx: ReportContext, counts: NDArray[np.int64]) -> list[Part]:
    """Pairs of classes that are confused most often."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MISTAKES]
    pairs = [divmod(int(i), len(ctx.classes)) for i in order if wrong.flat[int(i)] > 0]
    if not pairs:
        return []
    of_label = counts.sum(axis=1)
    rows = tuple(
        (
            ctx.classes[a], ctx.classes[b], count(int(wrong[a, b])),
            share(float(wrong[a, b] / of_label[a])),
        )
        for a, b in pairs
    )  # fmt: skip
    headers = ("label", "predicted as", "rows", "share of the label's rows")
    return [Heading("Most frequent mistakes"), Table(headers, rows, "Mistakes")]


def _matrix(ctx: ReportContext, counts: NDArray[np.int64]) -> Chart:
    return ctx.chart(
        "confusion",
        charts.confusion(counts, ctx.classes),
        f"Confusion matrix of {len(ctx.classes)} classes",
        "Rows of each label by predicted class; the colour is the share of the label's rows.",
    )
