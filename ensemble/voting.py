"""One vote a candidate: a probability (soft) or its most probable class (hard).

Takes a `Pool`, gives a `Fit`. A candidate votes with its better variant, so that one with many
variants has no more say than another.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ensemble.certificate import certified
from ensemble.combine import Votes
from ensemble.fit import Fit, Settings, mixture_fit
from ensemble.optimal import optimal
from ensemble.pool import Pool
from ensemble.ranking import distinct_members, own_losses
from ensemble.uniform import equal_weights


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
