"""The text of decisions.csv: every race and stopping decision with its numbers.

Takes the candidates' summaries. Column names and their order are a contract with users' scripts.

The texts of leaderboard.csv and trials.csv, from the candidates' summaries.

Column names and their order are a contract with users' scripts.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from foldrace.run_folder.records import CandidateSummary, RaceDecision

_LEADERBOARD = (
    "candidate", "backbone", "status", "folds_done", "variant", "oof_logloss", "oof_accuracy",
    "last_fold_logloss", "gain", "gain_se", "epochs_trained", "seconds",
)  # fmt: skip
_TRIALS = (
    "candidate", "fold", "status", "variant", "val_logloss", "best_epoch", "epochs_trained",
    "seconds", "node", "device",
)  # fmt: skip


def leaderboard_csv(summaries: Sequence[CandidateSummary]) -> str:
    """Complete candidates first, by OOF log loss; then the others by id."""
    knobs = sorted({knob for s in summaries for knob in s.candidate.params})
    rows = [_leaderboard_row(s, knobs) for s in ranked(summaries)]
    return csv_text((*_LEADERBOARD, *(f"hp.{knob}" for knob in knobs)), rows)


def trials_csv(summaries: Iterable[CandidateSummary]) -> str:
    """One row a fold trial that ended."""
    rows: list[list[object]] = []
    for trial in (t for s in summaries for t in s.trials):
        best = trial.best
        score = trial.variants[best] if best else None
        rows.append([
            trial.candidate, trial.fold, trial.status, best,
            number(score.val_logloss if score else None), score.best_epoch if score else None,
            trial.epochs_trained, f"{trial.seconds:.2f}", trial.node, trial.device,
        ])  # fmt: skip
    return csv_text(_TRIALS, rows)


def ranked(summaries: Iterable[CandidateSummary]) -> list[CandidateSummary]:
    """Best first: complete ones by OOF log loss, then the rest by id."""

    def order(summary: CandidateSummary) -> tuple[bool, float, str]:
        complete = summary.status == "complete" and summary.best is not None
        loss = summary.pooled_logloss(summary.best) if complete and summary.best else 0.0
        return not complete, loss, summary.candidate.candidate

    return sorted(summaries, key=order)


def _leaderboard_row(summary: CandidateSummary, knobs: Sequence[str]) -> list[object]:
    best = summary.best
    return [
        summary.candidate.candidate, summary.candidate.backbone, summary.status,
        len(summary.finished), best,
        number(summary.pooled_logloss(best) if best else None),
        number(summary.pooled_accuracy(best) if best else None),
        number(summary.last_fold_logloss), number(summary.gain), number(summary.gain_se),
        sum(t.epochs_trained for t in summary.trials),
        f"{sum(t.seconds for t in summary.trials):.2f}",
        *(number(summary.candidate.params.get(knob)) for knob in knobs),
    ]  # fmt: skip


def number(value: float | str | None) -> str | None:
    """A cell: six digits; a name as it is."""
    return f"{value:.6g}" if isinstance(value, (int, float)) else value


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of the run folder."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()


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
