"""OOF rows, blend and tables of runs with repeated folds, against means over the trials' files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from sklearn.metrics import log_loss

import foldrace
from foldrace.config.schema import EnsembleConfig
from foldrace.core.errors import RunFolderError
from foldrace.ensemble.selection.matrix import open_matrix
from foldrace.ensemble.selection.members import other_runs, run_sources
from foldrace.run_folder.records import RaceDecision
from foldrace.run_folder.store import RunStore
from tests.ensemble.made_runs import rewrite
from tests.ensemble.repeated_runs import (
    ALL,
    LABELS,
    ROWS,
    SPLITS,
    K,
    add,
    mean_of_files,
    repeated_run,
)
from tests.ensemble.selection_runs import blend


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return repeated_run(tmp_path / "run")


def test_the_oof_of_a_row_is_the_mean_over_the_repeats(store: RunStore) -> None:
    add(store, 0)
    expected = mean_of_files(store, 0)
    np.testing.assert_allclose(store.oof("c0000", "raw"), expected, rtol=1e-5)
    true = expected[np.arange(ROWS), LABELS]
    np.testing.assert_allclose(store.true_prob("c0000", "raw"), true, rtol=5e-3)
    for repeat in (0, 1):
        alone = store.oof("c0000", "raw", (repeat,))
        np.testing.assert_allclose(alone, mean_of_files(store, 0, (repeat,)), rtol=1e-5)
    found = store.oof_log_prob("c0000", "raw", (1, 3, 5))  # rows of folds of both repeats
    rows = [np.flatnonzero(SPLITS[0] == 1), np.flatnonzero(np.isin(SPLITS[1], (3, 5)))]
    pairs = [mean_of_files(store, 0, (r,))[mine] for r, mine in enumerate(rows)]
    np.testing.assert_allclose(np.exp(found), np.concatenate(pairs), rtol=1e-5)


def test_data_frames_of_repeats(store: RunStore) -> None:
    """Also of a candidate that the race stopped in its second repeat."""
    add(store, 0)
    add(store, 1, (0, 1, 2, 4))
    add(store, 2, (0, 1))
    store.save_decision(
        RaceDecision(
            number=0,
            candidate="c0001",
            fold=4,
            rule="gain",
            action="stop",
            folds_done=4,
            rows=9,
            complete=1,
            epochs_trained=1,
            reason="nothing",
        )
    )
    run = foldrace.open_run(store.root)
    table = run.oof("c0000")
    assert list(table.columns) == ["image_path", "target", "fold", "fold_r1", "a", "b", "c"]
    np.testing.assert_array_equal(table[["fold", "fold_r1"]].to_numpy().T, SPLITS)
    np.testing.assert_allclose(table[["a", "b", "c"]], mean_of_files(store, 0), rtol=1e-5)
    second = run.oof("c0000", repeat=1)[["a", "b", "c"]]
    np.testing.assert_allclose(second, mean_of_files(store, 0, (1,)), rtol=1e-5)
    stopped = run.oof("c0001")[["a", "b", "c"]]
    np.testing.assert_allclose(stopped, mean_of_files(store, 1, (0,)), rtol=1e-5)
    with pytest.raises(RunFolderError, match="c0001 has no complete repeat 1; it has 0"):
        run.oof("c0001", repeat=1)
    with pytest.raises(RunFolderError, match="no complete candidate 'c0002'"):
        run.oof("c0002", repeat=0)


def test_rows_count_once_in_a_candidates_scores(store: RunStore) -> None:
    """Complete repeats count; while there is none, the folds of the first one."""
    add(store, 0)
    add(store, 1, (0, 1, 2, 4))
    add(store, 2, (0, 1))
    add(store, 3, (1, 3, 4))  # folds of a candidate may end in any order
    complete, stopped, begun, odd = store.summaries()
    assert [s.status for s in (complete, stopped, begun, odd)] == ["complete"] + ["unfinished"] * 3
    assert (complete.complete_repeats, stopped.complete_repeats) == ((0, 1), (0,))

    def loss(number: int, repeat: int, folds: tuple[int, ...]) -> float:
        mine = np.isin(SPLITS[repeat], folds)
        prob = np.zeros((ROWS, 3))
        for fold in folds:
            folder = Path(store.root) / f"trials/c{number:04d}/fold{fold}"
            prob[np.load(folder / "rows.npy")] = np.exp(np.load(folder / "oof.npy").astype(float))
        return float(log_loss(LABELS[mine], prob[mine] / prob[mine].sum(1, keepdims=True)))

    both = (loss(0, 0, (0, 1, 2)) + loss(0, 1, (3, 4, 5))) / 2
    assert complete.pooled_logloss("raw") == pytest.approx(both, abs=1e-3)
    assert stopped.pooled_logloss("raw") == pytest.approx(loss(1, 0, (0, 1, 2)), abs=1e-3)
    assert begun.pooled_logloss("raw") == pytest.approx(loss(2, 0, (0, 1)), abs=1e-3)
    assert odd.pooled_logloss("raw") == pytest.approx(loss(3, 1, (3, 4)), abs=1e-3)


def test_the_blend_weighs_means_over_repeats(store: RunStore) -> None:
    """Its weights, losses and cross-fitted loss, with every row once."""
    add(store, 0, skill=1.2)
    add(store, 1, skill=1.0)
    add(store, 2, (0, 1, 2, 3), skill=3.0)  # by far the best, but never complete
    record = blend(store, EnsembleConfig(calibrate=False, method="optimal"))
    assert {m.candidate for m in record.members} == {"c0000", "c0001"}
    a, b = (mean_of_files(store, n)[np.arange(ROWS), LABELS] for n in (0, 1))

    def fitted(rows: object) -> float:
        found = minimize_scalar(
            lambda w: -np.log(w * a[rows] + (1 - w) * b[rows]).mean(),
            bounds=(0, 1), method="bounded", options={"xatol": 1e-9},
        )  # fmt: skip
        return float(found.x)

    everything = slice(None)
    weights = {m.candidate: m.weight for m in record.members}
    assert weights["c0000"] == pytest.approx(fitted(everything), abs=5e-3)
    held = np.empty(ROWS)
    for part in range(K):
        weight, mine = fitted(SPLITS[0] != part), SPLITS[0] == part
        held[mine] = weight * a[mine] + (1 - weight) * b[mine]
    losses = -np.log(held)
    assert record.crossfit_logloss == pytest.approx(losses.mean(), abs=1e-3)
    assert record.crossfit_se == pytest.approx(losses.std(ddof=1) / np.sqrt(ROWS), rel=1e-2)
    assert record.k == K
    assert store.blend.oof().shape == (ROWS, 3)


def test_what_is_wrong_in_a_later_repeat_is_named(store: RunStore) -> None:
    """A mean over repeats would hide it, or blame the first one."""
    add(store, 0)
    damaged = np.load(Path(store.root) / "trials/c0000/fold4/true_prob.npy")
    damaged[0] = damaged[0] / 2
    rewrite(store, "c0000", 4, "true_prob.npy", damaged)
    row = np.flatnonzero(SPLITS[1] == 4)[0]
    with pytest.raises(RunFolderError) as error:
        open_matrix(store, run_sources(store))
    [problem] = error.value.problems
    assert problem.where.endswith("trials/c0000/fold4/true_prob.npy")
    assert f"c0000 raw, fold 4, line {row + 2} of folds.csv ({row}.png)" in problem.message


def test_runs_of_other_repeats_are_not_blended(store: RunStore, tmp_path: Path) -> None:
    add(store, 0)
    text = "\n".join(
        line.rpartition(",")[0] for line in store.files.read("folds.csv").decode().splitlines()
    )
    single = RunStore(tmp_path / "single")
    single.create(store.config(), text + "\n", store.classes())
    with pytest.raises(RunFolderError, match=r"folds\.repeats is 1 here and 2 there"):
        other_runs(store, [single.root])


def test_all_folds_of_all_repeats_make_it_complete(store: RunStore) -> None:
    add(store, 0, ALL[:-1])
    assert store.fold_count == len(ALL)
    assert store.summaries()[0].status == "unfinished" and not run_sources(store)
    add(store, 0, ALL[-1:])
    assert store.summaries()[0].status == "complete" and len(run_sources(store)) == 1
