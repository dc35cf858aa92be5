"""Sentences about a run that the terminal and the report share, so that both say the same.

Takes records, gives text; None where there is nothing to say.
"""

from __future__ import annotations

from collections.abc import Iterator

from foldrace.core.metrics import MetricScore
from foldrace.reporting.formats import number, percent
from foldrace.run_folder.blend_records import (
    SINGLE,
    Calibration,
    EnsembleRecord,
    HeldOutScore,
    SubmissionNote,
)

DIVERGED = "its training loss became NaN or infinite"
METRICS_IN_WORDS = ("log_loss", "accuracy")
"""Metrics that have words of their own wherever a blend is described."""


def model_name(member: str) -> str:
    """Spell a member's name out: `c0007 ema of runs/a` becomes `c0007 (ema weights) of runs/a`."""
    candidate, _, rest = member.partition(" ")
    variant, _, run = rest.partition(" ")
    if not variant:
        return candidate
    what = "made elsewhere" if variant == "added" else f"{variant} weights"
    return f"{candidate} ({what}) {run}".rstrip()


def with_error(value: float | None, se: float | None) -> str:
    """A value with its standard error, where that is known: `0.9012 ± 0.0101`; a dash for none."""
    return number(value) if se is None else f"{number(value)} ± {number(se)}"


def crossfitted(loss: float | None, se: float | None, own: MetricScore | None) -> str:
    """Say how good one fold's models are: cross-fitted log loss, and the user's own metric."""
    mine = "" if own is None else f", {own.name} {with_error(own.value, own.se)}"
    return f"log loss of one fold's models {with_error(loss, se)}{mine}"


def submission_line(submission: SubmissionNote) -> str:
    """Say when the submission was written, in this machine's time, and how good it is."""
    written = f"{submission.created.astimezone():%Y-%m-%d %H:%M:%S}"
    own = submission.chosen_metric
    if submission.submitted_logloss is None:
        good = crossfitted(submission.crossfit_logloss, submission.crossfit_se, own)
        return f"submission of {written}: {good}"
    one_fold = crossfitted(submission.crossfit_logloss, None, own)
    loss = with_error(submission.submitted_logloss, submission.submitted_se)
    return f"submission of {written}: expected log loss {loss} ({one_fold})"


def what_is_submitted(k: int) -> str:
    """Say what the models of k folds are to the submission."""
    return "one fold's models" if k == 1 else f"the mean of {k} folds' models"


def submitted_loss(loss: float | None, se: float | None, note: str) -> str:
    """The loss that the submission is expected to have, or why there is no such figure."""
    return f"unknown: {note}" if loss is None else with_error(loss, se)


def held_out_scores(held: HeldOutScore) -> str:
    """Every score on the held-out rows, with its standard error."""
    loss, right = held.metric("log_loss"), held.metric("accuracy")
    shown = [
        f"log loss {with_error(held.logloss, loss.se if loss else None)}",
        f"accuracy {with_error(held.accuracy, right.se if right else None)}",
        *(
            f"{score.name} {with_error(score.value, score.se)}"
            for score in held.metrics
            if score.name not in METRICS_IN_WORDS
        ),
    ]
    if held.decided is not None:
        decided = with_error(held.decided.value, held.decided.se)
        shown.append(f"{held.decided.name} by the decision rule {decided}")
    return ", ".join(shown)


def beaten_in_metrics(blend: EnsembleRecord) -> Iterator[str]:
    """Warn of each metric in which a member is better than the blend."""
    own = None if blend.choice is None else blend.choice.metric
    for lost in blend.beaten:
        difference = number(abs(lost.value - lost.blend_value))
        advice = (
            ""
            if lost.metric == own
            else f"; if {lost.metric} is your metric, set `ensemble.metric: {lost.metric}`"
        )
        yield (
            f"By {lost.metric} the blend, {number(lost.blend_value)}, is worse than "
            f"{model_name(lost.member)} alone, {number(lost.value)} (difference {difference} ± "
            f"{number(lost.se)}){advice}."
        )


def last_selection(blend: EnsembleRecord) -> Iterator[str]:
    """Say what the user's own metric has chosen, and which rule makes the labels."""
    choice = blend.choice
    if choice is None:
        return
    first, kept = choice.tried[0], choice.tried[choice.kept]
    value = with_error(kept.value, kept.se)
    if choice.kept == 0:
        yield (
            f"Chosen by {choice.metric}: the blend of the least log loss, cross-fitted {value}; no "
            f"other of {len(choice.tried)} is better by more than a standard error."
        )
    else:
        what = "one model alone" if kept.method == SINGLE else kept.method
        yield (
            f"Chosen by {choice.metric}: {what}, cross-fitted {value}, against "
            f"{with_error(first.value, first.se)} of the blend of the least log loss."
        )
    if choice.rule_gain is not None:
        gain = f"{choice.rule_gain:+.4f}"
        error = "" if choice.rule_gain_se is None else f" ± {number(choice.rule_gain_se)}"
        if choice.rule is None:
            rule = f"a decision rule changes the metric by {gain}{error}"
            yield f"Labels are the most probable class: {rule}."
        else:
            kind = "class weights" if choice.rule.log_weights else "thresholds"
            yield (
                f"Labels are written by a decision rule ({kind}), cross-fitted {choice.metric} "
                f"{with_error(choice.value, choice.se)} ({gain}{error}); probabilities stay as "
                "they are."
            )


def blending_may_gain_nothing(blend: EnsembleRecord) -> str | None:
    """Warn of a blend whose cross-fitted loss is not below that of its best member."""
    if blend.members_considered < 2 or blend.gain_over_single >= 0:
        return None
    return (
        f"The cross-fitted log loss of the blend, {number(blend.crossfit_logloss)}, is not below "
        f"that of the best single model, {number(blend.single_crossfit_logloss)}: blending may "
        "gain nothing on new images."
    )


def gain_of_other_weights(blend: EnsembleRecord) -> str:
    """Say how much log loss the best possible weights could still gain."""
    if blend.certificate is None:
        return "gain unknown: only for weighted means of probabilities is there a bound"
    if blend.certificate < 5e-5:
        return "could gain less than 0.0001"
    loss = blend.mixture_logloss  # no loss is below 0
    most = blend.certificate if loss is None else min(blend.certificate, loss)
    return f"could gain at most {number(most)}"


def calibration_change(blend: EnsembleRecord) -> str | None:
    """Say which temperatures the blend has, and what they do to its cross-fitted predictions."""
    found = blend.calibration
    if found is None or not (found.members or found.blend):
        return None
    kept = [
        *(["one temperature per member"] if found.members else []),
        *([f"temperature {blend.blend_temperature:.3f} of the blend"] if found.blend else []),
    ]
    before, after = found.before.ece, found.after.ece
    worse = "; it may rise, as temperatures are chosen by log loss" if after > before else ""
    return (
        f"Calibrated with {' and '.join(kept)}: {_change_of_loss(found)}"
        f"expected calibration error {number(before)} -> {number(after)}{worse}"
    )


def _change_of_loss(found: Calibration) -> str:
    losses = {(t.members, t.blend): t.crossfit_logloss for t in found.tried}
    before, after = losses.get((False, False)), losses.get((found.members, found.blend))
    if before is None or after is None:
        return ""
    return f"cross-fitted log loss {number(before)} -> {number(after)}, "


def near_duplicates(blend: EnsembleRecord) -> str | None:
    """Say how many rows resemble an image of another fold, and the loss without them."""
    near = blend.near_duplicates
    if near is None or near.rows == 0:
        return None
    rows = f"{near.rows:,} scored rows resemble an image of another fold or of the test set"
    if near.oof_logloss_without is None:
        return f"{rows}."
    return (
        f"{rows}; without them the OOF log loss of the blend is "
        f"{number(near.oof_logloss_without)}, not {number(blend.oof_logloss)}."
    )


def unvalidated(blend: EnsembleRecord) -> str | None:
    """Name the predictions in the submission that no score covers."""
    if not blend.unvalidated:
        return None
    names = ", ".join(u.name for u in blend.unvalidated)
    has = "has" if len(blend.unvalidated) == 1 else "have"
    share = percent(sum(u.weight for u in blend.unvalidated))
    return (
        f"{names} {has} no OOF predictions: no score says how good that {share} of the "
        "submission is."
    )
