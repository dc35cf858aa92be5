"""A fold's teacher knows none of the fold's labels: recomputed without them, and with a planted
leak."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from foldrace.config.schema import EnsembleConfig
from foldrace.core.temperature import at_temperature, fit_temperature
from foldrace.ensemble.pool import kept_rows, member_rows
from foldrace.ensemble.selection.members import run_sources
from foldrace.ensemble.selection.without_fold import FoldBlend, fold_blends
from foldrace.run_folder.records import Oof
from foldrace.run_folder.store import RunStore
from tests.ensemble.selection_runs import FOLD, LABELS, ROWS, K, add, make_store, stored

CALIBRATED = EnsembleConfig()


def log_probs(members: int = 3, seed: int = 0) -> list[NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    found = []
    for noise in rng.uniform(0.5, 2.0, members):
        logits = 1.5 * np.eye(3)[LABELS] + noise * rng.normal(size=(ROWS, 3))
        found.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    return found


def test_kept_rows_are_those_of_a_run_without_the_others() -> None:
    kept = np.flatnonzero(FOLD != 0)
    every = log_probs()
    found = kept_rows(member_rows(every, LABELS, FOLD), kept)
    alone = member_rows([x[kept] for x in every], LABELS[kept], FOLD[kept])
    for name in ("labels", "parts", "temperatures", "raw", "calibrated"):
        assert_array_equal(getattr(found, name), getattr(alone, name), err_msg=name)
    assert_array_equal(found.read(1), alone.read(1))


def test_labels_of_the_fold_change_nothing() -> None:
    """Whatever they are: nothing that the teacher of the fold is made of moves by a bit."""
    kept, shuffled = np.flatnonzero(FOLD != 2), LABELS.copy()
    shuffled[FOLD == 2] = (LABELS[FOLD == 2] + 1) % 3
    before, after = (
        kept_rows(member_rows(log_probs(), labels, FOLD), kept) for labels in (LABELS, shuffled)
    )
    assert_array_equal(before.calibrated, after.calibrated)
    assert_array_equal(before.temperatures, after.temperatures)


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    run = make_store(tmp_path / "run")
    for number, noise in enumerate((0.9, 1.0, 1.3)):
        add(run, number, noise, variants=("raw", "ema"))
    return run


def teachers(run: RunStore, kind: str, config: EnsembleConfig = CALIBRATED) -> list[FoldBlend]:
    return list(fold_blends(run, config, run_sources(run), kind))  # type: ignore[arg-type]


def plant(run: RunStore, fold: int) -> None:
    """Candidate 3 is right about every row of the fold, and knows nothing of the others."""
    add(run, 3, sharpness=0.0)
    record = run.trial("c0003", fold)
    assert record is not None
    rows = run.folds().rows_of(fold)
    prob = np.where(np.eye(3)[LABELS[rows]] > 0, 0.998, 0.001)
    true = prob.max(axis=1).astype(np.float32)
    oof = Oof(np.log(prob).astype(np.float16), true)
    run.save_trial(record, {"raw": oof}, rows, {"raw": b"weights"})


def test_a_member_that_is_good_on_the_fold_alone_does_not_teach_the_fold(store: RunStore) -> None:
    plant(store, fold=1)
    used = [{m.candidate for m in teacher.members} for teacher in teachers(store, "blend")]
    assert "c0003" not in used[1]
    assert "c0003" in used[0] | used[2]  # there the plant may be seen, and is


@pytest.mark.parametrize("kind", ["blend", "best"])
def test_models_are_the_fold_s_own_and_its_rows_had_no_say(store: RunStore, kind: str) -> None:
    for fold, teacher in enumerate(teachers(store, kind)):
        assert (teacher.fold, teacher.model_fold) == (fold, fold)
        assert teacher.chosen_on == int((fold != FOLD).sum())


def test_best_is_the_least_loss_on_the_other_folds(tmp_path: Path) -> None:
    run = make_store(tmp_path / "run")
    prob = [add(run, number, noise)["raw"] for number, noise in enumerate((1.0, 1.1, 0.9))]
    for fold, teacher in enumerate(teachers(run, "best")):
        kept = fold != FOLD
        losses = []
        for own in prob:
            log_prob = np.log(stored(own))[kept].astype(np.float32)
            cooled = at_temperature(log_prob, fit_temperature(log_prob, LABELS[kept]))
            losses.append(-cooled[np.arange(kept.sum()), LABELS[kept]].mean())
        assert [m.candidate for m in teacher.members] == [f"c{int(np.argmin(losses)):04d}"]


def test_best_fold_is_one_model_for_all_folds(store: RunStore) -> None:
    found = teachers(store, "best-fold")
    assert len({(t.members, t.model_fold) for t in found}) == 1
    assert {t.fold for t in found} == set(range(K))


def test_without_other_scored_rows_all_candidates_count_alike(tmp_path: Path) -> None:
    """`k: 1`: whatever was chosen would be chosen by the rows that score the student."""
    run = make_store(tmp_path / "run", k=1)
    for number in range(3):
        add(run, number, folds=(0,), variants=("raw", "ema"))
    [teacher] = teachers(run, "blend")
    assert [(m.candidate, m.variant) for m in teacher.members] == [
        (f"c{i:04d}", "ema") for i in range(3)
    ]
    assert_array_equal(teacher.combiner.weights, np.full(3, 1 / 3))
    assert (teacher.chosen_on, teacher.temperatures) == (0, (1.0, 1.0, 1.0))


def test_soft_labels_are_the_mixture_by_hand(store: RunStore) -> None:
    teacher = teachers(store, "blend", EnsembleConfig(method="greedy"))[0]
    rng = np.random.default_rng(5)
    prob = [rng.dirichlet(np.ones(3), size=7) for _ in teacher.members]
    cooled = [p ** (1 / t) for p, t in zip(prob, teacher.temperatures, strict=True)]
    weights = teacher.combiner.weights
    mixed = sum(w * c / c.sum(1, keepdims=True) for w, c in zip(weights, cooled, strict=True))
    final = mixed ** (1 / teacher.blend_temperature)
    expected = final / final.sum(1, keepdims=True)
    found = teacher.log_prob([np.log(p).astype(np.float32) for p in prob])
    np.testing.assert_allclose(np.exp(found.astype(np.float64)), expected, rtol=3e-3)
