"""Report sections on the blend's predictions: how alike its members are, and its confidence."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from foldrace.core.metrics import CLIP
from foldrace.reporting.charts import blend as blend_charts
from foldrace.reporting.charts import candidates as charts
from foldrace.reporting.charts.style import short
from foldrace.reporting.content import Chart, Note, Part, Table, score
from foldrace.reporting.context import ReportContext
from foldrace.reporting.members import true_prob
from foldrace.reporting.sentences import calibration_change
from foldrace.run_folder.blend_records import Calibration

_MOST_MEMBERS = 30
"""Members that the map of correlations has room for."""

_LEGEND = (
    "A dot is a bin of confidence with its standard error; below it are its rows. Dots under the "
    "diagonal are overconfident. ECE: the mean distance from the diagonal over all rows."
)


def calibration(ctx: ReportContext) -> list[Part]:
    """Show the temperatures that were tried, and accuracy against confidence before and after."""
    found = ctx.ensemble.calibration if ctx.ensemble else None
    if found is None:
        return []
    return [
        Note(
            "A temperature above 1 lowers confidence, one below 1 raises it. The temperatures with "
            "the lowest cross-fitted loss are kept; within the cross-fitting, all temperatures are "
            "refitted."
        ),
        *_change(ctx),
        _tried(found),
        *_diagram(ctx, found),
    ]


def _change(ctx: ReportContext) -> list[Part]:
    sentence = calibration_change(ctx.ensemble) if ctx.ensemble else None
    return [] if sentence is None else [Note(f"{sentence}.")]


def _tried(found: Calibration) -> Table:
    kept = frozenset(i for i in range(len(found.tried)) if _is_kept(found, i))
    rows = tuple(
        (
            _which(t.members, t.blend), score(t.crossfit_logloss), score(t.crossfit_se),
            "kept" if i in kept else "",
        )
        for i, t in enumerate(found.tried)
    )  # fmt: skip
    headers = ("temperature of", "cross-fitted log loss", "standard error", "")
    return Table(headers, rows, "Calibrations that were tried", kept)


def _is_kept(found: Calibration, index: int) -> bool:
    trial = found.tried[index]
    return (trial.members, trial.blend) == (found.members, found.blend)


def _which(members: bool, blend: bool) -> str:
    names = [name for name, on in (("each member", members), ("the blend", blend)) if on]
    return " and ".join(names) or "nothing"


def _diagram(ctx: ReportContext, found: Calibration) -> list[Chart]:
    if not all(any(b.rows for b in r.bins) for r in (found.before, found.after)):
        return []
    if not found.members and not found.blend:
        return [
            ctx.chart(
                "reliability",
                blend_charts.reliability([("Without temperatures", found.before)]),
                f"Accuracy against confidence: expected calibration error {found.before.ece:.4f}",
                f"Reliability of the cross-fitted predictions. {_LEGEND}",
            )
        ]
    panels = [("Without temperatures", found.before), ("With those that were kept", found.after)]
    return [
        ctx.chart(
            "reliability",
            blend_charts.reliability(panels),
            f"Accuracy against confidence: expected calibration error {found.before.ece:.4f} "
            f"without temperatures, {found.after.ece:.4f} with those that were kept",
            "Reliability of the cross-fitted predictions, without any temperature and with a "
            f"temperature of {_which(found.members, found.blend)}. {_LEGEND}",
        )
    ]


def correlation(ctx: ReportContext) -> list[Part]:
    """Show a heat map of the heaviest members, alike ones side by side; empty below two."""
    chosen = ctx.members[:_MOST_MEMBERS]
    if len(chosen) < 2:
        return []
    columns = np.stack([true_prob(ctx.store, member.record) for member in chosen])
    matrix = log_prob_correlation(columns)
    order = similar_side_by_side(matrix)
    ids = [chosen[i].id for i in order]
    names = [short(chosen[i].backbone, 28) for i in order]
    which = f"the {_MOST_MEMBERS} heaviest" if len(ctx.members) > _MOST_MEMBERS else "all"
    return [
        ctx.chart(
            "correlation",
            charts.correlation(matrix[np.ix_(order, order)], ids, names),
            f"Correlation of the OOF predictions of {len(chosen)} members of the blend",
            "Pearson correlation of the log-probabilities that two members give to the true class, "
            f"row by row, of {which} members of the blend; alike ones stand side by side. "
            "A good member that correlates little with the others adds most.",
        )
    ]


def log_prob_correlation(true_prob: NDArray[np.floating]) -> NDArray[np.float64]:
    """Correlate (M, N) true-class probabilities, (M, M); 0 for a member of equal rows."""
    logs = np.log(np.maximum(true_prob, CLIP, dtype=np.float64))
    centred = logs - logs.mean(axis=1, keepdims=True)
    norms = np.sqrt((centred * centred).sum(axis=1, keepdims=True))  # (M, 1)
    unit = np.divide(centred, norms, out=np.zeros_like(centred), where=norms > 0)
    matrix: NDArray[np.float64] = np.clip(unit @ unit.T, -1.0, 1.0)
    np.fill_diagonal(matrix, 1.0)
    return matrix


def similar_side_by_side(matrix: NDArray[np.float64]) -> list[int]:
    """Order members so that alike ones are neighbours.

    The leaves of an average-linkage tree on 1 - correlation, in the order in which neighbours are
    as alike as the tree allows (Bar-Joseph et al. 2001).
    """
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    distances = squareform(1.0 - matrix, checks=False)
    tree = linkage(distances, method="average", optimal_ordering=True)
    return [int(leaf) for leaf in leaves_list(tree)]
