"""Which members are the same column as an earlier one: the same checkpoint, twice.

Takes true_prob (M, N) and a number a member that equal columns share; gives the members to keep.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from ensemble.blend import clipped

_NEAR = 1e-11
"""Scores of equal columns differ by rounding at most, where they were summed in another order."""


def first_of_equals(members: NDArray[np.floating], scores: NDArray[np.float64]) -> NDArray[np.intp]:
    """Ascending, of each set of equal columns the lowest member; values below CLIP are equal.

    Only columns whose scores (M,) are nearly equal are read.
    """
    order = np.argsort(scores, kind="stable")
    near = np.diff(scores[order]) <= _NEAR
    suspects = order[np.append(near, False) | np.insert(near, 0, False)]
    keep = np.ones(len(members), dtype=bool)
    seen: set[bytes] = set()
    for member in np.sort(suspects):
        digest = hashlib.blake2b(clipped(members[member]).tobytes(), digest_size=16).digest()
        keep[member] = digest not in seen
        seen.add(digest)
    return np.flatnonzero(keep)
