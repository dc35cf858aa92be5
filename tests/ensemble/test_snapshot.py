"""Snapshot ensembles against all sets of a candidate's first or last snapshots."""

from __future__ import annotations

import numpy as np
import pytest

from foldrace.core.errors import ConfigError
from foldrace.core.metrics import log_loss
from foldrace.ensemble.methods import fit_method
from foldrace.ensemble.pool import Member
from foldrace.ensemble.pooling import Settings, blend_prob
from foldrace.ensemble.solvers.equal_weights import snapshot
from tests.ensemble.member_pools import made_up, pool_of

VARIANTS = ("snap10", "snap2", "raw", "snap1", "snap9")
IN_TIME = (3, 1, 4, 0)
"""Places of the snapshots in VARIANTS, by their number."""


@pytest.mark.parametrize("seed", range(6))
def test_equals_all_runs_of_all_candidates(seed: int) -> None:
    log_probs, labels = made_up(10, 60, 3, seed)
    members = [Member(f"c{i}", variant) for i in (1, 0) for variant in VARIANTS]
    probs = np.exp(log_probs.astype(np.float64))
    best = min(
        (log_loss(probs[run].mean(axis=0), labels), sorted(run))
        for first in (0, 5)
        for size in (1, 2, 3, 4)
        for run in (
            [first + place for place in IN_TIME[-size:]],
            [first + place for place in IN_TIME[:size]],
        )
    )
    pool = pool_of(log_probs, labels, members)
    fit = snapshot(pool, Settings())
    assert fit.used.tolist() == best[1]
    np.testing.assert_allclose(blend_prob(fit, pool), probs[best[1]].mean(axis=0), atol=1e-6)


def test_without_snapshots_it_says_how_to_get_them() -> None:
    log_probs, labels = made_up(2, 20, 3)
    pool = pool_of(log_probs, labels, [Member("c0", "raw"), Member("c0", "ema")])
    with pytest.raises(ConfigError, match="no member is one; train with `snapshots: 3`") as caught:
        snapshot(pool, Settings())
    assert caught.value.exit_code == 2


def test_a_forced_member_has_no_place() -> None:
    log_probs, labels = made_up(2, 20, 3)
    pool = pool_of(log_probs, labels, [Member("c0", "snap1"), Member("c0", "snap2")])
    with pytest.raises(ConfigError, match="'snapshot' can force none in"):
        fit_method("snapshot", pool, Settings(forced=(0,)))
