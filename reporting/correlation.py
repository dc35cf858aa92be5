"""Report section: how alike the members of the blend are, row by row.

Takes the `ReportContext`, gives HTML, or None when the blend has fewer than two members.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from experiment.metrics import CLIP
from reporting import charts
from reporting.context import ReportContext
from reporting.markup import Html
from reporting.members import true_prob
from reporting.plots import short

_SHOWN = 30


def correlation(ctx: ReportContext) -> Html | None:
    """A heat map of the heaviest members, alike ones side by side."""
    chosen = ctx.members[:_SHOWN]
    if len(chosen) < 2:
        return None
    columns = np.stack([true_prob(ctx.store, member.record) for member in chosen])
    matrix = log_prob_correlation(columns)
    order = similar_side_by_side(matrix)
    ids = [chosen[i].id for i in order]
    names = [short(chosen[i].backbone, 28) for i in order]
    which = f"the {_SHOWN} heaviest" if len(ctx.members) > _SHOWN else "all"
    return ctx.show(
        "correlation",
        charts.correlation(matrix[np.ix_(order, order)], ids, names),
        f"Correlation of the OOF predictions of {len(chosen)} members of the blend",
        "Pearson correlation of the log-probabilities that two members give to the true class, "
        f"row by row, of {which} members of the blend; alike ones stand side by side. "
        "A good member that correlates little with the others adds most.",
    )


def log_prob_correlation(true_prob: NDArray[np.floating]) -> NDArray[np.float64]:
    """(M, N) true-class probabilities -> (M, M); 0 for a member whose rows are all the same."""
    logs = np.log(np.maximum(true_prob, CLIP, dtype=np.float64))
    centred = logs - logs.mean(axis=1, keepdims=True)
    norms = np.sqrt((centred * centred).sum(axis=1, keepdims=True))  # (M, 1)
    unit = np.divide(centred, norms, out=np.zeros_like(centred), where=norms > 0)
    matrix: NDArray[np.float64] = np.clip(unit @ unit.T, -1.0, 1.0)
    np.fill_diagonal(matrix, 1.0)
    return matrix


def similar_side_by_side(matrix: NDArray[np.float64]) -> list[int]:
    """The leaves of an average-linkage tree on 1 - correlation, ordered so that neighbours are
    as alike as the tree allows (Bar-Joseph et al. 2001)."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    distances = squareform(1.0 - matrix, checks=False)
    tree = linkage(distances, method="average", optimal_ordering=True)
    return [int(leaf) for leaf in leaves_list(tree)]
