"""Sentences about a run that the terminal and the report share, so that both say the same.

Takes records, gives text; None where there is nothing to say.
"""

from __future__ import annotations

from foldrace.reporting.formats import number, percent
from foldrace.run_folder.blend_records import Calibration, EnsembleRecord, SubmissionNote

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


def submission_line(submission: SubmissionNote) -> str:
    """Say when the submission was written, in this machine's time, and how good its blend is."""
    written = f"{submission.created.astimezone():%Y-%m-%d %H:%M:%S}"
    loss = number(submission.crossfit_logloss)
    return f"submission of {written}: cross-fitted log loss {loss}"


def blending_may_gain_nothing(blend: EnsembleRecord) -> str | None:
    """Warn of a blend whose cross-fitted loss is not below that of its best member."""
    single = blend.fair_single_logloss
    if blend.members_considered < 2 or blend.crossfit_logloss <= single:
        return None
    calibrated = ", calibrated" if blend.best_single_calibrated_logloss is not None else ""
    return (
        f"The cross-fitted log loss of the blend, {number(blend.crossfit_logloss)}, is not below "
        f"that of the best single model{calibrated}, {number(single)}: blending may gain nothing "
        "on new images."
    )


def gain_of_other_weights(blend: EnsembleRecord) -> str:
    """Say how much log loss the best possible weights could still gain."""
    if blend.certificate is None:
        return "gain unknown: only for weighted means of probabilities is there a bound"
    if blend.certificate < 5e-5:
        return "could gain less than 0.0001"
    return f"could gain at most {number(blend.certificate)}"


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
