"""The optimal blend of a growing set of members and one constant member 1/C.

Takes calibrated true-class columns (N,) as candidates become complete; gives the blend's true-class
probabilities, against which others are judged. Keeps a bounded number of columns.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray


class RunningBlend:
    """The least log loss that a mixture of the members has, kept up to date.

    `most_members`: beyond so many columns those with the least slope toward them go.
    """

    def __init__(
        self, n_rows: int, n_classes: int, most_members: int = 1000, tolerance: float = 1e-5
    ) -> None:
        raise NotImplementedError

    def add(self, columns: Mapping[str, NDArray[np.floating]]) -> None:
        """Members by name, each (N,): the variants of one candidate, or of many at once."""
        raise NotImplementedError

    @property
    def mixed(self) -> NDArray[np.float64]:
        """(N,) true-class probability of the blend; 1/C everywhere before the first member."""
        raise NotImplementedError

    @property
    def loss(self) -> float:
        """Log loss of `mixed`."""
        raise NotImplementedError

    @property
    def weights(self) -> dict[str, float]:
        """Members with a weight; the constant one is left out."""
        raise NotImplementedError

    @property
    def version(self) -> int:
        """Changes whenever `mixed` does."""
        raise NotImplementedError
