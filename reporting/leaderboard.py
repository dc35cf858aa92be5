"""Report section: leaderboard.csv as a table that can be sorted.

Takes the `ReportContext`, gives HTML, or None while there is no candidate.
"""

from __future__ import annotations

from collections.abc import Callable

from experiment.records import CandidateSummary
from reporting.context import ReportContext
from reporting.markup import (
    UNKNOWN,
    Cell,
    Html,
    count,
    difference,
    duration,
    join,
    note,
    score,
    table,
    text,
)

_EXACT: dict[str, Callable[[CandidateSummary], float | None]] = {
    "oof_logloss": lambda s: s.pooled_logloss(s.best) if s.best else None,
    "oof_accuracy": lambda s: s.pooled_accuracy(s.best) if s.best else None,
    "last_fold_logloss": lambda s: s.last_fold_logloss,
}
"""Columns rounded from the record: the CSV's six digits, rounded again, may end one off."""


def leaderboard(ctx: ReportContext) -> Html | None:
    """leaderboard.csv, best first, with the blend's members marked."""
    rows = ctx.leaderboard
    if not rows:
        return None
    columns = [c for c in rows[0] if any(row[c] for row in rows)]
    body = [
        [_rank(i, row), *_weight(ctx, row), *(_cell(c, row[c], summary) for c in columns)]
        for i, (row, summary) in enumerate(zip(rows, ctx.summaries, strict=True))
    ]
    blended = ["in blend"] if ctx.weights else []
    marked = [i for i, row in enumerate(rows) if row["candidate"] in ctx.weights]
    return join(
        note(
            "Complete candidates come first, by OOF log loss; only they can be compared with each",
            "other, and only they may enter the blend (shaded rows).",
            "The gain is what a candidate added to the race's blend when it was last judged, in",
            "nats a row; a later blend may gain less by it. A click on a column sorts by it.",
        ),
        table(["#", *blended, *columns], body, marked, name="Leaderboard"),
    )


def _rank(index: int, row: dict[str, str]) -> Cell:
    complete = row["status"] == "complete"
    return Cell(str(index + 1) if complete else "", float(index + 1))


def _weight(ctx: ReportContext, row: dict[str, str]) -> list[Cell]:
    """A column that is there only when there is a blend."""
    if not ctx.weights:
        return []
    weight = ctx.weights.get(row["candidate"])
    return [Cell("", None) if weight is None else score(weight, 3)]


def _hyperparameter(value: str) -> object:
    """A number, or the name of a table's row."""
    if not value:
        return Cell(UNKNOWN, None)
    try:
        return Cell(f"{float(value):.4g}", float(value))
    except ValueError:
        return value


def _cell(column: str, value: str, summary: CandidateSummary) -> object:
    if column in _EXACT:
        return score(_EXACT[column](summary))
    if column == "gain":
        return Cell(difference(float(value)), float(value)) if value else Cell(UNKNOWN, None)
    if column == "gain_se":
        return score(float(value)) if value else Cell(UNKNOWN, None)
    if column.startswith("hp."):
        return _hyperparameter(value)
    if column == "seconds":
        return Cell(duration(float(value)), float(value))
    if column in ("folds_done", "epochs_trained"):
        return count(int(value))
    if column == "status":
        return Html(f'<span class="status {text(value)}">{text(value)}</span>')
    return value
