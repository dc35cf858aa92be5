"""The contract that every blend method keeps; a new row of the table joins by itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from foldrace.core.errors import ConfigError
from foldrace.core.metrics import log_loss, log_loss_of_true
from foldrace.ensemble.methods import METHODS, check_method, fit_method
from foldrace.ensemble.pool import Member, Pool
from foldrace.ensemble.pooling import POOLINGS, Fit, Settings, blend_prob
from foldrace.ensemble.solvers.optimal import optimal
from tests.ensemble.member_pools import made_up, of_variants, pool_of

VARIANTS = ("raw", "snap1", "snap2", "soup")


def with_zeros() -> Pool:
    """A tenth of all log-probabilities is -inf, true classes too."""
    log_probs, labels = made_up(8, 60, 4, seed=3)
    log_probs[np.random.default_rng(3).random(log_probs.shape) < 0.1] = -np.inf
    with np.errstate(divide="ignore"):
        log_probs -= np.log(np.exp(log_probs).sum(axis=2, keepdims=True))
    return pool_of(log_probs, labels, of_variants(2, VARIANTS))


def all_right() -> Pool:
    """Nothing to learn from: every member is certain and right."""
    labels = np.arange(9) % 3
    certain = np.where(np.eye(3, dtype=bool)[labels], 0.0, -np.inf).astype(np.float32)
    return pool_of(np.stack([certain] * 4), labels, of_variants(1, VARIANTS))


def all_wrong() -> Pool:
    labels = np.arange(9) % 3
    certain = np.where(np.eye(3, dtype=bool)[(labels + 1) % 3], 0.0, -np.inf).astype(np.float32)
    return pool_of(np.stack([certain] * 4), labels, of_variants(1, VARIANTS))


POOLS = {
    "usual": pool_of(*made_up(12, 150, 5), of_variants(3, VARIANTS)),
    "two classes": pool_of(*made_up(8, 60, 2, seed=1), of_variants(2, VARIANTS)),
    "one row": pool_of(*made_up(8, 1, 3, seed=2), of_variants(2, VARIANTS)),
    "more members than rows": pool_of(*made_up(40, 7, 3, seed=4), of_variants(10, VARIANTS)),
    "zeros": with_zeros(),
    "all right": all_right(),
    "all wrong": all_wrong(),
}
every_method = pytest.mark.parametrize("name", METHODS)
every_pool = pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS.keys())


def loss_of(fit: Fit, pool: Pool) -> float:
    return log_loss(blend_prob(fit, pool), pool.labels)


def taken(pool: Pool, members: np.ndarray, rows: np.ndarray) -> Pool:
    """Some members and rows, in any order."""
    return replace(
        pool.take(members),
        true_prob=pool.true_prob[members][:, rows],
        labels=pool.labels[rows],
        log_prob=lambda member: pool.log_prob(int(members[member]))[rows],
    )


@every_method
@every_pool
def test_contract(name: str, pool: Pool) -> None:
    fit = fit_method(name, pool, Settings())
    weights = fit.combiner.weights
    assert weights.shape == (len(pool.members),)
    assert weights.dtype == np.float64
    assert np.isfinite(weights).all() and (weights >= 0.0).all() and weights.any()
    prob = blend_prob(fit, pool)
    assert prob.shape == (len(pool.labels), pool.n_classes)
    assert (prob >= 0.0).all()
    np.testing.assert_allclose(prob.sum(axis=1), 1.0, atol=1e-12)


@every_method
@every_pool
def test_a_mixture_knows_its_loss_and_how_far_off_it_is(name: str, pool: Pool) -> None:
    fit = fit_method(name, pool, Settings())
    if fit.blend is None:
        assert fit.combiner.pooling != "arithmetic"
        return
    np.testing.assert_array_equal(fit.blend.weights, fit.combiner.weights)
    assert fit.blend.weights.sum() == pytest.approx(1.0, abs=1e-9)
    assert fit.blend.loss == pytest.approx(loss_of(fit, pool), abs=1e-6)
    clipped = np.clip(pool.true_prob.astype(np.float64), 1e-15, 1.0)
    for other in np.random.default_rng(0).dirichlet(np.full(len(clipped), 0.5), size=50):
        rival = log_loss_of_true(np.minimum(other @ clipped, 1.0))
        assert fit.blend.loss - rival <= fit.blend.certificate + 1e-9


@every_method
@every_pool
def test_what_a_run_folder_keeps_is_enough(name: str, pool: Pool) -> None:
    fit = fit_method(name, pool, Settings())
    kept = fit.combiner.take(fit.used)
    assert all(array.dtype == np.float64 for array in kept.arrays().values())
    read = POOLINGS[kept.pooling](kept.weights.copy(), dict(kept.arrays()))
    assert read.pooling == fit.combiner.pooling
    again = blend_prob(Fit(read), pool.take(fit.used))
    np.testing.assert_allclose(again, blend_prob(fit, pool), rtol=0, atol=1e-14)
    backward = np.arange(len(fit.used))[::-1]
    turned = blend_prob(Fit(read.take(backward)), pool.take(fit.used[backward]))
    np.testing.assert_allclose(turned, again, rtol=0, atol=1e-12)


@every_method
@pytest.mark.parametrize("case", ["usual", "two classes", "zeros", "more members than rows"])
def test_the_order_of_members_and_rows_is_free(name: str, case: str) -> None:
    pool, rng = POOLS[case], np.random.default_rng(1)
    members = rng.permutation(len(pool.members))
    rows = rng.permutation(len(pool.labels))
    plain = fit_method(name, pool, Settings())
    shuffled = fit_method(name, other := taken(pool, members, rows), Settings())
    assert loss_of(shuffled, other) == pytest.approx(loss_of(plain, pool), abs=1e-5)
    np.testing.assert_allclose(
        blend_prob(shuffled, other), blend_prob(plain, pool)[rows], rtol=0, atol=2e-3
    )


@every_method
@pytest.mark.parametrize("case", ["usual", "zeros"])
def test_duplicates_change_nothing(name: str, case: str) -> None:
    pool = POOLS[case]
    count = len(pool.members)
    doubled = replace(
        pool.take(np.array([*range(count), *range(count // 2)])),
        members=(
            *pool.members,
            *(replace(m, candidate=f"copy of {m.candidate}") for m in pool.members[: count // 2]),
        ),
    )
    expected = loss_of(fit_method(name, pool, Settings()), pool)
    found = loss_of(fit_method(name, doubled, Settings()), doubled)
    assert found == pytest.approx(expected, abs=1e-6)


@every_method
def test_the_same_call_gives_the_same_bits(name: str) -> None:
    pool = POOLS["usual"]
    first, second = (fit_method(name, pool, Settings(bags=3)).combiner for _ in range(2))
    np.testing.assert_array_equal(first.weights, second.weights)
    for key, array in first.arrays().items():
        np.testing.assert_array_equal(array, second.arrays()[key])


@every_method
@pytest.mark.parametrize("variant", ["raw", "snap1", "soup"])
def test_one_member_is_the_blend_or_a_clear_error(name: str, variant: str) -> None:
    pool = pool_of(*made_up(1, 30, 3), [Member("c0000", variant)])
    try:
        fit = fit_method(name, pool, Settings())
    except ConfigError as error:
        assert name in ("snapshot", "soup")
        assert name != variant and f"'{name}' needs" in str(error)
        return
    assert fit.used.tolist() == [0]


@every_method
@pytest.mark.parametrize("settings", [Settings(), Settings(max_rounds=1), Settings(bags=4)])
def test_forced_members_count(name: str, settings: Settings) -> None:
    pool = POOLS["usual"]
    losses = [log_loss_of_true(row) for row in pool.true_prob]
    worst = tuple(int(m) for m in np.argsort(losses)[-3:])
    try:
        fit = fit_method(name, pool, replace(settings, forced=worst))
    except ConfigError as error:
        assert name in ("snapshot", "soup")
        assert f"ensemble.include: the method '{name}'" in str(error)
        return
    assert (fit.combiner.weights[list(worst)] > 0.0).all()


@pytest.mark.parametrize("name", ["greedy", "optimal"])
def test_the_price_of_forced_members_is_in_the_certificate(name: str) -> None:
    pool = POOLS["usual"]
    worst = int(np.argmax([log_loss_of_true(row) for row in pool.true_prob]))
    blend = fit_method(name, pool, Settings(max_rounds=4, forced=(worst,))).blend
    assert blend is not None
    behind = blend.loss - optimal(pool.true_prob, tolerance=1e-9).loss
    assert behind > 1e-3
    assert blend.certificate >= behind - 1e-9


@every_method
def test_the_record_is_complete(name: str) -> None:
    assert METHODS[name].name == name
    assert METHODS[name].doc
    assert check_method(name) is None


@pytest.mark.parametrize("name", ["greedy", "optimal", "top-k", "geometric", "stacking"])
def test_a_method_that_chooses_is_no_worse_than_the_best_member(name: str) -> None:
    pool = POOLS["usual"]
    best = min(log_loss_of_true(row) for row in pool.true_prob)
    assert loss_of(fit_method(name, pool, Settings()), pool) < best


def test_the_best_soup_is_taken() -> None:
    pool = POOLS["usual"]
    losses = {
        log_loss_of_true(row): index
        for index, (row, member) in enumerate(zip(pool.true_prob, pool.members, strict=True))
        if member.variant == "soup"
    }
    assert len(losses) == 3
    assert fit_method("soup", pool, Settings()).used.tolist() == [losses[min(losses)]]


def test_an_unknown_method_names_the_close_ones() -> None:
    problem = check_method("gredy")
    assert problem is not None
    assert problem.where == "ensemble.method"
    assert problem.message.startswith("got 'gredy'; did you mean 'greedy'? allowed: ")
    with pytest.raises(ConfigError) as error:
        fit_method("gredy", POOLS["usual"], Settings())
    assert str(error.value.problems[0]) == str(problem).removesuffix(", auto")


def test_a_far_off_name_gets_the_list_alone() -> None:
    problem = check_method("xyz")
    assert problem is not None
    assert problem.message == f"got 'xyz'; allowed: {', '.join(METHODS)}, auto"
