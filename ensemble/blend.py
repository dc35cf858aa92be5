"""What every blend method takes and gives.

Takes the true-class probabilities true_prob (M, N), members x rows, checked here once for all
methods; gives the record `Blend`, and the members that equal an earlier one. With rows that sum to
1, the log loss of a blend needs no more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from foldrace.core.metrics import CLIP


@dataclass(frozen=True, eq=False)
class Blend:
    """Weights on the simplex and what they cost."""

    weights: NDArray[np.float64]
    """(M,) sums to 1."""
    loss: float
    """Log loss of the blend on the rows it was chosen on, in nats."""
    certificate: float
    """No weights have a loss below `loss - certificate`; from `optimal` with a least weight for
    forced members: no weights that obey it."""
    path: tuple[int, ...] = ()
    """The member picked at each round, up to the best prefix; empty for a method without rounds."""
    path_losses: tuple[float, ...] = ()
    """The loss after each round that ran, beyond the best prefix too."""


def checked_members(true_prob: ArrayLike) -> NDArray[np.floating]:
    """(M, N) float32 or float64, never a copy of such an array.

    Raises ValueError on another shape, on no members or rows, and on a value outside [0, 1]; it
    names member and row.
    """
    members = np.asarray(true_prob)
    if members.dtype not in (np.float32, np.float64) or not members.dtype.isnative:
        members = members.astype(np.float64)
    if members.ndim != 2 or members.size == 0:
        raise ValueError(f"true_prob has shape {members.shape}, should be (members, rows)")
    if not _all_within_0_and_1(members):
        member, row = np.argwhere(~((members >= 0.0) & (members <= 1.0)))[0]
        value = members[member, row]
        raise ValueError(f"member {member}, row {row}: {value} is not a probability in [0, 1]")
    return members


def _all_within_0_and_1(members: NDArray[np.floating]) -> bool:
    """Say whether all values are in [0, 1]; False on NaN.

    In one pass: the bits of floats from 0 to 1 are ordered as unsigned integers, and those of NaN
    and of negative numbers lie above them.
    """
    bits = np.dtype(f"u{members.itemsize}")
    if members.view(bits).max() <= np.ones(1, members.dtype).view(bits)[0]:
        return True
    return bool(members.min() >= 0.0 and members.max() <= 1.0)  # -0.0 has the bits of a negative


def checked_forced(forced: Sequence[int], n_members: int) -> tuple[int, ...]:
    """Each index once, in order; ValueError unless all are members."""
    wrong = [member for member in forced if not 0 <= member < n_members]
    if wrong:
        raise ValueError(f"forced members {wrong} do not exist, should be in 0..{n_members - 1}")
    return tuple(dict.fromkeys(int(member) for member in forced))


def checked_weights(weights: ArrayLike, n_members: int) -> NDArray[np.float64]:
    """(M,) float64; ValueError unless they are >= 0 and sum to 1 within 1e-9."""
    values = np.asarray(weights, dtype=np.float64)
    if values.shape != (n_members,):
        raise ValueError(f"the weights have shape {values.shape}, should be ({n_members},)")
    if not (values >= 0.0).all():
        member = int((~(values >= 0.0)).argmax())
        raise ValueError(f"member {member}: the weight is {values[member]}, should be >= 0")
    if abs(values.sum() - 1.0) > 1e-9:
        raise ValueError(f"the weights sum to {values.sum()}, should sum to 1")
    return values


def clipped(members: NDArray[np.floating]) -> NDArray[np.float64]:
    """A float64 copy, at least CLIP: meant for a member or a block of members."""
    floored = members.astype(np.float64)
    return np.maximum(floored, CLIP, out=floored)


def mixture(members: NDArray[np.floating], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The blend's true-class probabilities (N,) from members (M, N) and weights (M,)."""
    mixed = np.zeros(members.shape[1])
    for member in np.flatnonzero(weights):
        mixed += weights[member] * clipped(members[member])
    return mixed


_NEAR = 1e-11
"""Scores of equal columns differ by rounding at most, where they were summed in another order."""


def first_of_equals(members: NDArray[np.floating], scores: NDArray[np.float64]) -> NDArray[np.intp]:
    """The lowest member of each set of equal columns, ascending; values below CLIP are equal.

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
