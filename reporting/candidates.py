"""Report sections that compare candidates: learning curves, accuracy, correlation.

Each takes the `ReportContext` and gives HTML, or None when there is nothing to show.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from experiment.metrics import CLIP
from experiment.records import CandidateSummary
from reporting import charts
from reporting.context import ReportContext
from reporting.markup import Html
from reporting.plots import short

_CURVES = 4
_DOTS = 40
_CORRELATED = 30


def learning_curves(ctx: ReportContext) -> Html | None:
    """The best candidates; those with any finished fold while none is complete."""
    chosen = (ctx.complete or [s for s in ctx.summaries if s.best])[:_CURVES]
    shown = [c for c in (_curves(ctx, s) for s in chosen) if c.folds]
    if not shown:
        return None
    return ctx.show(
        "learning_curves",
        charts.learning_curves(shown),
        f"Log loss against epoch of {', '.join(c.label for c in shown)}",
        "The best candidates. Light lines are folds; the strong line is their mean, up to the last "
        "epoch that every fold reached.",
    )


def accuracy(ctx: ReportContext) -> Html | None:
    """OOF accuracy of the complete candidates."""
    dots = [
        charts.Dot(s.candidate.candidate, s.candidate.backbone, s.pooled_accuracy(s.best))
        for s in ctx.complete
        if s.best
    ]
    if not dots:
        return None
    shown = sorted(dots, key=lambda d: (-d.accuracy, d.candidate))[:_DOTS]
    blend = ctx.ensemble.oof_accuracy if ctx.ensemble else None
    which = f"The {_DOTS} best of {len(dots)}" if len(dots) > _DOTS else "All"
    return ctx.show(
        "accuracy",
        charts.accuracy(shown, blend, ctx.looks),
        f"OOF accuracy of {len(shown)} candidates, coloured by backbone",
        f"{which} complete candidates: the share of rows whose most probable class is right, "
        "out of fold.",
    )


def correlation(ctx: ReportContext) -> Html | None:
    """How alike the complete candidates are, row by row."""
    chosen = ctx.complete[:_CORRELATED]
    if len(chosen) < 2:
        return None
    matrix = log_prob_correlation(_true_probs(ctx, chosen))
    order = similar_side_by_side(matrix)
    ids = [chosen[i].candidate.candidate for i in order]
    names = [short(chosen[i].candidate.backbone, 32) for i in order]
    which = f"the {len(chosen)} best" if len(ctx.complete) > len(chosen) else "all"
    return ctx.show(
        "correlation",
        charts.correlation(matrix[np.ix_(order, order)], ids, names),
        f"Correlation of the OOF predictions of {len(chosen)} candidates",
        "Pearson correlation of the log-probabilities that two candidates give to the true class, "
        f"row by row, of {which} complete candidates; alike ones stand side by side. "
        "A good candidate that correlates little with the others helps a blend most.",
    )


def log_prob_correlation(true_prob: NDArray[np.floating]) -> NDArray[np.float64]:
    """(M, N) true-class probabilities -> (M, M); 0 for a member whose rows are all the same."""
    logs = np.log(np.maximum(true_prob, CLIP, dtype=np.float64))
    centred = logs - logs.mean(axis=1, keepdims=True)
    norms = np.sqrt((centred * centred).sum(axis=1, keepdims=True))  # (M, 1)
    unit = np.divide(centred, norms, out=np.zeros_like(centred), where=norms > 0)
    matrix: NDArray[np.float64] = np.clip(unit @ unit.T, -1.0, 1.0)
    np.fill_diagonal(matrix, 1.0)
    return matrix


def similar_side_by_side(matrix: NDArray[np.float64]) -> list[int]:
    """The leaves of an average-linkage tree on 1 - correlation, ordered so that neighbours are
    as alike as the tree allows (Bar-Joseph et al. 2001)."""
    from scipy.cluster.hierarchy import (  # type: ignore[import-untyped,unused-ignore]
        leaves_list,
        linkage,
    )
    from scipy.spatial.distance import (  # type: ignore[import-untyped,unused-ignore]
        squareform,
    )

    distances = squareform(1.0 - matrix, checks=False)
    tree = linkage(distances, method="average", optimal_ordering=True)
    return [int(leaf) for leaf in leaves_list(tree)]


def _true_probs(ctx: ReportContext, chosen: list[CandidateSummary]) -> NDArray[np.floating]:
    return np.stack([
        ctx.store.true_prob(s.candidate.candidate, s.best) for s in chosen if s.best
    ])  # fmt: skip


def _curves(ctx: ReportContext, summary: CandidateSummary) -> charts.CandidateCurves:
    found = (ctx.curve(summary.candidate.candidate, t.fold) for t in summary.finished)
    return charts.CandidateCurves(_label(summary), tuple(c for c in found if c is not None))


def _label(summary: CandidateSummary) -> str:
    return f"{summary.candidate.candidate} {short(summary.candidate.backbone, 32)}"
