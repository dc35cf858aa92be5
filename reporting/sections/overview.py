"""Report section: the run in figures, and warnings about them."""

from __future__ import annotations

import math
import shlex
from collections import Counter

from foldrace.core.errors import message_line
from foldrace.core.metrics import MetricScore
from foldrace.dataset.left_out import left_out_lines, read_left_out
from foldrace.reporting.content import Card, Cards, Facts, Part, Warnings
from foldrace.reporting.context import ReportContext
from foldrace.reporting.formats import UNKNOWN, duration, number, percent
from foldrace.reporting.sections.blend import bound
from foldrace.reporting.sentences import (
    DIVERGED,
    METRICS_IN_WORDS,
    beaten_in_metrics,
    blending_may_gain_nothing,
    held_out_scores,
    model_name,
    near_duplicates,
    unvalidated,
    what_is_submitted,
    with_error,
)
from foldrace.run_folder.blend_records import EnsembleRecord
from foldrace.run_folder.records import STATUSES, CandidateSummary

_SHOWN_ERRORS = 5


def summary(ctx: ReportContext) -> list[Part]:
    """Show the run in figures, and what to be careful about."""
    found = tuple(warnings(ctx))
    blend_facts = _blend_facts(ctx.ensemble) if ctx.ensemble else []
    return [
        *([_headline(ctx, ctx.ensemble)] if ctx.ensemble else []),
        *([Warnings(found)] if found else []),
        Facts((*_data_facts(ctx), *blend_facts)),
    ]


def warnings(ctx: ReportContext) -> list[str]:
    """Sentences about whatever makes the figures less than they seem."""
    left_out = (f"{line}." for line in left_out_lines(read_left_out(ctx.store.files)))
    return [*_blend_warnings(ctx), *_candidate_warnings(ctx), *left_out, *_without_image(ctx)]


def _without_image(ctx: ReportContext) -> list[str]:
    """The sentence on rows of the submission that no image stands behind."""
    note = ctx.store.submission()
    count = 0 if note is None else len(note.without_image)
    return [f"{count:,} rows of submission.csv have no readable image."] if count else []


def _headline(ctx: ReportContext, blend: EnsembleRecord) -> Cards:
    return Cards((
        Card("Blend, OOF log loss", number(blend.oof_logloss), _chosen_on_the_same_rows(blend)),
        Card(
            "One fold's models, log loss",
            number(blend.crossfit_logloss),
            f"± {number(blend.crossfit_se)} (standard error), cross-fitted: all is chosen on the "
            "other folds",
        ),
        *_submitted(ctx, blend),
        Card("Accuracy", *_accuracy(blend)),
        Card(
            "Blend minus best single model",
            _signed(-blend.gain_over_single),
            f"± {number(blend.gain_over_single_se)} (standard error), both cross-fitted; below 0 "
            f"the blend is better. {model_name(blend.best_single)}, OOF: "
            f"{number(blend.best_single_oof_logloss)}{_calibrated(blend)}",
        ),
    ))  # fmt: skip


def _submitted(ctx: ReportContext, blend: EnsembleRecord) -> list[Card]:
    """The figure of the submission, where it is one of this blend."""
    note = ctx.store.submission()
    if note is None or note.crossfit_logloss != blend.crossfit_logloss:
        return []
    of = what_is_submitted(blend.k)
    if note.submitted_logloss is None:
        return [Card("Submission, log loss", UNKNOWN, f"of {of}: {note.submitted_note}")]
    error = f"± {number(note.submitted_se)} (standard error), expected of {of}"
    return [Card("Submission, log loss", number(note.submitted_logloss), error)]


def _accuracy(blend: EnsembleRecord) -> tuple[str, str]:
    score = blend.metric("accuracy")
    known = score is not None and score.se is not None
    error = f"± {percent(score.se)} (standard error), " if score is not None and known else ""
    return percent(blend.oof_accuracy), f"{error}of the blend, out of fold"


def _calibrated(blend: EnsembleRecord) -> str:
    """The best calibrated model, so that calibration is not taken for blending."""
    loss = blend.best_single_calibrated_logloss
    return "" if loss is None else f"; best one, calibrated: {number(loss)}"


def _chosen_on_the_same_rows(blend: EnsembleRecord) -> str:
    """A remark on the blend's figure, with its guarantee where there is one."""
    least = bound(blend) if blend.blend_temperature == 1.0 else None
    guarantee = "" if least is None else f"; no weights reach less than {number(least)}"
    return f"weights chosen on the same rows{guarantee}"


def _data_facts(ctx: ReportContext) -> list[tuple[str, str]]:
    folds, merged = ctx.store.folds(), ctx.store.merged()
    k = folds.k
    repeats = f" × {folds.repeats} repeats" if folds.repeats > 1 else ""
    statuses = Counter[str](s.status for s in ctx.summaries)
    trials = [t for s in ctx.summaries for t in s.trials]
    ends = Counter[str](t.status for t in trials)
    return [
        ("Rows", f"{len(folds.targets):,}"),
        ("Scored rows", f"{len(ctx.scored_labels):,}"),
        ("Classes", f"{len(ctx.classes):,}"),
        *((f"Class {name}", f"merged of {', '.join(owns)}") for name, owns in merged.items()),
        ("Folds", f"{k}{repeats}" if k > 1 else "1 (one fixed validation split)"),
        ("Candidates", _statuses(len(ctx.summaries), statuses)),
        ("Fold trials", _statuses(len(trials), ends)),
        ("Time of all fold trials", duration(sum(t.seconds for t in trials))),
    ]


def _blend_facts(blend: EnsembleRecord) -> list[tuple[str, str]]:
    shown = (m for m in blend.metrics if m.name not in METRICS_IN_WORDS)  # those are on cards
    return [
        ("Blend method", blend.method),
        ("Blend members", f"{len(blend.members)} of {blend.members_considered} considered"),
        *((f"Blend, {m.name}", _metric(m)) for m in shown),
        *_own_metric(blend),
        *_held_out(blend),
        ("Best single model, cross-fitted log loss", number(blend.single_crossfit_logloss)),
    ]


def _own_metric(blend: EnsembleRecord) -> list[tuple[str, str]]:
    """The user's own metric, cross-fitted."""
    if blend.choice is None:
        return []
    how = " with the decision rule" if blend.choice.rule is not None else ""
    return [(f"Blend, {blend.choice.metric}, cross-fitted{how}", _metric(blend.choice.score))]


def _held_out(blend: EnsembleRecord) -> list[tuple[str, str]]:
    """Scores on the held-out rows of `k: 1` with a test fraction."""
    held = blend.held_out
    if held is None:
        return []
    return [
        (
            f"Blend, {held.rows:,} held-out rows that nothing has seen",
            held_out_scores(held),
        )
    ]


def _metric(metric: MetricScore) -> str:
    better = "greater" if metric.greater_is_better else "less"
    return f"{with_error(metric.value, metric.se)} ({better} is better)"


def _statuses(total: int, statuses: Counter[str]) -> str:
    known = ", ".join(f"{statuses[s]:,} {s}" for s in ("finished", *STATUSES) if statuses[s])
    return f"{total:,} ({known})" if known else "0"


def _blend_warnings(ctx: ReportContext) -> list[str]:
    stored, blend, complete = ctx.store.blend.record(), ctx.ensemble, len(ctx.complete)
    again = f"run `foldrace ensemble {shlex.quote(ctx.store.root)}`"
    if stored is not None and blend is None:
        return [f"The stored blend was chosen on other folds and is not shown; {again}."]
    if blend is None and complete == 0:
        return ["No candidate is complete yet, so there is no blend."]
    if blend is None:
        return [f"There is no blend yet of the {complete} complete candidate(s); {again}."]
    found = []
    if blend.candidates_considered < complete:
        found.append(
            f"The blend was chosen among {blend.candidates_considered} candidate(s), but {complete}"
            f" are complete now; {again}."
        )
    shared = (blending_may_gain_nothing(blend), unvalidated(blend), _flattering(blend))
    told = (sentence for sentence in shared if sentence is not None)
    return [*found, *told, *beaten_in_metrics(blend)]


def _flattering(blend: EnsembleRecord) -> str | None:
    """The sentence on near-duplicate rows, where the loss without them is worse."""
    near = blend.near_duplicates
    without = near.oof_logloss_without if near else None
    return near_duplicates(blend) if without is not None and without > blend.oof_logloss else None


def _candidate_warnings(ctx: ReportContext) -> list[str]:
    found = [
        f"{s.candidate.candidate} {s.status}: {_first_error(s)}"
        for s in ctx.summaries
        if s.status in ("failed", "diverged")
    ]
    more = len(found) - _SHOWN_ERRORS
    if more > 0:
        found = [*found[:_SHOWN_ERRORS], f"{more} more candidate(s) failed or diverged."]
    waiting = sum(not s.settled for s in ctx.summaries)
    if waiting:
        found.append(
            f"{waiting} candidate(s) have folds left and are in no blend; "
            f"`foldrace resume {shlex.quote(ctx.store.root)}` goes on."
        )
    return found


def _first_error(summary: CandidateSummary) -> str:
    for trial in summary.trials:
        if trial.status != "finished":
            silent = DIVERGED if trial.status == "diverged" else "no message"
            return f"fold {trial.fold}, {message_line(trial.error or '') or silent}"
    return "no message"


def _signed(value: float) -> str:
    return f"{value:+.4f}" if math.isfinite(value) else UNKNOWN
