"""A blend as lines for the terminal: its figures, warnings, members, and remarks.

Takes an `EnsembleRecord`, gives lines.
"""

from __future__ import annotations

from collections.abc import Iterator

from foldrace.reporting.formats import counted
from foldrace.reporting.sentences import (
    METRICS_IN_WORDS,
    beaten_in_metrics,
    blending_may_gain_nothing,
    calibration_change,
    gain_of_other_weights,
    held_out_scores,
    last_selection,
    model_name,
    near_duplicates,
    unvalidated,
    with_error,
)
from foldrace.run_folder.blend_records import EnsembleRecord, MemberRecord

_WIDTH = 22  # of the names of figures


def blend_lines(blend: EnsembleRecord) -> Iterator[str]:
    """Describe a blend: one line per figure, member or remark."""
    yield (
        f"Blend of {counted(len(blend.members), 'member')} ({blend.method}): "
        f"OOF log loss {blend.oof_logloss:.4f}"
    )
    for name, text in _figures(blend):
        yield f"  {name:{_WIDTH}} {text}"
    warning = blending_may_gain_nothing(blend)
    warnings = (*([] if warning is None else [warning]), *beaten_in_metrics(blend))
    yield from (f"warning {text}" for text in warnings)
    yield "Members, by weight:"
    for member in blend.members:
        yield f"  {member.weight:.3f}  {member.candidate} {member.variant}{_details(member)}"
    yield from _remarks(blend)


def _figures(blend: EnsembleRecord) -> Iterator[tuple[str, str]]:
    single = model_name(blend.best_single)
    yield (
        "one fold's models",
        f"{with_error(blend.crossfit_logloss, blend.crossfit_se)}  (cross-fitted)",
    )
    if blend.k > 1:
        yield f"mean of {blend.k} folds", "lower; the test images tell, once they are predicted"
    yield "best single model", f"{blend.best_single_oof_logloss:.4f}  {single}"
    if blend.best_single_calibrated_logloss is not None:
        # so that calibration is not taken for blending
        yield "best one, calibrated", f"{blend.best_single_calibrated_logloss:.4f}"
    yield "best one, cross-fitted", f"{blend.single_crossfit_logloss:.4f}"
    yield _comparison(blend)
    yield "best possible weights", gain_of_other_weights(blend)
    accuracy = blend.metric("accuracy")
    error = None if accuracy is None else accuracy.se
    yield "OOF accuracy", with_error(blend.oof_accuracy, error)
    for metric in blend.metrics:
        if metric.name not in METRICS_IN_WORDS:
            yield f"OOF {metric.name}", with_error(metric.value, metric.se)
    if blend.ms_per_image is not None:
        yield "ms per image", f"{blend.ms_per_image:.3g} on {blend.device}"


def _comparison(blend: EnsembleRecord) -> tuple[str, str]:
    """Gain against the best single model, in the places that are shown: no zero has a sign."""
    gain, se = blend.gain_over_single, blend.gain_over_single_se
    shown = f"{abs(gain):.4f}"
    better = gain >= 0 or float(shown) == 0
    return (
        f"blend is {'better' if better else 'worse'} by",
        f"{shown} ± {se:.4f}  (both cross-fitted)",
    )


def _details(member: MemberRecord) -> str:
    warm = f", temperature {member.temperature:.3f}" if member.temperature != 1 else ""
    return f"{warm}{f', of {member.run}' if member.run else ''}"


def _remarks(blend: EnsembleRecord) -> Iterator[str]:
    """Sentences on how the blend came about, and on what its figures do not cover."""
    if blend.methods_tried:
        tried = (f"{t.method} {t.crossfit_logloss:.4f}" for t in blend.methods_tried)
        least = min(blend.methods_tried, key=lambda trial: trial.crossfit_logloss).method
        yield f"Method {least} has the least cross-fitted log loss: {', '.join(tried)}"
    yield from last_selection(blend)
    calibrated = calibration_change(blend)
    if calibrated is not None:
        yield calibrated
    if blend.duplicates:
        same = "; ".join(" = ".join(names) for names in blend.duplicates)
        yield f"Same predictions, so only the first was considered: {same}"
    if blend.members_without_weights:
        left = counted(blend.members_without_weights, "member")
        yield f"Left out, as their weight files are not there: {left}"
    alike = near_duplicates(blend)
    if alike is not None:
        yield alike
    for point in blend.curve:
        yield (
            f"  {point.ms_per_image:9.3f} ms per image: {point.oof_logloss:.4f} with "
            f"{counted(point.members, 'member')}"
        )
    uncovered = unvalidated(blend)
    if uncovered is not None:
        yield f"Unvalidated: {uncovered}"
    held_out = blend.held_out
    if held_out is not None:
        yield f"Held-out rows ({held_out.rows}, seen by no trial): {held_out_scores(held_out)}"
