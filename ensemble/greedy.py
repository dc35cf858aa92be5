"""Greedy selection with replacement: the default blend.

Takes true_prob (M, N), members x rows; gives the `Blend` of the best prefix of the rounds.
Source: Caruana, Niculescu-Mizil, Crew and Ksikes, Ensemble Selection from Libraries of Models,
ICML 2004.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensemble.blend import Blend, checked_members, clipped
from ensemble.certificate import certified
from experiment.metrics import CLIP, log_loss_of_true

_TIE = 1e-12
"""Losses closer than this, in nats, are equal: rounding must not choose between members."""
_STRIP = 512
"""Rows summed in the members' own precision; the error is at most _STRIP * eps."""


def greedy(true_prob: ArrayLike, max_rounds: int = 50, max_members: int | None = None) -> Blend:
    """Adds, in each round, the member (again or anew) that makes the mean of all picks best.

    true_prob (M, N) in [0, 1], float32 or float64, at most max_members of them with a weight. Ties
    go to the lowest member and to the shortest prefix; so the lowest of exact duplicates gets the
    weight of them all. Raises ValueError on wrong values (member and row named) or limits below 1.
    """
    for name, limit in (("max_rounds", max_rounds), ("max_members", max_members)):
        if limit is not None and limit < 1:
            raise ValueError(f"{name} is {limit}, should be at least 1")
    members = checked_members(true_prob)
    path, losses = _rounds(members, max_rounds, max_members or len(members))
    best = 1 + _first_within_tie(-np.array(losses))
    weights = np.bincount(path[:best], minlength=len(members)) / best
    return certified(members, weights, path[:best], losses)


def _rounds(
    members: NDArray[np.floating], max_rounds: int, max_members: int
) -> tuple[list[int], list[float]]:
    """The pick and the loss of every round."""
    pool, eligible = np.arange(len(members)), members
    total = np.zeros(members.shape[1])  # (N,) sum of the picks
    path: list[int] = []
    losses: list[float] = []
    while len(path) < max_rounds:
        path.append(int(pool[_best_addition(eligible, total)]))
        total += clipped(members[path[-1]])
        losses.append(log_loss_of_true(total / len(path)))
        if max_members < len(pool) and len(set(path)) == max_members:
            pool = np.unique(path)
            eligible = members[pool]
    return path, losses


def _best_addition(members: NDArray[np.floating], total: NDArray[np.float64]) -> int:
    """The member with the highest score = mean_i log(total_i + t_mi), the lowest one on a tie.

    Scores are computed from the highest upper bound down, until no bound reaches the best score:
    the result of computing all, for a small part of the logarithms.
    """
    bounds = _upper_bounds(members, total)
    scores = np.full(len(members), -np.inf)
    best = -np.inf
    for member in np.argsort(-bounds, kind="stable"):
        if bounds[member] < best - _TIE:
            break
        sums = clipped(members[member])
        sums += total
        scores[member] = np.log(sums, out=sums).mean()
        best = max(best, scores[member])
    return _first_within_tie(scores)


def _upper_bounds(members: NDArray[np.floating], total: NDArray[np.float64]) -> NDArray[np.float64]:
    """(M,) upper bounds of the scores; infinite as long as nothing is picked.

    Jensen: mean log(s) = mean log(s / total) + mean log(total) <= log mean(s / total) + the same,
    with s = total + t_m. A t_m below CLIP counts as at most t_m + CLIP.
    """
    if not total.any():
        return np.full(len(members), np.inf)
    inverse = 1.0 / total
    growth = 1.0 + (_row_sums(members, inverse) + CLIP * inverse.sum()) / len(total)
    slack = _TIE + _STRIP * float(np.finfo(members.dtype).eps)
    return np.asarray(np.log(total).mean() + np.log(growth) + slack)


def _row_sums(members: NDArray[np.floating], inverse: NDArray[np.float64]) -> NDArray[np.float64]:
    """members @ inverse (M,), strip by strip: fast in float32, the strips added in float64."""
    factors = inverse.astype(members.dtype)
    sums = np.zeros(len(members))
    for start in range(0, len(factors), _STRIP):
        strip = slice(start, start + _STRIP)
        sums += members[:, strip] @ factors[strip]
    return sums


def _first_within_tie(scores: NDArray[np.float64]) -> int:
    return int(np.argmax(scores >= scores.max() - _TIE))
