"""What benchmarks/coverage.py compares, on a few sweeps: the figures that are printed of a blend
against new rows, and what the benchmark itself takes for granted."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.sides.cheap_blend import measure
from benchmarks.sides.cheap_sweep import Scene, sweep

GROUPED = Scene("groups", 120, 3, groups=True)


def test_groups_are_alike_and_in_one_fold() -> None:
    made = sweep(GROUPED, 0, 50)
    assert made.groups is not None
    for values in (made.folds, made.labels):
        assert all(len(set(values[made.groups == g])) == 1 for g in set(made.groups.tolist()))
    losses = -made.log_probs[0][np.arange(120), made.labels]
    of_groups = losses.reshape(-1, 6)
    assert of_groups.mean(axis=1).std() > 1.5 * of_groups.std(axis=1).mean() / np.sqrt(6)


def test_sweeps_are_drawn_anew_and_repeats_have_more_models() -> None:
    first, second = (sweep(Scene("rows", 60, 2, repeats=2), seed, 40) for seed in (0, 1))
    assert len(first.new_log_probs[0]) == 5
    assert not np.allclose(first.log_probs[0], second.log_probs[0])
    for logs in (*first.log_probs, *first.new_log_probs[1]):
        np.testing.assert_allclose(np.exp(logs).sum(axis=1), 1, atol=1e-4)


def test_one_fold_is_a_third_of_the_rows_and_both_figures_are_one() -> None:
    scene = Scene("one fold", 60, 3, k=1)
    assert abs(len(sweep(scene, 0, 10).labels) - 60) <= 1
    found = measure(scene, 0, new=400, unlabelled=50)
    assert found["one fold"] == found["mean"] and found["one fold se"] == found["mean se"]
    assert found["one fold true"] == pytest.approx(found["mean true"], abs=1e-12)


@pytest.mark.parametrize("scene", [Scene("rows", 150, 4), GROUPED], ids=["rows", "groups"])
def test_true_losses_are_near_what_is_printed(scene: Scene) -> None:
    """Within three standard errors of the mean over sweeps; the mean of the folds is better."""
    sweeps = [measure(scene, seed, new=1500, unlabelled=300) for seed in range(12)]
    for figure in ("one fold", "mean"):
        off = np.array([s[figure] - s[f"{figure} true"] for s in sweeps])
        assert abs(off.mean()) < 3 * off.std(ddof=1) / np.sqrt(len(off)) + 0.01
    assert all(s["mean true"] < s["one fold true"] for s in sweeps)
    assert all(s["mean"] < s["one fold"] for s in sweeps)
