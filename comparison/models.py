"""The models of each run on the shared images: its blend and its best candidates.

Takes a `Comparison`, gives a `Model` each, for the charts and their table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foldrace.comparison.sides import Comparison, Side
from foldrace.core.metrics import accuracy, normalise, row_losses
from foldrace.run_folder.tables import ranked

CANDIDATES = 6
"""Most candidates of a run that are shown, the best by calibrated loss."""


@dataclass(frozen=True, eq=False)
class Model:
    """One model on the shared images."""

    run: str
    name: str
    """`blend`, or the candidate's id."""
    backbone: str
    """Empty for the blend."""
    true_prob: NDArray[np.float64]
    """(n,) OOF probability of the true class; a candidate's is uncalibrated."""
    accuracy: float

    @property
    def logloss(self) -> float:
        """OOF log loss, in nats."""
        return float(row_losses(self.true_prob).mean())


def models(comparison: Comparison) -> list[Model]:
    """Each run's blend, then its best complete candidates."""
    return [model for side in comparison.sides for model in _models_of(comparison, side)]


def _models_of(comparison: Comparison, side: Side) -> Iterator[Model]:
    labels, rows = comparison.labels, np.arange(len(comparison.labels))
    hits = float(comparison.hits(side).mean())
    yield Model(side.name, "blend", "", side.prob[rows, labels], hits)
    folds, scored = side.store.folds(), side.store.scored_rows()
    place = {folds.image_paths[row]: i for i, row in enumerate(scored)}
    own_rows = np.array([place[path] for path in comparison.image_paths])
    complete = [s for s in ranked(side.store.summaries()) if s.status == "complete" and s.best]
    for summary in complete[:CANDIDATES]:
        candidate = summary.candidate
        found = normalise(side.store.oof(candidate.candidate, summary.best or "")[own_rows])
        prob = found[:, side.columns]
        yield Model(
            side.name, candidate.candidate, candidate.backbone, prob[rows, labels],
            accuracy(prob, labels),
        )  # fmt: skip
