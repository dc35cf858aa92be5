"""Report sections that compare candidates: learning curves and accuracy.

Each takes the `ReportContext` and gives HTML, or None when there is nothing to show.
"""

from __future__ import annotations

from experiment.records import CandidateSummary
from reporting import charts
from reporting.context import ReportContext
from reporting.markup import Html
from reporting.plots import short

_CURVES = 4
_DOTS = 40


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


def _curves(ctx: ReportContext, summary: CandidateSummary) -> charts.CandidateCurves:
    found = (ctx.curve(summary.candidate.candidate, t.fold) for t in summary.finished)
    return charts.CandidateCurves(_label(summary), tuple(c for c in found if c is not None))


def _label(summary: CandidateSummary) -> str:
    return f"{summary.candidate.candidate} {short(summary.candidate.backbone, 32)}"
