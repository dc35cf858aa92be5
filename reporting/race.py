"""Report section: the race, who went on and who was stopped, and what the blend gained by it.

Takes the `ReportContext`, gives HTML, or None while there is no candidate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from experiment.records import CandidateSummary, RaceDecision, TrialRecord
from reporting import race_charts
from reporting.context import ReportContext
from reporting.markup import Html, counted, heading, join, note
from reporting.race_charts import MOST_LANES, BlendPoint, Fold, Lane, State
from reporting.race_facts import (
    decision_table,
    outcome_sentence,
    rule_sentence,
    schedule_epochs,
)


def race(ctx: ReportContext) -> Html | None:
    """The candidates as lanes, the blend's loss over the epochs trained, the last decisions."""
    started = in_order(ctx.summaries)
    if not started:
        return None
    decisions = sorted((d for s in started for d in s.decisions), key=lambda d: d.number)
    if not decisions:
        return note("No decision of a race is recorded in this run.")
    epochs = ctx.config.training.epochs
    return join(
        note(rule_sentence(ctx.config.race)),
        note(outcome_sentence(started, epochs)),
        _lanes(ctx, started, epochs),
        _blend_loss(ctx, started, decisions),
        heading("The last decisions"),
        decision_table(decisions),
    )


def _lanes(ctx: ReportContext, started: Sequence[CandidateSummary], epochs: int) -> Html:
    shown = most_telling(started, MOST_LANES)
    left_out = (
        f" The {len(shown)} of {len(started):,} candidates with the most finished folds, the newer "
        "first among equals; the sentence above counts all."
        if len(shown) < len(started)
        else ""
    )
    return ctx.show(
        "race",
        race_charts.lanes([lane(s, epochs) for s in shown]),
        f"The race of {counted(len(shown), 'candidate')} over {counted(shown[0].folds, 'fold')}",
        "A row a candidate, in the order in which they started; a field a fold, coloured by the "
        "decision after it. Numbers, where there is room, are the gain ± its standard error."
        + left_out,
    )


def in_order(summaries: Iterable[CandidateSummary]) -> list[CandidateSummary]:
    """Of their start: c9999 before c10000."""
    return sorted(summaries, key=_start)


def most_telling(summaries: Iterable[CandidateSummary], most: int) -> list[CandidateSummary]:
    """At most so many, those with the most finished folds, in the order of their start."""

    def order(summary: CandidateSummary) -> tuple[int, int, tuple[int, str]]:
        return len(summary.finished), len(summary.trials), _start(summary)

    return in_order(sorted(summaries, key=order, reverse=True)[:most])


def _start(summary: CandidateSummary) -> tuple[int, str]:
    name = summary.candidate.candidate
    return len(name), name


def lane(summary: CandidateSummary, epochs: int) -> Lane:
    """A candidate's folds as they are drawn."""
    trials = {t.fold: t for t in summary.trials}
    decisions = {d.fold: d for d in summary.decisions}
    folds = tuple(
        _fold(trials.get(k), decisions.get(k), schedule_epochs(summary, epochs))
        for k in range(summary.folds)
    )
    return Lane(summary.candidate.candidate, summary.candidate.backbone, folds)


def _fold(trial: TrialRecord | None, decision: RaceDecision | None, schedule: int) -> Fold:
    if trial is None:
        return Fold("none")
    gain, gain_se = (decision.gain, decision.gain_se) if decision else (None, None)
    if trial.status == "finished":
        return Fold(_state(decision), 1.0, gain, gain_se)
    if trial.status == "stopped":
        return Fold("cut", min(1.0, trial.epochs_trained / schedule), gain, gain_se)
    return Fold(trial.status)


def _state(decision: RaceDecision | None) -> State:
    states: dict[str, State] = {"continue": "went on", "stop": "stopped", "complete": "complete"}
    return states[decision.action] if decision else "finished"


def _blend_loss(
    ctx: ReportContext, started: Iterable[CandidateSummary], decisions: Sequence[RaceDecision]
) -> Html | None:
    points = blend_points(decisions)
    if not points:
        return None
    singles = best_singles(started, decisions)
    return ctx.show(
        "race_blend",
        race_charts.blend_loss(points, singles),
        "OOF log loss of the race's blend over the epochs trained, beside the best candidate's",
        "The race's own blend: the best weights of the calibrated complete candidates on all rows, "
        "chosen and scored on the same ones. The candidates are scored without calibration.",
    )


def blend_points(decisions: Sequence[RaceDecision]) -> list[BlendPoint]:
    """The blend after each decision, in their order."""
    return [
        BlendPoint(d.epochs_trained, d.blend_logloss, d.action == "complete")
        for d in decisions
        if d.blend_logloss is not None
    ]


def best_singles(
    summaries: Iterable[CandidateSummary], decisions: Iterable[RaceDecision]
) -> list[tuple[int, float]]:
    """(epochs trained, pooled OOF log loss) wherever a candidate became complete that was better
    than all before it."""
    losses = {
        s.candidate.candidate: s.pooled_logloss(s.best)
        for s in summaries
        if s.status == "complete" and s.best
    }
    found: list[tuple[int, float]] = []
    for decision in decisions:
        loss = losses.get(decision.candidate)
        if decision.action != "complete" or loss is None:
            continue
        if not found or loss < found[-1][1]:
            found.append((decision.epochs_trained, loss))
    return found
