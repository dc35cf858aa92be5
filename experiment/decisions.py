"""The text of decisions.csv: every race and stopping decision with its numbers.

Takes the candidates' summaries. Column names and their order are a contract with users' scripts.
"""

from __future__ import annotations

from collections.abc import Iterable

from experiment.leaderboard import csv_text, number
from experiment.records import CandidateSummary, RaceDecision

COLUMNS = (
    "number", "candidate", "fold", "epoch", "rule", "action", "variant", "folds_done", "rows",
    "gain", "gain_se", "z", "score", "limit", "complete", "blend_logloss", "epochs_trained",
    "reason",
)  # fmt: skip


def decisions_csv(summaries: Iterable[CandidateSummary]) -> str:
    """One row a decision, in the order in which they were made."""
    decisions = sorted((d for s in summaries for d in s.decisions), key=lambda d: d.number)
    return csv_text(COLUMNS, (_row(decision) for decision in decisions))


def _row(decision: RaceDecision) -> list[object]:
    values = (getattr(decision, column) for column in COLUMNS)
    return [number(value) if isinstance(value, float) else value for value in values]
