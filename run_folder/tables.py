"""The texts of leaderboard.csv, trials.csv and decisions.csv, from the candidates' summaries.

Column names and their order are a contract with users' scripts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from foldrace.run_folder.records import CandidateSummary

_LEADERBOARD = (
    "candidate", "backbone", "status", "folds_done", "variant", "oof_logloss",
    "oof_calibrated_logloss", "oof_accuracy", "gain", "gain_se", "epochs_trained",
    "seconds", "teacher",
)  # fmt: skip
_TRIALS = (
    "candidate", "fold", "status", "variant", "val_logloss", "val_calibrated_logloss", "epoch",
    "epochs_trained", "seconds", "node", "device",
)  # fmt: skip
DECISIONS = (
    "number", "candidate", "fold", "epoch", "rule", "action", "variant", "folds_done", "rows",
    "gain", "gain_se", "z", "score", "limit", "complete", "blend_logloss", "epochs_trained",
    "reason",
)  # fmt: skip


def leaderboard_csv(summaries: Sequence[CandidateSummary]) -> str:
    """One row per candidate: complete ones first, by calibrated OOF log loss, the others by id."""
    names = sorted({f"hp.{name}" for s in summaries for name in s.candidate.params})
    return _csv_text((*_LEADERBOARD, *names), map(_leaderboard_row, ranked(summaries)))


def trials_csv(summaries: Iterable[CandidateSummary]) -> str:
    """One row per fold trial that ended."""
    return _csv_text(_TRIALS, (row for s in summaries for row in _trial_rows(s)))


def decisions_csv(summaries: Iterable[CandidateSummary]) -> str:
    """One row per race or stopping decision, in the order in which they were made."""
    decisions = sorted((d for s in summaries for d in s.decisions), key=lambda d: d.number)
    return _csv_text(DECISIONS, (decision.model_dump() for decision in decisions))


def ranked(summaries: Iterable[CandidateSummary]) -> list[CandidateSummary]:
    """Order candidates best first: complete ones by calibrated OOF log loss, the rest by id."""

    def order(summary: CandidateSummary) -> tuple[bool, float, str]:
        complete = summary.status == "complete" and summary.best is not None
        loss = summary.pooled_calibrated(summary.best) if complete and summary.best else 0.0
        return not complete, loss, summary.candidate.candidate

    return sorted(summaries, key=order)


def _leaderboard_row(summary: CandidateSummary) -> dict[str, object]:
    best = summary.best
    return {
        "candidate": summary.candidate.candidate,
        "backbone": summary.candidate.backbone,
        "status": summary.status,
        "folds_done": len(summary.finished),
        "variant": best,
        "oof_logloss": summary.pooled_logloss(best) if best else None,
        "oof_calibrated_logloss": summary.pooled_calibrated(best) if best else None,
        "oof_accuracy": summary.pooled_accuracy(best) if best else None,
        "gain": summary.gain,
        "gain_se": summary.gain_se,
        "epochs_trained": sum(t.epochs_trained for t in summary.trials),
        "seconds": f"{sum(t.seconds for t in summary.trials):.2f}",
        "teacher": None if summary.candidate.teacher is None else str(summary.candidate.teacher),
        **{f"hp.{name}": value for name, value in summary.candidate.params.items()},
    }


def _trial_rows(summary: CandidateSummary) -> Iterator[dict[str, object]]:
    for trial in summary.trials:
        score = trial.variants[trial.best] if trial.best else None
        best = {"variant": trial.best, **(score.model_dump() if score else {})}
        best["val_calibrated_logloss"] = score.calibrated_logloss if score else None
        yield trial.model_dump() | best | {"seconds": f"{trial.seconds:.2f}"}


def _csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    """Numbers with six digits; None and what a row lacks are empty cells."""
    import pandas as pd  # here, since `status` needs none of its 0.4 s

    table = pd.DataFrame(list(rows), columns=list(columns))
    return str(table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
