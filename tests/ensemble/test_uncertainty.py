"""Standard errors and parts of rows that belong together, against independent draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import log_softmax

from foldrace.ensemble.crossfit import crossfit_rows
from foldrace.ensemble.pool import MemberRows, Pool, cross_fit_parts, member_rows
from foldrace.ensemble.pooling import Fit, mixture_fit
from foldrace.ensemble.running_blend import MOST_LOST, bounded_gain
from foldrace.ensemble.solvers.greedy import greedy
from foldrace.ensemble.uncertainty import standard_error, whole_group_parts


def test_independent_rows_have_the_usual_standard_error() -> None:
    values = np.random.default_rng(0).exponential(size=50)
    usual = values.std(ddof=1) / math.sqrt(50)
    assert standard_error(values) == pytest.approx(usual)
    assert standard_error(values, np.arange(50)[::-1]) == pytest.approx(usual)
    assert standard_error(values, np.zeros(50, dtype=np.int64)) == pytest.approx(usual)
    assert math.isnan(standard_error(values[:1]))


def test_copies_of_rows_say_nothing_new() -> None:
    values = np.random.default_rng(1).normal(size=40)
    group = np.tile(np.arange(40), 7)
    assert standard_error(np.tile(values, 7), group) == pytest.approx(standard_error(values))


def test_groups_of_many_sizes_against_the_spread_of_drawn_means() -> None:
    rng = np.random.default_rng(2)
    group = np.repeat(np.arange(60), rng.integers(1, 12, 60))
    means, errors = [], []
    for _ in range(400):
        values = rng.normal(size=60)[group] + 0.3 * rng.normal(size=len(group))
        means.append(values.mean())
        errors.append(standard_error(values, group) ** 2)
    assert math.sqrt(np.mean(errors)) == pytest.approx(np.std(means, ddof=1), rel=0.1)


def test_parts_of_whole_groups_are_even() -> None:
    rng = np.random.default_rng(3)
    groups = rng.permutation(np.repeat(np.arange(90), rng.integers(1, 9, 90)))
    for parts in (
        whole_group_parts(groups, 3),
        cross_fit_parts(np.zeros(len(groups), int), groups),
    ):
        assert all(len(set(parts[groups == g])) == 1 for g in range(90))
        sizes = np.bincount(parts)
        assert sizes.max() - sizes.min() <= 1
    assert sorted(np.bincount(whole_group_parts(np.array([4, 4, 9]), 5))) == [1, 2]
    folds = rng.integers(0, 4, len(groups))
    assert (cross_fit_parts(folds, groups) == folds).all()


def test_one_group_is_split_by_rows() -> None:
    one = np.zeros(20, dtype=np.int64)
    assert (cross_fit_parts(one, one) == cross_fit_parts(one)).all()


def grouped_rows(copies: int, of_groups: bool) -> tuple[MemberRows, np.ndarray]:
    """40 images, each `copies` times, as rows of a single fold."""
    rng = np.random.default_rng(4)
    logits = rng.normal(scale=1.5, size=(40, 3))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    members = [log_softmax(logits + rng.normal(size=logits.shape), axis=1) for _ in range(5)]
    image = np.tile(np.arange(40), copies)
    groups = [f"image {i}" for i in image] if of_groups else None
    rows = member_rows(
        [m[image] for m in members], labels[image], np.zeros(len(image), int), groups=groups
    )
    return rows, image


def greedy_fit(pool: Pool) -> Fit:
    return mixture_fit(greedy(pool.true_prob, max_rounds=8))


def test_a_blend_of_copied_rows_is_scored_as_of_the_images_alone() -> None:
    """Copies of a held-out row on the training side would make the loss and its error small."""
    rows, image = grouped_rows(6, of_groups=True)
    assert all(len(set(rows.parts[image == i])) == 1 for i in range(40))
    found, _ = crossfit_rows(rows, greedy_fit, calibrated=True)
    loss = -np.log(found.true_prob[:40])
    np.testing.assert_allclose(-np.log(found.true_prob), np.tile(loss, 6), rtol=1e-6)
    assert found.loss == pytest.approx(loss.mean())
    assert found.se == pytest.approx(loss.std(ddof=1) / math.sqrt(40))
    as_rows, _ = crossfit_rows(grouped_rows(6, of_groups=False)[0], greedy_fit, calibrated=True)
    assert as_rows.se < 0.5 * found.se


def test_a_pool_knows_the_groups_of_its_rows() -> None:
    rows, image = grouped_rows(2, of_groups=True)
    inside = rows.training(0, calibrated=False)
    assert inside.groups is not None and rows.groups is not None
    pairs = set(zip(inside.groups.tolist(), image[rows.parts != 0].tolist(), strict=True))
    assert len(pairs) == len(set(inside.groups.tolist())) == 32
    assert inside.take(np.array([1])).groups is inside.groups
    assert rows.pool(calibrated=True).groups is rows.groups


@pytest.mark.parametrize("repeats", [1, 3])
def test_a_gain_counts_groups(repeats: int) -> None:
    rng = np.random.default_rng(5)
    mine, mixed = rng.uniform(0.1, 0.9, (2, repeats * 24))
    row = np.tile(np.arange(24), repeats)
    group = row // 4
    x = np.log(0.9 + 0.1 * mine / mixed) / 0.1
    by_row = x.reshape(repeats, 24).mean(axis=0)
    sums = (by_row - by_row.mean()).reshape(6, 4).sum(axis=1)
    found = bounded_gain(mine, mixed, None if repeats == 1 else row, group)
    assert (found.mean, found.rows) == (pytest.approx(by_row.mean()), 24)
    assert found.se == pytest.approx(math.sqrt(6 / 5 * (sums**2).sum()) / 24)
    alone = bounded_gain(mine[:1], mixed[:1], None, group[:1])
    assert alone.se == MOST_LOST


def test_wrong_groups_are_named() -> None:
    with pytest.raises(ValueError, match=r"groups have shape \(1,\), should be \(2,\)"):
        member_rows([np.log([[0.5, 0.5]] * 2)], [0, 1], [0, 1], groups=[3])
