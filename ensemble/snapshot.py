"""Snapshots of one training, averaged.

Takes a `Pool`, gives a `Fit`. Source: Huang, Li, Pleiss, Liu, Hopcroft and Weinberger, Snapshot
Ensembles: Train 1, Get M for Free, ICLR 2017.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby

from ensemble.blend import clipped
from ensemble.certificate import certified
from ensemble.fit import Fit, Settings, mixture_fit
from ensemble.pool import Member, Pool
from ensemble.uniform import equal_weights
from experiment.errors import ConfigError
from experiment.metrics import log_loss_of_true

_SNAPSHOT = re.compile(r"snap(\d+)")


def is_snapshot(member: Member) -> bool:
    """Whether it is the end of a cycle, or one of the next best epochs."""
    return _SNAPSHOT.fullmatch(member.variant) is not None


def snapshot(pool: Pool, settings: Settings) -> Fit:
    """The mean of a candidate's last snapshots; which candidate and how many by the OOF loss.

    Raises ConfigError where no member is a snapshot, and where members are forced.
    """
    if settings.forced:
        raise ConfigError.single(
            "ensemble.include",
            "the method 'snapshot' takes one candidate's snapshots alone and can force none in; "
            "empty the list or use another method",
        )
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
    """Sets of a candidate's snapshots, small ones first.

    They are numbered in time where the learning rate has cycles, else the best first: so sets from
    either end are tried.
    """
    numbered = sorted(
        (member.run, member.candidate, int(found[1]), index)
        for index, member in enumerate(pool.members)
        if (found := _SNAPSHOT.fullmatch(member.variant))
    )
    for _, of_candidate in groupby(numbered, key=lambda row: row[:2]):
        indices = [row[-1] for row in of_candidate]
        for size in range(1, len(indices) + 1):
            yield indices[-size:]
            yield indices[:size]
