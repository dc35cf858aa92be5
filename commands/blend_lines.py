"""What the terminal says of a blend: one line a figure, then its members and what to know.

Takes the `EnsembleRecord`, gives lines for rich.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.markup import escape

from ensemble.added import Added
from experiment.metrics import MetricScore, log_loss_of_true
from experiment.records import EnsembleRecord, MemberRecord

_IN_WORDS = ("log_loss", "accuracy")
_WIDTH = 16  # of the names of figures


def blend_lines(ensemble: EnsembleRecord) -> Iterator[str]:
    """Figures, members, remarks."""
    yield (
        f"[bold]Blend[/bold] of {count_members(len(ensemble.members))} ({ensemble.method}): "
        f"OOF log loss [bold]{ensemble.oof_logloss:.4f}[/bold]"
    )
    for name, text in _figures(ensemble):
        yield f"  {name:{_WIDTH}} {text}"
    yield from _warnings(ensemble)
    for member in ensemble.members:
        yield f"  {member.weight:.3f}  {member.candidate} {member.variant}{_of(member)}"
    yield from _remarks(ensemble)


def not_chosen(ensemble: EnsembleRecord, added: Added) -> Iterator[str]:
    """Each member that was made elsewhere and got no weight."""
    names = {member.candidate for member in ensemble.members if member.added}
    for one in added.members:
        if one.true_prob is not None and one.record.name not in names:
            loss = log_loss_of_true(one.true_prob)
            yield f"{one.record.name}: own OOF log loss {loss:.4f}, not chosen"


def count_members(count: int) -> str:
    return f"{count} member{'' if count == 1 else 's'}"


def _figures(ensemble: EnsembleRecord) -> Iterator[tuple[str, str]]:
    single = f"{ensemble.best_single_oof_logloss:.4f}  {escape(ensemble.best_single)}"
    yield "best single", single
    if ensemble.best_single_calibrated_logloss is not None:
        # so that calibration is not taken for blending
        loss = ensemble.best_single_calibrated_logloss
        yield "", f"{loss:.4f}  at best, with a temperature of its own"
    yield "against it", _against(ensemble.fair_single_logloss - ensemble.oof_logloss)
    yield "cross-fitted", f"{ensemble.crossfit_logloss:.4f} ± {ensemble.crossfit_se:.4f}"
    yield "on the last fold", f"{ensemble.last_fold_logloss:.4f}"
    yield "weights", _distance(ensemble)
    yield "OOF accuracy", f"{ensemble.oof_accuracy:.4f}"
    for metric in ensemble.metrics:
        if metric.name not in _IN_WORDS:
            yield f"OOF {metric.name}", f"{metric.value:.4f}"
    if ensemble.ms_per_image is not None:
        yield "ms per image", f"{ensemble.ms_per_image:.3g} on {ensemble.device}"


def _against(gain: float) -> str:
    """In the places that are shown, so that no zero has a sign."""
    text = f"{abs(gain):.4f}"
    return f"{text} {'better' if gain >= 0 or float(text) == 0 else 'worse'}"


def _distance(ensemble: EnsembleRecord) -> str:
    if ensemble.certificate is None:
        return f"no certificate ({ensemble.pooling} pooling)"
    return f"at most {ensemble.certificate:.1e} above the best possible ones"


def _warnings(ensemble: EnsembleRecord) -> Iterator[str]:
    if ensemble.members_considered < 2:
        return
    if ensemble.crossfit_logloss > ensemble.fair_single_logloss:
        yield (
            "[yellow]warning[/yellow] the cross-fitted log loss is not below that of the best "
            "single member: blending may gain nothing on new images"
        )


def _of(member: MemberRecord) -> str:
    warm = f", temperature {member.temperature:.3f}" if member.temperature != 1 else ""
    return f"{warm}{f', of {escape(member.run)}' if member.run else ''}"


def _further(metrics: Iterable[MetricScore]) -> str:
    """', macro_f1 0.9012, ...': the metrics beside the two that have their own words."""
    return "".join(f", {m.name} {m.value:.4f}" for m in metrics if m.name not in _IN_WORDS)


def _remarks(ensemble: EnsembleRecord) -> Iterator[str]:
    """What a user should know beside the figures."""
    if ensemble.methods_tried:
        tried = (f"{t.method} {t.crossfit_logloss:.4f}" for t in ensemble.methods_tried)
        yield f"Method {ensemble.method}, of the least cross-fitted loss: {', '.join(tried)}"
    calibration = ensemble.calibration
    if calibration is not None and (calibration.members or calibration.blend):
        kept = [
            *(["one temperature a member"] if calibration.members else []),
            *([f"temperature {ensemble.blend_temperature:.3f} of the blend"] * calibration.blend),
        ]
        yield (
            f"Calibrated: {' and '.join(kept)}; expected calibration error "
            f"{calibration.before.ece:.4f} -> {calibration.after.ece:.4f}"
        )
    if ensemble.duplicates:
        same = escape("; ".join(" = ".join(names) for names in ensemble.duplicates))
        yield f"Same predictions, so only the first was considered: {same}"
    if ensemble.members_without_weights:
        left = count_members(ensemble.members_without_weights)
        yield f"Left out, since their weights are not there: {left}"
    near = ensemble.near_duplicates
    if near is not None and near.rows:
        without = near.oof_logloss_without
        rest = "" if without is None else f"; without them the OOF log loss is {without:.4f}"
        yield f"{near.rows} rows resemble an image of another fold or of the test set{rest}"
    for point in ensemble.curve:
        yield (
            f"  {point.ms_per_image:9.3f} ms per image: {point.oof_logloss:.4f} with "
            f"{count_members(point.members)}"
        )
    for unvalidated in ensemble.unvalidated:
        yield (
            f"[bold]Unvalidated[/bold]: {unvalidated.name} has no OOF predictions; it gets "
            f"{unvalidated.weight:.3f} of the submission, and no figure here covers it"
        )
    held_out = ensemble.held_out
    if held_out is not None:
        yield (
            f"Held-out rows ({held_out.rows}, seen by no trial): log loss {held_out.logloss:.4f}, "
            f"accuracy {held_out.accuracy:.4f}{_further(held_out.metrics)}"
        )
