"""The race: whether a candidate gets its next folds, by what it adds to the blend.

Takes candidates with their finished folds, reads their OOF rows from the store, gives
`RaceDecision`s. The rules are rows of a table.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ensemble.gain import Gain
from experiment.config import RaceConfig
from experiment.records import CandidateSummary, RaceDecision
from experiment.store import RunStore


class Race:
    """The state of the race: the blend of the complete candidates, and everybody's gain over it."""

    def __init__(self, store: RunStore, config: RaceConfig) -> None:
        raise NotImplementedError

    def replay(self, summaries: list[CandidateSummary]) -> None:
        """What an earlier session left: complete candidates join the blend, decisions are known."""
        raise NotImplementedError

    def judge(self, summary: CandidateSummary) -> RaceDecision:
        """After a finished fold: `continue`, `stop`, or `complete` after the last one, which joins
        the blend (its gain is that over the blend without it)."""
        raise NotImplementedError

    def gain_of(
        self, fold: int, columns: Mapping[str, NDArray[np.floating]]
    ) -> tuple[str, Gain] | None:
        """The better variant of a trial in mid-training: calibrated true-class columns (n,) on the
        fold's rows, ascending. None before `min_complete` candidates are complete."""
        raise NotImplementedError

    def gains(self) -> dict[str, float]:
        """Candidate -> its gain over the blend as it is now, of those with a finished fold."""
        raise NotImplementedError

    @property
    def open(self) -> bool:
        """Whether candidates may be stopped: `min_complete` of them are complete."""
        raise NotImplementedError
