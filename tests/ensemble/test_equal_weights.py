"""Blends with equal weights: uniform, the best k, votes, snapshots."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from foldrace.core.errors import ConfigError
from foldrace.core.metrics import log_loss
from foldrace.ensemble.methods import fit_method
from foldrace.ensemble.pool import Member, Pool
from foldrace.ensemble.pooling import Settings, blend_prob
from foldrace.ensemble.solvers.equal_weights import hard_vote, snapshot, soft_vote, top_k, uniform
from tests.ensemble.member_pools import made_up, of_variants, pool_of

LOG_PROBS, LABELS = made_up(12, 200, 4)
POOL = pool_of(LOG_PROBS, LABELS, of_variants(4, ("raw", "ema", "snap1")))
PROBS = np.exp(LOG_PROBS.astype(np.float64))
LOSSES = [log_loss(prob, LABELS) for prob in PROBS]
VOTERS = [min(range(3 * c, 3 * c + 3), key=lambda m: LOSSES[m]) for c in range(4)]


def with_copy(pool: Pool, member: int) -> Pool:
    """The member once more, at the end, as another candidate."""
    order = np.array([*range(len(pool.members)), member])
    taken = pool.take(order)
    return Pool(
        (*pool.members, Member("copy")), taken.true_prob, pool.labels, pool.n_classes,
        taken.log_prob,
    )  # fmt: skip


def test_uniform_is_the_plain_mean() -> None:
    np.testing.assert_allclose(
        blend_prob(uniform(POOL, Settings()), POOL), PROBS.mean(axis=0), atol=1e-6
    )


def test_uniform_counts_duplicates_once_and_forced_ones_each() -> None:
    doubled = with_copy(POOL, 5)
    assert uniform(doubled, Settings()).used.tolist() == list(range(12))
    assert uniform(doubled, Settings(forced=(12,))).used.tolist() == [0, 1, 2, 3, 4, *range(6, 13)]
    assert uniform(doubled, Settings(forced=(5, 12))).used.tolist() == list(range(13))


def test_top_k_equals_all_prefixes() -> None:
    order = sorted(range(12), key=lambda m: LOSSES[m])
    losses = [log_loss(PROBS[order[:k]].mean(axis=0), LABELS) for k in range(1, 13)]
    k = 1 + int(np.argmin(losses))
    assert 1 < k < 12
    fit = top_k(POOL, Settings())
    assert fit.used.tolist() == sorted(order[:k])
    assert fit.blend is not None and fit.blend.path == tuple(order[:k])
    np.testing.assert_allclose(fit.blend.path_losses, losses, atol=1e-6)
    np.testing.assert_allclose(fit.combiner.weights[order[:k]], 1 / k, atol=1e-15)


def test_top_k_starts_from_the_forced_members() -> None:
    by_loss = sorted(range(12), key=lambda m: LOSSES[m])
    forced = (by_loss[-1], by_loss[-2])
    order = [by_loss[-2], by_loss[-1], *by_loss[:-2]]
    losses = [log_loss(PROBS[order[:k]].mean(axis=0), LABELS) for k in range(2, 13)]
    fit = top_k(POOL, Settings(forced=forced))
    assert fit.used.tolist() == sorted(order[: 2 + int(np.argmin(losses))])


def test_top_k_of_equal_members_takes_one() -> None:
    copies = pool_of(np.stack([LOG_PROBS[3]] * 3), LABELS)
    assert top_k(copies, Settings()).used.tolist() == [0]


def test_each_candidate_has_one_soft_vote() -> None:
    np.testing.assert_allclose(
        blend_prob(soft_vote(POOL, Settings()), POOL), PROBS[VOTERS].mean(axis=0), atol=1e-6
    )


def test_a_forced_variant_votes_for_its_candidate() -> None:
    other = next(m for m in (0, 1, 2) if m != VOTERS[0])
    for vote in (soft_vote, hard_vote):
        used = vote(POOL, Settings(forced=(other,))).used.tolist()
        assert used == sorted([other, *VOTERS[1:]])


def test_candidates_of_two_runs_may_share_a_name() -> None:
    pool = pool_of(LOG_PROBS[:2], LABELS, [Member("c0000"), Member("c0000", run="elsewhere")])
    assert soft_vote(pool, Settings()).used.tolist() == [0, 1]


def vote_shares(voters: list[int]) -> np.ndarray:
    """By counting, row by row; the lowest class wins a tie."""
    shares = np.zeros((len(LABELS), 4))
    for row in range(len(LABELS)):
        votes = Counter(max(range(4), key=lambda c: (PROBS[v, row, c], -c)) for v in voters)
        for label, count in votes.items():
            shares[row, label] = count / len(voters)
    return shares


def test_hard_votes_are_counted_and_mixed_with_the_constant() -> None:
    shares = vote_shares(VOTERS)

    def loss(constant: float) -> float:
        return log_loss((1 - constant) * shares + constant / 4, LABELS)

    best = minimize_scalar(loss, bounds=(0, 1), method="bounded", options={"xatol": 1e-9})
    fit = hard_vote(POOL, Settings())
    assert log_loss(blend_prob(fit, POOL), LABELS) == pytest.approx(best.fun, abs=2e-6)
    expected = (1 - best.x) * shares + best.x / 4
    np.testing.assert_allclose(blend_prob(fit, POOL), expected, atol=2e-3)


def test_unanimous_right_votes_leave_room_for_an_error() -> None:
    right = np.where(np.eye(3)[np.arange(8) % 3] > 0, np.log(0.8), np.log(0.1))
    pool = pool_of(right[None].astype(np.float32), np.arange(8) % 3)
    found = blend_prob(hard_vote(pool, Settings()), pool)[np.arange(8), pool.labels]
    np.testing.assert_allclose(found, 1 - 0.1 * 2 / 3, atol=1e-12)


VARIANTS = ("snap10", "snap2", "raw", "snap1", "snap9")
IN_TIME = (3, 1, 4, 0, 2)
"""Places in VARIANTS, the snapshots by their number, then the last epoch."""


@pytest.mark.parametrize("seed", range(6))
def test_equals_all_runs_of_all_candidates(seed: int) -> None:
    log_probs, labels = made_up(10, 60, 3, seed)
    members = [Member(f"c{i}", variant) for i in (1, 0) for variant in VARIANTS]
    probs = np.exp(log_probs.astype(np.float64))
    runs = [
        [first + place for place in IN_TIME[-size:]] for first in (0, 5) for size in (1, 2, 3, 4, 5)
    ]
    best = min((log_loss(probs[run].mean(axis=0), labels), sorted(run)) for run in runs)
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
