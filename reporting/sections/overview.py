"""Report section: the run in figures, and warnings about them."""

from __future__ import annotations

import math
import shlex
from collections import Counter

from foldrace.core.metrics import MetricScore
from foldrace.reporting.content import Card, Cards, Facts, Part, Warnings
from foldrace.reporting.context import ReportContext
from foldrace.reporting.formats import UNKNOWN, duration, number, percent
from foldrace.reporting.sections.blend import bound
from foldrace.run_folder.blend_records import EnsembleRecord
from foldrace.run_folder.records import STATUSES, CandidateSummary

_SHOWN_ERRORS = 5


def summary(ctx: ReportContext) -> list[Part]:
    """Show the run in figures, and what to be careful about."""
    found = tuple(warnings(ctx))
    blend_facts = _blend_facts(ctx.ensemble) if ctx.ensemble else []
    return [
        *([_headline(ctx.ensemble)] if ctx.ensemble else []),
        *([Warnings(found)] if found else []),
        Facts((*_data_facts(ctx), *blend_facts)),
    ]


def warnings(ctx: ReportContext) -> list[str]:
    """Sentences about whatever makes the figures less than they seem."""
    return [*_blend_warnings(ctx), *_candidate_warnings(ctx)]


def _headline(blend: EnsembleRecord) -> Cards:
    gain = blend.oof_logloss - blend.fair_single_logloss
    return Cards((
        Card("Blend, OOF log loss", number(blend.oof_logloss), _chosen_on_the_same_rows(blend)),
        Card(
            "Cross-fitted log loss",
            number(blend.crossfit_logloss),
            f"± {number(blend.crossfit_se)} (standard error), weights chosen on the other folds",
        ),
        Card("Accuracy", percent(blend.oof_accuracy), "of the blend, out of fold"),
        Card(
            "Against the best single",
            _signed(gain),
            f"{blend.best_single} alone: {number(blend.best_single_oof_logloss)}"
            f"{_calibrated(blend)}; below 0 is better",
        ),
    ))  # fmt: skip


def _calibrated(blend: EnsembleRecord) -> str:
    """So that calibration is not taken for blending."""
    loss = blend.best_single_calibrated_logloss
    return "" if loss is None else f", at best {number(loss)} with a temperature of its own"


def _chosen_on_the_same_rows(blend: EnsembleRecord) -> str:
    """With the guarantee, where there is one for the figure beside it."""
    least = bound(blend) if blend.blend_temperature == 1.0 else None
    guarantee = "" if least is None else f"; no weights reach less than {number(least)}"
    return f"weights chosen on the same rows{guarantee}"


def _data_facts(ctx: ReportContext) -> list[tuple[str, str]]:
    folds = ctx.store.folds()
    k = ctx.store.fold_count
    statuses = Counter[str](s.status for s in ctx.summaries)
    trials = [t for s in ctx.summaries for t in s.trials]
    finished = sum(t.status == "finished" for t in trials)
    return [
        ("Rows", f"{len(folds.targets):,}"),
        ("Scored rows", f"{len(ctx.scored_labels):,}"),
        ("Classes", f"{len(ctx.classes):,}"),
        ("Folds", str(k) if k > 1 else "1 (one fixed validation split)"),
        ("Candidates", _statuses(len(ctx.summaries), statuses)),
        ("Fold trials", f"{finished:,} finished of {len(trials):,} that ended"),
        ("Time of all fold trials", duration(sum(t.seconds for t in trials))),
    ]


def _blend_facts(blend: EnsembleRecord) -> list[tuple[str, str]]:
    single = blend.fair_single_logloss
    return [
        ("Blend method", blend.method),
        ("Blend members", f"{len(blend.members)} of {blend.members_considered} considered"),
        ("Blend, log loss on the last fold", number(blend.last_fold_logloss)),
        *((f"Blend, {m.name}", _metric(m)) for m in blend.metrics),
        *_held_out(blend),
        (
            "Cross-fitted less best single",
            _signed(blend.crossfit_logloss - single),
        ),
    ]


def _held_out(blend: EnsembleRecord) -> list[tuple[str, str]]:
    """With `k: 1` and a test fraction."""
    held = blend.held_out
    if held is None:
        return []
    return [
        (
            f"Blend, {held.rows:,} held-out rows that nothing has seen",
            f"log loss {number(held.logloss)}, accuracy {percent(held.accuracy)}",
        )
    ]


def _metric(metric: MetricScore) -> str:
    return f"{number(metric.value)} ({'greater' if metric.greater_is_better else 'less'} is better)"


def _statuses(total: int, statuses: Counter[str]) -> str:
    known = ", ".join(f"{statuses[s]} {s}" for s in STATUSES if statuses[s])
    return f"{total} ({known})" if known else "0"


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
    if complete > 1 and blend.crossfit_logloss > blend.fair_single_logloss:
        found.append(
            f"The cross-fitted log loss of the blend, {number(blend.crossfit_logloss)}, is not "
            f"below that of the best single member{_fair(blend)}, "
            f"{number(blend.fair_single_logloss)}: blending may gain nothing on new images."
        )
    return [*found, *_foreign_warnings(blend)]


def _fair(blend: EnsembleRecord) -> str:
    """The best single member is calibrated where the blend is."""
    known = blend.best_single_calibrated_logloss is not None
    return " with a temperature of its own" if known else ""


def _foreign_warnings(blend: EnsembleRecord) -> list[str]:
    """What the blend's figures do not cover, or cover too kindly."""
    found = []
    if blend.unvalidated:
        names = ", ".join(u.name for u in blend.unvalidated)
        share = sum(u.weight for u in blend.unvalidated)
        found.append(
            f"{percent(share)} of the submission comes from test predictions without OOF rows "
            f"({names}): no figure on this page says how good they are."
        )
    near = blend.near_duplicates
    without = near.oof_logloss_without if near else None
    if near and without is not None and without > blend.oof_logloss:
        found.append(
            f"{near.rows:,} scored rows resemble an image of another fold or of the test set; "
            f"without them the OOF log loss of the blend is {number(without)}, not "
            f"{number(blend.oof_logloss)}."
        )
    return found


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
            lines = (trial.error or "").strip().splitlines()
            return f"fold {trial.fold}, {lines[0] if lines else 'no message'}"
    return "no message"


def _signed(value: float) -> str:
    return f"{value:+.4f}" if math.isfinite(value) else UNKNOWN
