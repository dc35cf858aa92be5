"""Report sections that compare candidates: leaderboard, learning curves, accuracy."""

from __future__ import annotations

from collections.abc import Callable

from foldrace.reporting.charts import candidates as charts
from foldrace.reporting.charts.style import short
from foldrace.reporting.content import (
    Badge,
    Cell,
    Note,
    Number,
    Part,
    Table,
    count,
    score,
    signed,
)
from foldrace.reporting.context import ReportContext
from foldrace.reporting.formats import UNKNOWN, duration
from foldrace.run_folder.records import CandidateSummary

_CURVES = 4
_DOTS = 40


def learning_curves(ctx: ReportContext) -> list[Part]:
    """Show the best candidates; those with any finished fold while none is complete."""
    chosen = (ctx.complete or [s for s in ctx.summaries if s.best])[:_CURVES]
    shown = [c for c in (_curves(ctx, s) for s in chosen) if c.folds]
    if not shown:
        return []
    return [
        ctx.chart(
            "learning_curves",
            charts.learning_curves(shown),
            f"Calibrated log loss against epoch of {', '.join(c.label for c in shown)}",
            "The best candidates, validated at a fitted temperature. Light lines are folds; the "
            "strong line is their mean, up to the last epoch that every fold reached.",
        )
    ]


def accuracy(ctx: ReportContext) -> list[Part]:
    """Show the OOF accuracy of the complete candidates."""
    dots = [
        charts.Dot(s.candidate.candidate, s.candidate.backbone, s.pooled_accuracy(s.best))
        for s in ctx.complete
        if s.best
    ]
    if not dots:
        return []
    shown = sorted(dots, key=lambda d: (-d.accuracy, d.candidate))[:_DOTS]
    blend = ctx.ensemble.oof_accuracy if ctx.ensemble else None
    which = f"The {_DOTS} best of {len(dots)}" if len(dots) > _DOTS else "All"
    return [
        ctx.chart(
            "accuracy",
            charts.accuracy(shown, blend, ctx.palette),
            f"OOF accuracy of {len(shown)} candidates, coloured by backbone",
            f"{which} complete candidates: the share of rows whose most probable class is right, "
            "out of fold.",
        )
    ]


def _curves(ctx: ReportContext, summary: CandidateSummary) -> charts.CandidateCurves:
    found = (ctx.curve(summary.candidate.candidate, t.fold) for t in summary.finished)
    return charts.CandidateCurves(_label(summary), tuple(c for c in found if c is not None))


def _label(summary: CandidateSummary) -> str:
    return f"{summary.candidate.candidate} {short(summary.candidate.backbone, 32)}"


_EXACT: dict[str, Callable[[CandidateSummary], float | None]] = {
    "oof_logloss": lambda s: s.pooled_logloss(s.best) if s.best else None,
    "oof_calibrated_logloss": lambda s: s.pooled_calibrated(s.best) if s.best else None,
    "oof_accuracy": lambda s: s.pooled_accuracy(s.best) if s.best else None,
}
"""Columns rounded from the record: the CSV's six digits, rounded again, may end one off."""


def leaderboard(ctx: ReportContext) -> list[Part]:
    """Show leaderboard.csv, best first, with the blend's members marked."""
    rows = ctx.leaderboard
    if not rows:
        return []
    columns = [c for c in rows[0] if any(row[c] for row in rows)]
    body = tuple(
        (_rank(i, row), *_weight(ctx, row), *(_cell(c, row[c], summary) for c in columns))
        for i, (row, summary) in enumerate(zip(rows, ctx.summaries, strict=True))
    )
    blended = ["in blend"] if ctx.weights else []
    marked = frozenset(i for i, row in enumerate(rows) if row["candidate"] in ctx.weights)
    return [
        Note(
            "Complete candidates come first, by oof_calibrated_logloss: the log loss at "
            "temperatures fitted fold by fold, as a submission has them; oof_logloss is "
            "uncalibrated. Only they can be compared with each other, and only they may enter the "
            "blend (shaded rows). "
            "The gain is what a candidate added to the race's blend when it was last judged, in "
            "nats per row; a later blend may gain less by it. A click on a column sorts by it."
        ),
        Table(("#", *blended, *columns), body, "Leaderboard", marked),
    ]


def _rank(index: int, row: dict[str, str]) -> Number:
    complete = row["status"] == "complete"
    return Number(str(index + 1) if complete else "", float(index + 1))


def _weight(ctx: ReportContext, row: dict[str, str]) -> list[Cell]:
    """Cell of a column that is there only when there is a blend."""
    if not ctx.weights:
        return []
    weight = ctx.weights.get(row["candidate"])
    return [Number("", None) if weight is None else score(weight, 3)]


def _hyperparameter(value: str) -> Cell:
    """A number, or the name of a table's row."""
    if not value:
        return Number(UNKNOWN, None)
    try:
        return Number(f"{float(value):.4g}", float(value))
    except ValueError:
        return value


def _cell(column: str, value: str, summary: CandidateSummary) -> Cell:
    if column in _EXACT:
        return score(_EXACT[column](summary))
    if column == "gain":
        return signed(float(value) if value else None)
    if column == "gain_se":
        return score(float(value) if value else None)
    if column.startswith("hp."):
        return _hyperparameter(value)
    if column == "seconds":
        return Number(duration(float(value)), float(value))
    if column in ("folds_done", "epochs_trained"):
        return count(int(value))
    if column == "status":
        return Badge(value)
    return value
