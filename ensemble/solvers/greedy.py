"""Greedy selection with replacement: the default blend.

Takes true_prob (M, N), members x rows; gives the `Blend` of the best prefix of the rounds.
Source: Caruana, Niculescu-Mizil, Crew and Ksikes, Ensemble Selection from Libraries of Models,
ICML 2004; bags are its section 2.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from foldrace.ensemble.blend import Blend, checked_forced, checked_members, clipped
from foldrace.ensemble.solvers.kernels import Backend, MemberSums, certified, member_sums

TIE = 1e-12
"""Losses closer than this, in nats, are equal: rounding must not choose between members."""
_LEAD = 32
"""Members, highest bound first, whose best score decides which of the others are scored."""


def greedy(
    true_prob: ArrayLike,
    max_rounds: int = 50,
    max_members: int | None = None,
    bags: int = 0,
    forced: Sequence[int] = (),
    seed: int = 0,
    backend: Backend | None = None,
) -> Blend:
    """Add, in each round, the member (new or again) that makes the mean of all picks best.

    true_prob (M, N) in [0, 1], float32 or float64, may be memory-mapped; at most max_members of
    them get a weight. Ties go to the lowest member and to the shortest prefix; so the lowest of
    exact duplicates gets the weight of them all. `forced` members are picked first, one per round,
    and every prefix that counts holds them all. bags > 0: the weights are the average over `bags`
    random halves of the members, drawn with `seed`, and there is no path; if the average has more
    than max_members, the heaviest (and the forced) are kept. The certificate bounds the distance to
    the best of all blends, with or without forced members. Backends: see `kernels`.

    Raises ValueError on wrong values (member and row named) or limits that cannot be met.
    """
    members = checked_members(true_prob)
    first = checked_forced(forced, len(members))
    _check_limits(max_rounds, max_members, bags, len(first))
    sums = member_sums(members, backend)
    most = max_members or len(members)
    if bags:
        return certified(members, _bagged(sums, max_rounds, most, bags, first, seed), sums=sums)
    path, losses = _rounds(sums, np.arange(len(members)), max_rounds, most, first)
    length = _best_prefix(losses, len(first))
    return certified(members, _shares(path[:length], len(members)), path[:length], losses, sums)


def _check_limits(rounds: int, most: int | None, bags: int, n_forced: int) -> None:
    for name, limit in (("max_rounds", rounds), ("max_members", most)):
        if limit is not None and limit < max(1, n_forced):
            why = f" for {n_forced} forced members" if n_forced > 1 else ""
            raise ValueError(f"{name} is {limit}, should be at least {max(1, n_forced)}{why}")
    if bags < 0:
        raise ValueError(f"bags is {bags}, should be at least 0")


def _bagged(
    sums: MemberSums, rounds: int, most: int, bags: int, forced: Sequence[int], seed: int
) -> NDArray[np.float64]:
    """(M,) the average weights of greedy over random halves of the members."""
    n_members = len(sums.members)
    rng = np.random.default_rng(seed)
    weights = np.zeros(n_members)
    for _ in range(bags):
        half = rng.choice(n_members, size=-(-n_members // 2), replace=False)
        pool = np.union1d(half, np.array(forced, dtype=np.intp)).astype(np.intp)
        path, losses = _rounds(sums, pool, rounds, most, forced)
        weights += _shares(path[: _best_prefix(losses, len(forced))], n_members) / bags
    keeps = np.isin(np.arange(n_members), forced)
    order = np.lexsort((-weights, ~keeps))  # the forced ones first, then by weight
    weights[order[most:]] = 0.0
    return np.asarray(weights / weights.sum())


def _shares(path: Sequence[int], n_members: int) -> NDArray[np.float64]:
    return np.bincount(path, minlength=n_members) / len(path)


def _best_prefix(losses: Sequence[float], at_least: int) -> int:
    start = max(0, at_least - 1)
    return 1 + start + _first_within_tie(-np.array(losses[start:]))


def _rounds(
    sums: MemberSums,
    pool: NDArray[np.intp],
    max_rounds: int,
    max_members: int,
    forced: Sequence[int],
) -> tuple[list[int], list[float]]:
    """The pick and the loss of every round, from the members in pool (ascending)."""
    total = np.zeros(sums.members.shape[1])  # (N,) sum of the picks
    height = 0.0  # mean log total, once there is one
    bounds = np.full(len(sums.members), np.inf)  # (M,) of the gains
    path: list[int] = []
    losses: list[float] = []
    while len(path) < max_rounds:
        waiting = len(path) < len(forced)
        if waiting:
            path.append(forced[len(path)])
        else:
            path.append(_best_addition(sums, pool, total, height, bounds))
        if len(path) == 1:
            bounds[:] = np.inf  # gains over nothing at all: no bound on any later one
        total += clipped(sums.members[path[-1]])
        height = float(np.log(total).mean())
        losses.append(math.log(len(path)) - height)
        if len(path) >= len(forced) and len(set(path)) == max_members:
            pool = np.unique(path)
    return path, losses


def _best_addition(
    sums: MemberSums,
    pool: NDArray[np.intp],
    total: NDArray[np.float64],
    height: float,
    bounds: NDArray[np.float64],
) -> int:
    """The member of the pool with the highest gain, the lowest one on a tie.

    The gain is mean_i log(total_i + t_mi) - height. `bounds` (M,) holds gains of earlier rounds and
    takes those computed now.

    A gain only falls as the total grows, so an old one still bounds it from above. Members are
    scored from the highest bound down, until no bound reaches the best score: the result of scoring
    all. Source: Minoux, Accelerated greedy algorithms for maximizing submodular set functions,
    1978.
    """
    order = pool[np.argsort(-bounds[pool], kind="stable")]
    lead, rest = order[:_LEAD], order[_LEAD:]
    gains = np.full(len(bounds), -np.inf)
    gains[lead] = sums.mean_logs(lead, total) - height
    rest = np.sort(rest[bounds[rest] >= gains.max() - TIE])
    gains[rest] = sums.mean_logs(rest, total) - height
    scored = np.isfinite(gains)
    bounds[scored] = gains[scored] + TIE
    return _first_within_tie(gains)


def _first_within_tie(scores: NDArray[np.float64]) -> int:
    return int(np.argmax(scores >= scores.max() - TIE))
