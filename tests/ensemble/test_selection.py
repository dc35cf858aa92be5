"""The uncalibrated blend of a run folder, against numpy written here anew; who may enter it."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest

from foldrace.config.schema import EnsembleConfig
from foldrace.core.errors import ConfigError, RunFailure, RunFolderError
from foldrace.ensemble import greedy
from foldrace.ensemble.selection.matrix import open_matrix
from foldrace.ensemble.selection.members import run_sources
from foldrace.ensemble.selection.select import remove_unused_weights
from foldrace.run_folder.records import CandidateRecord
from foldrace.run_folder.store import RunStore
from tests.ensemble.made_runs import rewrite
from tests.ensemble.selection_runs import (
    FOLD,
    LABELS,
    PLAIN,
    ROWS,
    SUFFIX,
    K,
    add,
    blend,
    loss_of,
    make_store,
    stored,
    true_column,
)


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return make_store(tmp_path / "run")


def test_numbers_equal_numpy(store: RunStore) -> None:
    prob = {
        (f"c{i:04d}", v): p
        for i in range(4)
        for v, p in add(store, i, noise=0.8 + 0.1 * i, variants=("raw", "ema")).items()
    }
    record = blend(store, PLAIN)
    assert record == store.blend.record()
    weights = {(m.candidate, m.variant): m.weight for m in record.members}
    assert sum(weights.values()) == pytest.approx(1)
    assert list(weights.values()) == sorted(weights.values(), reverse=True)
    mixed = sum(w * stored(prob[key]) for key, w in weights.items())
    assert isinstance(mixed, np.ndarray)
    assert record.oof_logloss == pytest.approx(loss_of(mixed), abs=1e-6)  # float32 logarithms
    chosen_on = sum(w * true_column(prob[key]) for key, w in weights.items())
    assert record.mixture_logloss == pytest.approx(-np.log(chosen_on).mean(), abs=1e-9)
    assert record.oof_accuracy == pytest.approx((mixed.argmax(axis=1) == LABELS).mean())
    best = min(prob, key=lambda key: loss_of(prob[key]))
    assert record.best_single == " ".join(best)
    assert record.best_single_oof_logloss == pytest.approx(loss_of(prob[best]), abs=1e-6)
    assert record.mixture_logloss <= record.best_single_oof_logloss
    own = [loss_of(prob[m.candidate, m.variant]) for m in record.members]
    assert [m.oof_logloss for m in record.members] == pytest.approx(own, abs=1e-6)
    assert (record.members_considered, record.candidates_considered) == (8, 4)
    assert record.folds_hash == store.folds().hash
    assert {m.temperature for m in record.members} == {1.0} and record.blend_temperature == 1
    np.testing.assert_allclose(store.blend.oof(), mixed, atol=2e-3)  # float16 logarithms


def test_the_certificate_holds_for_random_blends(store: RunStore) -> None:
    true = np.stack([add(store, i)["raw"][np.arange(ROWS), LABELS] for i in range(4)])
    record = blend(store, EnsembleConfig(max_rounds=3, calibrate=False))
    weights = np.random.default_rng(0).dirichlet(np.full(4, 0.5), size=3000)
    least = -np.log(weights @ true).mean(axis=1).min()
    assert record.mixture_logloss is not None and record.certificate is not None
    assert record.mixture_logloss - record.certificate <= least + 1e-7


def test_the_trajectory_is_caruanas(store: RunStore) -> None:
    """Round by round the one that helps most, with replacement; the best prefix gives the
    weights."""
    true = np.stack([true_column(add(store, i, 0.9 + 0.1 * i)["raw"]) for i in range(4)])
    record = blend(store, EnsembleConfig(max_rounds=12, calibrate=False))
    total, picks, losses = np.zeros(ROWS), [], []
    for round_ in range(1, 13):
        options = [-np.log((total + t) / round_).mean() for t in true]
        picks.append(int(np.argmin(options)))
        losses.append(min(options))
        total = total + true[picks[-1]]
    best = int(np.argmin(losses)) + 1
    rows = list(csv.DictReader(io.StringIO(store.blend.trajectory())))
    assert [int(row["round"]) for row in rows] == list(range(1, len(rows) + 1))
    np.testing.assert_allclose(
        [float(r["oof_logloss"]) for r in rows], losses[: len(rows)], atol=1e-8
    )
    chosen = [row["candidate"] for row in rows if row["candidate"]]
    assert chosen == [f"c{i:04d}" for i in picks[:best]]
    for member in record.members:
        assert member.weight == pytest.approx(chosen.count(member.candidate) / best)
    assert record.mixture_logloss == pytest.approx(min(losses), abs=1e-9)


def test_the_cross_fitted_loss_equals_the_definition(store: RunStore) -> None:
    """Weights chosen on two folds, scored on the third; so is the best single one."""
    prob = [add(store, i)["raw"] for i in range(3)]
    record = blend(store, PLAIN)
    true = np.stack([true_column(p) for p in prob])
    scored = np.stack([stored(p)[np.arange(ROWS), LABELS] for p in prob])
    losses = np.empty(ROWS)
    for fold in range(K):
        weights = greedy(true[:, fold != FOLD], max_rounds=50).weights
        losses[fold == FOLD] = -np.log(weights @ scored[:, fold == FOLD])
    assert record.crossfit_logloss == pytest.approx(losses.mean(), abs=1e-6)
    assert record.crossfit_se == pytest.approx(losses.std(ddof=1) / np.sqrt(ROWS), abs=1e-6)
    single = np.empty(ROWS)
    for fold in range(K):
        held = fold == FOLD
        single[held] = -np.log(true[np.log(true[:, ~held]).mean(axis=1).argmax(), held])
    change = single - losses
    assert record.single_crossfit_logloss == pytest.approx(single.mean(), abs=1e-6)
    assert record.gain_over_single == pytest.approx(change.mean(), abs=1e-6)
    se = change.std(ddof=1) / np.sqrt(ROWS)
    assert record.gain_over_single_se == pytest.approx(se, abs=1e-6)
    assert record.k == K


def test_rows_of_a_group_are_one_observation(tmp_path: Path) -> None:
    """The groups of folds.csv are known to the standard errors, and to the parts of one fold."""
    groups = np.arange(ROWS) // 5
    store = make_store(tmp_path / "run", groups=groups)
    prob = [add(store, i)["raw"] for i in range(3)]
    true = np.stack([true_column(p) for p in prob])
    losses, single = np.empty(ROWS), np.empty(ROWS)
    for fold in range(K):
        held = fold == FOLD
        weights = greedy(true[:, ~held], max_rounds=50).weights
        losses[held] = -np.log(weights @ true[:, held])
        single[held] = -np.log(true[np.log(true[:, ~held]).mean(axis=1).argmax(), held])

    def of_groups(values: np.ndarray) -> float:
        sums = (values - values.mean()).reshape(-1, 5).sum(axis=1)
        return float(np.sqrt(18 / 17 * (sums**2).sum()) / ROWS)

    record = blend(store, PLAIN)
    assert record.crossfit_se == pytest.approx(of_groups(losses), rel=1e-3)
    assert record.gain_over_single_se == pytest.approx(of_groups(single - losses), rel=1e-3)
    fixed = make_store(tmp_path / "fixed", k=1, groups=groups)
    add(fixed, 0, folds=(0,))
    rows = open_matrix(fixed, run_sources(fixed))
    of_row = groups[FOLD == 0]
    assert rows.n_parts == 5
    assert all(len(set(rows.parts[of_row == group])) == 1 for group in set(of_row.tolist()))


def test_only_complete_candidates_enter(store: RunStore) -> None:
    """However good what there is of the others."""
    add(store, 0, noise=1.5)
    add(store, 1, noise=0.01, folds=(0, 1))
    add(store, 2, noise=0.01, folds=(0, 1), lost="failed")
    add(store, 3, noise=0.01, folds=(0, 1), lost="diverged")
    store.save_candidate(CandidateRecord(candidate="c0004", backbone="timm/x", params={}))
    record = blend(store, EnsembleConfig())
    assert [m.candidate for m in record.members] == ["c0000"]
    assert (record.members_considered, record.candidates_considered) == (1, 1)


def test_a_variant_that_one_fold_lacks_is_no_member(store: RunStore) -> None:
    add(store, 0, variants=("raw", "ema"))
    trial = store.trial("c0000", 1)
    assert trial is not None
    store.save_trial(trial.model_copy(update={"variants": {"raw": trial.variants["raw"]}}))
    assert blend(store, EnsembleConfig()).members_considered == 1


def test_no_complete_candidate_says_what_became_of_them(store: RunStore) -> None:
    add(store, 0, folds=(0,))
    add(store, 1, folds=(), lost="failed")
    with pytest.raises(RunFailure, match="c0000 unfinished, c0001 failed") as caught:
        blend(store, EnsembleConfig())
    assert f"resume {store.root}" in str(caught.value)
    assert store.blend.record() is None


@pytest.mark.parametrize("name", ["true_prob.npy", "oof.npy", "rows.npy"])
@pytest.mark.parametrize("damage", ["torn", "missing", "a row short"])
def test_damaged_oof_is_named(store: RunStore, name: str, damage: str) -> None:
    add(store, 0)
    path = Path(store.root) / "trials" / "c0000" / "fold1" / name
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "missing":
        path.unlink()
    else:
        np.save(path, np.load(path)[:-1])
    with pytest.raises(RunFolderError, match="trials/c0000") as caught:
        blend(store, EnsembleConfig())
    assert caught.value.exit_code == 2
    assert store.blend.record() is None


def test_rows_of_other_folds_are_refused(store: RunStore) -> None:
    add(store, 0)
    path = Path(store.root) / "trials" / "c0000" / "fold1" / "rows.npy"
    np.save(path, np.load(path.with_name("rows.npy").parent.parent / "fold0" / "rows.npy"))
    with pytest.raises(RunFolderError, match="each scored row once"):
        blend(store, EnsembleConfig())


@pytest.mark.parametrize("value", [np.nan, 1.5, -0.1])
def test_values_that_are_no_probabilities_are_refused(store: RunStore, value: float) -> None:
    """The message says where: file, member, fold and row."""
    add(store, 0)
    path = Path(store.root) / "trials" / "c0000" / "fold1" / "true_prob.npy"
    column = np.load(path)
    column[3] = value
    rewrite(store, "c0000", 1, "true_prob.npy", column)
    row = int(np.flatnonzero(FOLD == 1)[3])
    with pytest.raises(RunFolderError) as caught:
        blend(store, EnsembleConfig())
    (problem,) = caught.value.problems
    where = f"c0000 raw, fold 1, line {row + 2} of folds.csv ({row}.png)"
    assert str(problem).startswith(f"{path}: {where}: true_prob is {np.float32(value)}")
    assert "should be in [0, 1]" in str(problem)
    assert store.blend.record() is None


def test_unknown_method(store: RunStore) -> None:
    add(store, 0)
    with pytest.raises(ConfigError, match="gredy"):
        blend(store, EnsembleConfig(method="gredy"))


@pytest.mark.parametrize("calibrate", [True, False])
def test_max_members(store: RunStore, calibrate: bool) -> None:
    for i in range(4):
        add(store, i)
    config = EnsembleConfig(calibrate=calibrate)
    assert len(blend(store, config).members) > 1
    assert len(blend(store, config.model_copy(update={"max_members": 1})).members) == 1


def test_one_fixed_split_scores_its_validation_rows(tmp_path: Path) -> None:
    store = make_store(tmp_path / "fixed", k=1)
    prob = add(store, 0, folds=(0,))["raw"]
    record = blend(store, PLAIN)
    assert record.mixture_logloss == pytest.approx(loss_of(prob, FOLD == 0), abs=1e-6)
    assert record.oof_logloss == pytest.approx(loss_of(stored(prob), FOLD == 0), abs=1e-6)
    assert record.single_crossfit_logloss == pytest.approx(record.mixture_logloss, abs=1e-6)
    assert record.k == 1
    assert store.blend.oof().shape == ((FOLD == 0).sum(), 3)


def test_members_without_weights_are_left_out(store: RunStore) -> None:
    """One missing fold is enough: the member could not predict."""
    for number in range(3):
        add(store, number, noise=0.5 + number, variants=("raw", "ema"))
    best = blend(store, EnsembleConfig(max_members=1)).members[0]
    store.files.delete(f"trials/{best.candidate}/fold1/best{SUFFIX[best.variant]}.safetensors")
    again = blend(store, EnsembleConfig())
    assert (again.members_considered, again.members_without_weights) == (5, 1)
    assert (best.candidate, best.variant) not in {(m.candidate, m.variant) for m in again.members}
    for summary in store.summaries():
        for variant in summary.variants:
            store.remove_weights(summary.candidate.candidate, variant)
    with pytest.raises(RunFailure, match="the weights of all 6 are gone"):
        blend(store, EnsembleConfig())


def test_unused_weights_go_and_all_else_stays(store: RunStore) -> None:
    for number in range(3):
        add(store, number, noise=0.5 + number, variants=("raw", "ema"))
    add(store, 3, noise=0.4, folds=(0, 2))  # to be continued
    add(store, 4, noise=0.4, folds=(0, 1), lost="failed")  # may be run again
    record = blend(store, EnsembleConfig(max_members=2))
    root = Path(store.root)
    before = {p for p in root.rglob("*") if p.is_file()}
    assert remove_unused_weights(store, record) == 6 - len(record.members)
    gone = before - {p for p in root.rglob("*") if p.is_file()}
    used = {(m.candidate, SUFFIX[m.variant]) for m in record.members}
    expected = {
        root / f"trials/{candidate}/fold{fold}/best{suffix}.safetensors"
        for candidate in ("c0000", "c0001", "c0002")
        for suffix in SUFFIX.values()
        for fold in range(K)
        if (candidate, suffix) not in used
    }
    assert gone == expected
    assert remove_unused_weights(store, record) == 0
    again = blend(store, EnsembleConfig(max_members=2))
    assert again.members == record.members and again.oof_logloss == record.oof_logloss
    assert again.members_without_weights == 6 - len(record.members)
