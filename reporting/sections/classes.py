"""Report section: what the blend does class by class, and what it takes for what.

Takes the `ReportContext`, gives HTML, or None when there is no blend.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from foldrace.core.errors import RunFolderError
from foldrace.core.metrics import confusion, precision_recall_f1
from foldrace.reporting.charts import candidates as charts
from foldrace.reporting.context import ReportContext
from foldrace.reporting.markup import Cell, Html, count, heading, join, note, percent, score, table

_MATRIX_CLASSES = 40
_MIX_UPS = 20


def classes(ctx: ReportContext) -> Html | None:
    """Precision, recall and F1 of each class, and what is taken for what."""
    if ctx.ensemble is None:
        return None
    predicted = _predicted(ctx)
    n = len(ctx.classes)
    counts = confusion(predicted, ctx.scored_labels, n)
    return join(
        _class_table(ctx, predicted, counts),
        _mix_ups(ctx, counts),
        _matrix(ctx, counts) if n <= _MATRIX_CLASSES else None,
    )


def _predicted(ctx: ReportContext) -> NDArray[np.int64]:
    """(N,) the most probable class of each scored row, by the blend."""
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
) -> Html:
    scores = precision_recall_f1(predicted, ctx.scored_labels, len(ctx.classes))
    rows = [
        [name, count(int(n)), score(precision), score(recall), score(f1)]
        for name, n, precision, recall, f1 in zip(
            ctx.classes, counts.sum(axis=1), *scores, strict=True
        )
    ]
    return join(
        note("Out-of-fold predictions of the blend; rows counts the scored rows of the class."),
        table(["class", "rows", "precision", "recall", "F1"], rows, name="Classes"),
    )


def _mix_ups(ctx: ReportContext, counts: NDArray[np.int64]) -> Html | None:
    """The pairs of classes that are mistaken most often."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MIX_UPS]
    pairs = [divmod(int(i), len(ctx.classes)) for i in order if wrong.flat[int(i)] > 0]
    if not pairs:
        return None
    rows = [
        [ctx.classes[a], ctx.classes[b], count(int(wrong[a, b])), _share(wrong, counts, a, b)]
        for a, b in pairs
    ]
    headers = ["label", "predicted as", "rows", "share of the label's rows"]
    return join(heading("Most frequent mistakes"), table(headers, rows, name="Mistakes"))


def _share(wrong: NDArray[np.int64], counts: NDArray[np.int64], a: int, b: int) -> Cell:
    share = float(wrong[a, b] / counts[a].sum())
    return Cell(percent(share), share)


def _matrix(ctx: ReportContext, counts: NDArray[np.int64]) -> Html:
    return ctx.show(
        "confusion",
        charts.confusion(counts, ctx.classes),
        f"Confusion matrix of {len(ctx.classes)} classes",
        "Rows of each label by predicted class; the colour is the share of the label's rows.",
    )
