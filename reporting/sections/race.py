"""Report section: the race, its rule and its decisions, and the blend's loss while it went on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from foldrace.config.schema import RaceConfig
from foldrace.reporting.charts import race as race_charts
from foldrace.reporting.charts.race import MOST_LANES, BlendPoint, Fold, Lane, State
from foldrace.reporting.content import Chart, Heading, Note, Part, Table, count, score, signed
from foldrace.reporting.context import ReportContext
from foldrace.reporting.formats import counted
from foldrace.run_folder.records import (
    ACTION_WORDS,
    STATUSES,
    CandidateSummary,
    RaceDecision,
    TrialRecord,
)

_ROWS = 20


def rule_sentence(config: RaceConfig, folds: int) -> str:
    """Describe the rule that decides; `folds`: fold trials of a candidate."""
    if config.rule == "none":
        return "Rule none: every candidate gets all its folds."
    if config.rule == "gain":
        return (
            "Rule gain: by what a candidate adds to the blend of the complete candidates, in nats "
            f"per row. The first candidate, and one in {config.one_in(folds)} of those whose first "
            "fold was measured, gets all its folds, the most promising first, each while gain + "
            f"{config.z:g} × standard error is above 0. The others are parked until nothing else "
            "promises more."
        )
    return (
        "Rule forgiving: a candidate gets its next fold while its mean log loss is below the worst "
        "fold of the best complete candidate."
    )


def outcome_sentence(summaries: Sequence[CandidateSummary], epochs: int) -> str:
    """Count the candidates by outcome, and what was trained of all that could have been.

    `epochs` is the length of a schedule where a candidate's hyperparameters do not say.
    """
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
    others = (status for status in STATUSES if status not in ("complete", "stopped"))
    return ", ".join([*parts, *(f"{statuses[s]:,} {s}" for s in others if statuses[s])])


def _is_cut(summary: CandidateSummary) -> bool:
    return any(t.status == "stopped" for t in summary.trials)


def schedule_epochs(summary: CandidateSummary, epochs: int) -> int:
    """Epochs in the schedule of one of its fold trials."""
    return int(summary.candidate.params.get("epochs", epochs))


def decision_table(decisions: Sequence[RaceDecision]) -> list[Part]:
    """Show the newest of the decisions, which come in the order in which they were made."""
    shown = decisions[: -_ROWS - 1 : -1]
    rows = tuple(
        (
            count(d.number), d.candidate, _place(d), ACTION_WORDS[d.action],
            signed(d.gain), score(d.gain_se), count(d.complete),
            score(d.blend_logloss), count(d.epochs_trained), d.reason,
        )
        for d in shown
    )  # fmt: skip
    headers = (
        "decision", "candidate", "after", "action", "gain", "± se", "complete", "blend log loss",
        "epochs trained", "reason",
    )  # fmt: skip
    return [
        Note(
            f"The newest {counted(len(shown), 'decision')} of {len(decisions):,}; the file has all "
            "of them, with all numbers:",
            "decisions.csv",
        ),
        Table(headers, rows, "The last decisions of the race"),
    ]


def _place(decision: RaceDecision) -> str:
    if decision.epoch is None:
        return f"fold {decision.fold}"
    return f"epoch {decision.epoch} of fold {decision.fold}"


def race(ctx: ReportContext) -> list[Part]:
    """Show the candidates as lanes, the blend's loss over the epochs, the last decisions."""
    started = in_order(ctx.summaries)
    if not started:
        return []
    decisions = sorted((d for s in started for d in s.decisions), key=lambda d: d.number)
    if not decisions:
        return [Note("No decision of a race is recorded in this run.")]
    epochs = ctx.config.training.epochs
    return [
        Note(rule_sentence(ctx.config.race, started[0].folds)),
        Note(outcome_sentence(started, epochs)),
        _lanes(ctx, started, epochs),
        *_blend_loss(ctx, started, decisions),
        Heading("The last decisions"),
        *decision_table(decisions),
    ]


def _lanes(ctx: ReportContext, started: Sequence[CandidateSummary], epochs: int) -> Chart:
    shown = most_telling(started, MOST_LANES)
    left_out = (
        f" The {len(shown)} of {len(started):,} candidates with the most finished folds, the newer "
        "first among equals; the sentence above counts all."
        if len(shown) < len(started)
        else ""
    )
    return ctx.chart(
        "race",
        race_charts.lanes([lane(s, epochs) for s in shown]),
        f"The race of {counted(len(shown), 'candidate')} over {counted(shown[0].folds, 'fold')}",
        "One row per candidate, in order of start; one cell per fold, coloured by the decision "
        "after it. Numbers (where there is room) are gain ± standard error." + left_out,
    )


def in_order(summaries: Iterable[CandidateSummary]) -> list[CandidateSummary]:
    """Sort candidates by their start: c9999 before c10000."""
    return sorted(summaries, key=_start)


def most_telling(summaries: Iterable[CandidateSummary], most: int) -> list[CandidateSummary]:
    """Choose the `most` with the most finished folds, in the order of their start."""

    def order(summary: CandidateSummary) -> tuple[int, int, tuple[int, str]]:
        return len(summary.finished), len(summary.trials), _start(summary)

    return in_order(sorted(summaries, key=order, reverse=True)[:most])


def _start(summary: CandidateSummary) -> tuple[int, str]:
    name = summary.candidate.candidate
    return len(name), name


def lane(summary: CandidateSummary, epochs: int) -> Lane:
    """The lane of a candidate in the chart; `epochs` as for `outcome_sentence`."""
    trials = {t.fold: t for t in summary.trials}
    decisions = {d.fold: d for d in summary.decisions}
    folds = tuple(
        _fold(trials.get(k), decisions.get(k), schedule_epochs(summary, epochs))
        for k in range(summary.folds)
    )
    return Lane(summary.candidate.candidate, summary.candidate.backbone, folds)


def _fold(trial: TrialRecord | None, decision: RaceDecision | None, schedule: int) -> Fold:
    gain, gain_se = (decision.gain, decision.gain_se) if decision else (None, None)
    if trial is None and decision is not None and decision.epoch is not None:
        return Fold("set aside", min(1.0, decision.epoch / schedule), gain, gain_se)
    if trial is None:
        return Fold("none")
    if trial.status == "finished":
        return Fold(_state(decision), 1.0, gain, gain_se)
    if trial.status == "stopped":
        return Fold("cut", min(1.0, trial.epochs_trained / schedule), gain, gain_se)
    return Fold(trial.status)


def _state(decision: RaceDecision | None) -> State:
    return ACTION_WORDS[decision.action] if decision else "finished"


def _blend_loss(
    ctx: ReportContext, started: Iterable[CandidateSummary], decisions: Sequence[RaceDecision]
) -> list[Chart]:
    points = blend_points(decisions)
    if not points:
        return []
    singles = best_singles(started, decisions)
    return [
        ctx.chart(
            "race_blend",
            race_charts.blend_loss(points, singles),
            "OOF log loss of the race's blend over the epochs trained, beside the best candidate's",
            "The race's own blend: the best weights of the calibrated complete candidates on all "
            "rows, chosen and scored on the same ones. A candidate is calibrated fold by fold.",
        )
    ]


def blend_points(decisions: Sequence[RaceDecision]) -> list[BlendPoint]:
    """Log loss of the race's blend after each decision, in their order."""
    return [
        BlendPoint(d.epochs_trained, d.blend_logloss, d.action == "complete")
        for d in decisions
        if d.blend_logloss is not None
    ]


def best_singles(
    summaries: Iterable[CandidateSummary], decisions: Iterable[RaceDecision]
) -> list[tuple[int, float]]:
    """Pairs (epochs trained, calibrated loss) wherever a new best candidate was complete."""
    losses = {
        s.candidate.candidate: s.pooled_calibrated(s.best)
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
