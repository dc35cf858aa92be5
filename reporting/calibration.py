"""Report section: which temperatures the blend has, why, and how honest its confidence is.

Takes the `ReportContext`, gives HTML, or None when no calibration was tried.
"""

from __future__ import annotations

from experiment.records import Calibration
from reporting import blend_charts
from reporting.context import ReportContext
from reporting.markup import Html, join, note, score, table

_LEGEND = (
    "A dot is a bin of confidence with its standard error; below it are its rows. Dots under the "
    "diagonal are overconfident. ECE: the mean distance from the diagonal over all rows."
)


def calibration(ctx: ReportContext) -> Html | None:
    """What was tried, and accuracy against confidence before and after."""
    found = ctx.ensemble.calibration if ctx.ensemble else None
    if found is None:
        return None
    return join(_tried(found), _diagram(ctx, found))


def _tried(found: Calibration) -> Html:
    kept = [i for i, t in enumerate(found.tried) if _is_kept(found, i)]
    rows = [
        [
            _which(t.members, t.blend), score(t.crossfit_logloss), score(t.crossfit_se),
            "kept" if i in kept else "",
        ]
        for i, t in enumerate(found.tried)
    ]  # fmt: skip
    headers = ["temperature of", "cross-fitted log loss", "standard error", ""]
    return join(
        note(
            "A temperature above 1 lowers confidence, one below 1 raises it. Kept is what has the",
            "least cross-fitted loss; inside the cross-fitting all temperatures are fitted anew.",
        ),
        table(headers, rows, kept, name="Calibrations that were tried"),
    )


def _is_kept(found: Calibration, index: int) -> bool:
    trial = found.tried[index]
    return (trial.members, trial.blend) == (found.members, found.blend)


def _which(members: bool, blend: bool) -> str:
    names = [name for name, on in (("each member", members), ("the blend", blend)) if on]
    return " and ".join(names) or "nothing"


def _diagram(ctx: ReportContext, found: Calibration) -> Html | None:
    if not all(any(b.rows for b in r.bins) for r in (found.before, found.after)):
        return None
    if not found.members and not found.blend:
        return ctx.show(
            "reliability",
            blend_charts.reliability([("Without temperatures", found.before)]),
            f"Accuracy against confidence: expected calibration error {found.before.ece:.4f}",
            f"Reliability of the cross-fitted predictions. {_LEGEND}",
        )
    panels = [("Without temperatures", found.before), ("With those that were kept", found.after)]
    return ctx.show(
        "reliability",
        blend_charts.reliability(panels),
        f"Accuracy against confidence: expected calibration error {found.before.ece:.4f} without "
        f"temperatures, {found.after.ece:.4f} with those that were kept",
        "Reliability of the cross-fitted predictions, without any temperature and with a "
        f"temperature of {_which(found.members, found.blend)}. {_LEGEND}",
    )
