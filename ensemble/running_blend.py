"""The optimal blend of a growing set of members and one constant member 1/C.

Takes calibrated true-class columns (N,) as candidates become complete; gives the blend's true-class
probabilities, and the bounded gain of a step toward another member. Keeps a bounded number of
columns.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from foldrace.core.metrics import CLIP
from foldrace.ensemble.blend import clipped
from foldrace.ensemble.solvers.kernels import member_sums
from foldrace.ensemble.solvers.optimal import SearchState, improved
from foldrace.ensemble.uncertainty import Groups, standard_error

STEP = 0.1
"""Weight of the member in the step."""
MOST_LOST = -math.log1p(-STEP) / STEP
"""Nats that a row can lose at most: the member gives its true class nothing."""


@dataclass(frozen=True)
class Gain:
    """Mean and standard error over `rows` rows, in nats per row."""

    mean: float
    se: float
    rows: int


def bounded_gain(
    true_prob: NDArray[np.floating],
    mixed: NDArray[np.floating],
    rows: NDArray[np.int64] | None = None,
    groups: Groups = None,
) -> Gain:
    """Mean and error of x_i = (log((1 - STEP) q_i + STEP t_i) - log q_i) / STEP.

    For the member's t (n,) and the blend's q (n,), q > 0: to first order minus the slope of the
    blend's log loss toward the member, and bounded where q is tiny: one overconfident row cannot
    decide.

    The standard error is `standard_error`, of groups (n,) where rows have some. One row alone has
    no spread: its error is MOST_LOST, so that with z >= 1 it stops no candidate.
    `rows` (n,): which row each of the n is of, where repeats have scored some several times. A
    row's x is then the mean over its own, and counts once.

    Raises ValueError on no rows, on other shapes, and where q is not positive.
    """
    if true_prob.shape != mixed.shape or true_prob.ndim != 1 or len(mixed) == 0:
        raise ValueError(
            f"the member has shape {true_prob.shape}, the blend {mixed.shape}, both should be (n,)"
        )
    if not mixed.min() > 0.0:
        row = int((~(mixed > 0.0)).argmax())
        raise ValueError(f"row {row}: the blend gives {mixed[row]}, should be above 0")
    gains = np.log1p(STEP * (clipped(true_prob) / mixed - 1.0)) / STEP
    if rows is not None:
        _, first, number, times = np.unique(
            rows, return_index=True, return_inverse=True, return_counts=True
        )
        gains = np.bincount(number, weights=gains) / times
        groups = None if groups is None else groups[first]
    count = len(gains)
    se = standard_error(gains, groups) if count > 1 else MOST_LOST
    return Gain(float(gains.mean()), se, count)


_AT_A_TIME = 4
"""At most one such part of the places is filled at a time: which of more columns are worth a
place is only known against the blend of those before them."""


@dataclass(frozen=True, eq=False)
class _Column:
    name: str
    values: NDArray[np.float32]  # (N,)
    digest: bytes


class RunningBlend:
    """The least log loss that a mixture of the members has, kept up to date.

    n_rows is N, n_classes is C. `most_members`: beyond that many columns those with the least slope
    toward them go, never one with a weight; where all have one, there is no room for another. The
    loss is within `tolerance` (nats) of the least one of the columns held.
    """

    def __init__(
        self, n_rows: int, n_classes: int, most_members: int = 1000, tolerance: float = 1e-5
    ) -> None:
        if min(n_rows, n_classes, most_members) < 1:
            raise ValueError(
                f"{n_rows} rows, {n_classes} classes and at most {most_members} members: each "
                "should be at least 1"
            )
        self._tolerance = tolerance
        # The system gives memory to a row of it only when that is written.
        self._matrix = np.empty((1 + most_members, n_rows), dtype=np.float32)
        self._matrix[0] = 1.0 / n_classes  # the constant member, which never goes
        self._names = [""]
        self._digests = [_digest(self._matrix[0])]
        alone, mixed = np.zeros(1, dtype=np.intp), np.full(n_rows, 1.0 / n_classes)
        mixed.flags.writeable = False
        self._found = SearchState(alone, np.ones(1), mixed, math.log(n_classes), 0.0, np.ones(1))
        self._version = 0

    def add(self, columns: Mapping[str, NDArray[np.floating]]) -> None:
        """Add members by name, each (N,): the variants of one candidate, or of many at once.

        A column that equals one that is held is left out. Raises ValueError on another shape, on a
        value outside [0, 1] (member and row named), and on a name that another column has.
        """
        given = list(columns.items())
        part = max(1, (len(self._matrix) - 1) // _AT_A_TIME)
        for start in range(0, len(given), part):
            new = self._new(given[start : start + part])
            if new:
                self._add(new)

    @property
    def mixed(self) -> NDArray[np.float64]:
        """(N,) true-class probability of the blend; 1/C everywhere before the first member."""
        return self._found.mixed

    @property
    def loss(self) -> float:
        """Log loss of `mixed`."""
        return self._found.loss

    @property
    def certificate(self) -> float:
        """No mixture of the columns held has a loss below `loss - certificate`."""
        return self._found.certificate

    @property
    def weights(self) -> dict[str, float]:
        """Members with a weight; the constant one is left out."""
        pairs = zip(self._found.index.tolist(), self._found.v.tolist(), strict=True)
        return {self._names[i]: v for i, v in pairs if i > 0 and v > 0.0}

    @property
    def version(self) -> int:
        """Number that changes whenever `mixed` does."""
        return self._version

    def __len__(self) -> int:
        """Columns held; the constant one is left out."""
        return len(self._names) - 1

    def _new(self, given: Sequence[tuple[str, NDArray[np.floating]]]) -> list[_Column]:
        """The columns that equal none that is held, nor one before them."""
        new: dict[bytes, _Column] = {}
        for name, values in given:
            column = self._checked(name, values)
            if column.digest in self._digests or column.digest in new:
                continue
            if name in self._names:
                raise ValueError(f"member {name!r} is held already, with another column")
            new[column.digest] = column
        return list(new.values())

    def _checked(self, name: str, values: NDArray[np.floating]) -> _Column:
        n_rows = self._matrix.shape[1]
        if values.shape != (n_rows,):
            raise ValueError(f"member {name!r} has shape {values.shape}, should be ({n_rows},)")
        wrong = ~((values >= 0.0) & (values <= 1.0))
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(
                f"member {name!r}, row {row}: {values[row]} is not a probability in [0, 1]"
            )
        column = values.astype(np.float32)
        return _Column(name, column, _digest(column))

    def _add(self, new: list[_Column]) -> None:
        stacked = np.stack([column.values for column in new])
        slopes = member_sums(stacked).mean_products(np.arange(len(new)), 1.0 / self.mixed)
        places = self._places(slopes)
        room = max([len(self._names), *(place + 1 for place in places.values())])
        held = np.resize(self._found.slopes, room)
        for i, place in places.items():
            self._hold(new[i], place)
            held[place] = slopes[i]
        certificate = max(0.0, math.log(float(held.max())))
        self._improve(replace(self._found, slopes=held, certificate=certificate))

    def _places(self, slopes: NDArray[np.float64]) -> dict[int, int]:
        """Places of the new columns with these slopes that are to be held.

        In the free places, then instead of columns without a weight that the blend wants less.
        """
        held = len(self._names)
        free = list(range(held, len(self._matrix)))[: len(slopes)]
        weightless = np.setdiff1d(np.arange(1, held), self._found.index[self._found.v > 0.0])
        wanted = np.concatenate([self._found.slopes[weightless], slopes])
        best = np.argsort(-wanted, kind="stable")[: len(weightless) + len(free)]
        free += np.delete(weightless, best[best < len(weightless)]).tolist()
        taken = np.sort(best[best >= len(weightless)]) - len(weightless)
        return dict(zip(taken.tolist(), free, strict=True))

    def _hold(self, column: _Column, place: int) -> None:
        self._matrix[place] = column.values
        self._names[place : place + 1] = [column.name]
        self._digests[place : place + 1] = [column.digest]

    def _improve(self, found: SearchState) -> None:
        """Search on from `found`: it knows of all columns, its weights are of the old ones."""
        sums = member_sums(self._matrix[: len(self._names)])
        self._found = improved(sums, found, self._tolerance)
        self._found.mixed.flags.writeable = False
        self._version += self._found is not found


def _digest(values: NDArray[np.float32]) -> bytes:
    """Digest of a column (N,); values below CLIP are equal."""
    floored = np.maximum(values, np.float32(CLIP))
    return hashlib.blake2b(floored.tobytes(), digest_size=16).digest()
