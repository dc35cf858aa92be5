"""What the race did, in words and as a table.

Takes summaries and decisions, gives sentences and HTML.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from experiment.config import RaceConfig
from experiment.records import CandidateSummary, RaceDecision
from reporting.markup import Cell, Html, count, counted, difference, join, score, table

_ROWS = 20
_ACTIONS = {"continue": "goes on", "stop": "stopped", "complete": "complete"}


def rule_sentence(config: RaceConfig) -> str:
    """What decides, in words."""
    if config.rule == "none":
        return "Rule none: every candidate gets all its folds."
    decides = (
        f"a candidate gets its next fold while gain + {config.z:g} × standard error is above 0; "
        "the gain is what it adds to the blend of the complete candidates, in nats a row"
        if config.rule == "gain"
        else "a candidate gets its next fold while its mean log loss is below the worst fold of "
        "the best complete candidate"
    )
    return (
        f"Rule {config.rule}: {decides}. "
        f"Nobody is stopped before {config.min_complete} candidates are complete."
    )


def outcome_sentence(summaries: Sequence[CandidateSummary], epochs: int) -> str:
    """How many candidates were stopped when, and what was trained of all that could have been.
    `epochs`: of a schedule, where a candidate's hyperparameters do not say."""
    k = summaries[0].folds
    trials = [t for s in summaries for t in s.trials]
    trained = sum(t.status == "finished" for t in trials)
    spent = sum(t.epochs_trained for t in trials)
    most = sum(k * schedule_epochs(s, epochs) for s in summaries)
    return (
        f"{counted(len(summaries), 'candidate')}: {_outcomes(summaries)}. "
        f"Trained: {trained:,} of {len(summaries):,} × {k} fold trials "
        f"({trained / (len(summaries) * k):.1%} of all folds) and {spent:,} of the {most:,} epochs "
        f"({spent / most:.1%}) that all of them could take."
    )


def _outcomes(summaries: Sequence[CandidateSummary]) -> str:
    statuses = Counter[str](s.status for s in summaries)
    stopped = [s for s in summaries if s.status == "stopped"]
    cut = sum(_is_cut(s) for s in stopped)
    after = Counter(len(s.finished) for s in stopped if not _is_cut(s))
    parts = [f"{statuses['complete']:,} complete"]
    if stopped:
        places = [
            *(f"{n:,} after {counted(done, 'fold')}" for done, n in sorted(after.items())),
            *([f"{cut:,} in mid-training"] if cut else []),
        ]
        parts.append(f"{len(stopped):,} stopped by the race ({', '.join(places)})")
    others = ("running", "unfinished", "diverged", "failed")
    return ", ".join([*parts, *(f"{statuses[s]:,} {s}" for s in others if statuses[s])])


def _is_cut(summary: CandidateSummary) -> bool:
    return any(t.status == "stopped" for t in summary.trials)


def schedule_epochs(summary: CandidateSummary, epochs: int) -> int:
    """Epochs of one of its fold trials."""
    return int(summary.candidate.params.get("epochs", epochs))


def decision_table(decisions: Sequence[RaceDecision]) -> Html:
    """The newest of them, which come in the order in which they were made."""
    shown = decisions[: -_ROWS - 1 : -1]
    rows = [
        [
            count(d.number), d.candidate, _place(d), _ACTIONS[d.action],
            Cell(difference(d.gain), d.gain), score(d.gain_se), count(d.complete),
            score(d.blend_logloss), count(d.epochs_trained), d.reason,
        ]
        for d in shown
    ]  # fmt: skip
    headers = (
        "decision", "candidate", "after", "action", "gain", "± se", "complete", "blend log loss",
        "epochs trained", "reason",
    )  # fmt: skip
    return join(
        Html(
            f"<p>{counted(len(shown), 'decision')} of {len(decisions):,}, the newest first; all "
            'with all their numbers: <a href="../decisions.csv">decisions.csv</a>.</p>'
        ),
        table(headers, rows, name="The last decisions of the race"),
    )


def _place(decision: RaceDecision) -> str:
    if decision.epoch is None:
        return f"fold {decision.fold}"
    return f"epoch {decision.epoch} of fold {decision.fold}"
