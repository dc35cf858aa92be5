"""Blends whose members have equal weights: uniform, the best k, votes, one training's snapshots.

Each takes a `Pool` and gives a `Fit`; of exact duplicates only one counts. Source of the snapshots:
Huang, Li, Pleiss, Liu, Hopcroft and Weinberger, Snapshot Ensembles: Train 1, Get M for Free, ICLR
2017.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from foldrace.core.errors import ConfigError
from foldrace.core.metrics import log_loss_of_true
from foldrace.ensemble.blend import clipped
from foldrace.ensemble.pool import Member, Pool, distinct_members, own_losses
from foldrace.ensemble.pooling import Fit, Settings, Votes, mixture_fit
from foldrace.ensemble.solvers.kernels import certified
from foldrace.ensemble.solvers.optimal import optimal
from foldrace.run_folder.variants import RAW


def uniform(pool: Pool, settings: Settings) -> Fit:
    """The plain mean of all distinct members."""
    members = distinct_members(pool, settings.forced)
    return mixture_fit(certified(pool.true_prob, equal_weights(members, len(pool.members))))


def equal_weights(members: Sequence[int] | NDArray[np.intp], n_members: int) -> NDArray[np.float64]:
    """(n_members,) with 1/k for each of the k members, 0 elsewhere."""
    weights = np.zeros(n_members)
    weights[members] = 1.0 / len(members)
    return weights


def top_k(pool: Pool, settings: Settings) -> Fit:
    """The forced members, then the others by their own loss, as far as their mean gets better.

    Ties go to the lower member and to the smaller k. The path is the members in that order.
    """
    members = distinct_members(pool, settings.forced)
    is_forced = np.isin(members, settings.forced)
    order = members[np.lexsort((own_losses(pool)[members], ~is_forced))]
    losses = _prefix_losses(pool.true_prob, order)
    least = max(1, int(is_forced.sum()))
    k = least + int(np.argmin(losses[least - 1 :]))
    weights = equal_weights(order[:k], len(pool.members))
    path = [int(member) for member in order[:k]]
    return mixture_fit(certified(pool.true_prob, weights, path, losses))


def _prefix_losses(true_prob: NDArray[np.floating], order: NDArray[np.intp]) -> list[float]:
    """The loss of the mean of the first 1, 2, ... members."""
    total = np.zeros(true_prob.shape[1])
    losses = []
    for count, member in enumerate(order, start=1):
        total += clipped(true_prob[member])
        losses.append(log_loss_of_true(total / count))
    return losses


def soft_vote(pool: Pool, settings: Settings) -> Fit:
    """The mean of the voters' probabilities."""
    weights = equal_weights(_voters(pool, settings.forced), len(pool.members))
    return mixture_fit(certified(pool.true_prob, weights))


def hard_vote(pool: Pool, settings: Settings) -> Fit:
    """(1 - e) * share of the votes + e / C, with the e of the least loss on the pool's rows.

    e is at least the rule of succession's 1 / (N + 2): that N rows had no wrong vote does not show
    that none will, and without it a single one would cost 34 nats.
    """
    voters = _voters(pool, settings.forced)
    right = np.zeros(len(pool.labels))
    for voter in voters:
        right += pool.log_prob(int(voter)).argmax(axis=1) == pool.labels
    constant = np.full(len(right), 1.0 / pool.n_classes)
    mixed = optimal(
        np.stack([right / len(voters), constant]), forced=(1,), min_weight=1.0 / (len(right) + 2)
    )
    return Fit(Votes(equal_weights(voters, len(pool.members)), float(mixed.weights[1])))


def _voters(pool: Pool, forced: tuple[int, ...]) -> NDArray[np.intp]:
    """A candidate's forced variants, or else the one with the least loss, the lowest on a tie."""
    losses = own_losses(pool)
    best: dict[tuple[str, str], list[int]] = {}
    for member in dict.fromkeys(forced):
        best.setdefault(_candidate(pool, member), []).append(member)
    for member in np.argsort(losses, kind="stable"):
        best.setdefault(_candidate(pool, int(member)), [int(member)])
    voters = np.array(sorted(m for chosen in best.values() for m in chosen), dtype=np.intp)
    kept = tuple(np.flatnonzero(np.isin(voters, forced)).tolist())
    return voters[distinct_members(pool.take(voters), kept)]


def _candidate(pool: Pool, member: int) -> tuple[str, str]:
    return pool.members[member].run, pool.members[member].candidate


_SNAPSHOT = re.compile(r"snap(\d+)")


def is_snapshot(member: Member) -> bool:
    """Say whether it is the end of a cycle, or one of the epochs before the last."""
    return _SNAPSHOT.fullmatch(member.variant) is not None


def snapshot(pool: Pool, settings: Settings) -> Fit:
    """The mean of a candidate's last epoch and of the snapshots right before it.

    Which candidate and how many of them by the OOF loss. Within limits it takes snapshots alone.

    Raises ConfigError where no member is a snapshot; none can be forced.
    """
    runs = list(_runs(pool))
    if not runs:
        raise ConfigError.single(
            "ensemble.method",
            "'snapshot' needs snapshots, and no member is one; train with `snapshots: 3` in "
            "search.space, or use another method",
        )
    best = min(runs, key=lambda run: _loss(pool, run))
    return mixture_fit(certified(pool.true_prob, equal_weights(best, len(pool.members))))


def _loss(pool: Pool, members: list[int]) -> float:
    total = sum(clipped(pool.true_prob[member]) for member in members)
    return log_loss_of_true(total / len(members))


def _runs(pool: Pool) -> Iterator[list[int]]:
    """The last 1, 2, ... of a candidate's snapshots and raw weights, which are in time the last."""
    numbered = sorted(
        (member.run, member.candidate, int(found[1]) if found else math.inf, index)
        for index, member in enumerate(pool.members)
        if (found := _SNAPSHOT.fullmatch(member.variant)) or member.variant == RAW
    )
    for _, of_candidate in groupby(numbered, key=lambda row: row[:2]):
        indices = [row[-1] for row in of_candidate]
        if is_snapshot(pool.members[indices[0]]):
            yield from (indices[first:] for first in reversed(range(len(indices))))
