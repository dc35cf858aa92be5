"""The blend of a run folder, against numpy written here anew."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ensemble.eligible import Prices
from ensemble.selection import Request, blend_run, remove_unused_weights
from experiment.config import DataConfig, EnsembleConfig, FoldsConfig, SearchConfig, SweepConfig
from experiment.errors import ConfigError, RunFailure, RunFolderError
from experiment.records import CandidateRecord, EnsembleRecord, Oof, TrialRecord, VariantScore
from experiment.store import RunStore

ROWS, CLASSES, K = 90, ("a", "b", "c"), 3
FOLD = np.random.default_rng(1).permutation(ROWS) % K
SUFFIX = {"raw": "", "ema": "_ema"}
LABELS = np.random.default_rng(2).integers(0, 3, ROWS)


def blend(store: RunStore, config: EnsembleConfig) -> EnsembleRecord:
    return blend_run(store, config, Request(lambda members: Prices({}, {})))


def make_store(root: Path, k: int = K) -> RunStore:
    """An empty run. With k: 1 a third of the rows are scored."""
    fold = FOLD if k > 1 else np.where(FOLD == 0, 0, -1)
    config = SweepConfig(
        name="synthetic",
        data=DataConfig(train="/nowhere/train.csv"),
        folds=FoldsConfig(k=k),
        search=SearchConfig(backbones=("timm/x",)),
    )
    lines = [
        f"{i}.png,{CLASSES[c]},,{f}" for i, (c, f) in enumerate(zip(LABELS, fold, strict=True))
    ]
    store = RunStore(root)
    store.create(config, "image_path,target,group,fold\n" + "\n".join(lines) + "\n", CLASSES)
    return store


def add(
    store: RunStore,
    number: int,
    noise: float = 1.0,
    folds: tuple[int, ...] = (0, 1, 2),
    variants: tuple[str, ...] = ("raw",),
    lost: str | None = None,
) -> dict[str, NDArray[np.float64]]:
    """A candidate with these finished folds; `lost` is the status of one more. Gives variant ->
    (ROWS, C) as it is stored."""
    name = f"c{number:04d}"
    store.save_candidate(CandidateRecord(candidate=name, backbone="timm/x", params={"lr": 0.1}))
    rng = np.random.default_rng((7, number))
    prob: dict[str, NDArray[np.float64]] = {}
    for variant in variants:
        logits = 1.5 * np.eye(3)[LABELS] + noise * rng.normal(size=(ROWS, 3))
        prob[variant] = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for fold in folds:
        rows = np.flatnonzero(store.folds().fold == fold)
        oof = {}
        for v in variants:
            true = prob[v][rows, LABELS[rows]]
            oof[v] = Oof(np.log(prob[v][rows]).astype(np.float16), true.astype(np.float32))
        scores = {
            v: VariantScore(rows=len(rows), val_logloss=1, val_acc=0, best_epoch=0) for v in oof
        }
        weights = dict.fromkeys(variants, b"weights")
        store.save_trial(_record(store, name, fold, "finished", scores), oof, rows, weights)
    if lost is not None:
        store.save_trial(_record(store, name, len(folds), lost, {}))
    return prob


def _record(
    store: RunStore, name: str, fold: int, status: str, scores: dict[str, VariantScore]
) -> TrialRecord:
    return TrialRecord(
        candidate=name, fold=fold, status=status, backbone="timm/x", params={"lr": 0.1},  # type: ignore[arg-type]
        folds_hash=store.folds().hash, seed=1, variants=scores,
    )  # fmt: skip


def loss_of(prob: NDArray[np.float64], rows: NDArray[np.bool_] | None = None) -> float:
    true = prob[np.arange(ROWS), LABELS]
    return float(-np.log(true if rows is None else true[rows]).mean())


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return make_store(tmp_path / "run")


def test_numbers_equal_numpy(store: RunStore) -> None:
    prob = {
        (f"c{i:04d}", v): p
        for i in range(4)
        for v, p in add(store, i, noise=0.8 + 0.1 * i, variants=("raw", "ema")).items()
    }
    record = blend(store, EnsembleConfig())
    assert record == store.blend.record()
    weights = {(m.candidate, m.variant): m.weight for m in record.members}
    assert sum(weights.values()) == pytest.approx(1)
    assert list(weights.values()) == sorted(weights.values(), reverse=True)
    blend = sum(w * prob[key] for key, w in weights.items())
    assert isinstance(blend, np.ndarray)
    assert record.oof_logloss == pytest.approx(loss_of(blend), abs=1e-6)  # float32 on disk
    assert record.last_fold_logloss == pytest.approx(loss_of(blend, K - 1 == FOLD), abs=1e-6)
    assert record.oof_accuracy == pytest.approx((blend.argmax(axis=1) == LABELS).mean())
    best = min(prob, key=lambda key: loss_of(prob[key]))
    assert record.best_single == " ".join(best)
    assert record.best_single_oof_logloss == pytest.approx(loss_of(prob[best]), abs=1e-6)
    assert record.oof_logloss <= record.best_single_oof_logloss
    assert (record.members_considered, record.candidates_considered) == (8, 4)
    assert record.folds_hash == store.folds().hash
    np.testing.assert_allclose(store.blend.oof(), blend, atol=2e-3)  # float16 logarithms


def test_the_certificate_holds_for_random_blends(store: RunStore) -> None:
    true = np.stack([add(store, i)["raw"][np.arange(ROWS), LABELS] for i in range(4)])
    record = blend(store, EnsembleConfig(max_rounds=3))
    weights = np.random.default_rng(0).dirichlet(np.full(4, 0.5), size=3000)
    least = -np.log(weights @ true).mean(axis=1).min()
    assert record.oof_logloss - record.certificate <= least + 1e-7


def test_the_trajectory_is_caruanas(store: RunStore) -> None:
    """Round by round the one that helps most, with replacement; the best prefix gives the
    weights."""
    true = np.stack(
        [add(store, i, 0.9 + 0.1 * i)["raw"][np.arange(ROWS), LABELS] for i in range(4)]
    )
    true = true.astype(np.float32).astype(np.float64)
    record = blend(store, EnsembleConfig(max_rounds=12))
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
    assert record.oof_logloss == pytest.approx(min(losses), abs=1e-9)


def test_the_cross_fitted_loss_equals_the_definition(store: RunStore) -> None:
    """Weights chosen on two folds, scored on the third."""
    from ensemble import greedy

    true = np.stack([add(store, i)["raw"][np.arange(ROWS), LABELS] for i in range(3)])
    true = true.astype(np.float32).astype(np.float64)
    record = blend(store, EnsembleConfig())
    losses = np.empty(ROWS)
    for fold in range(K):
        weights = greedy(true[:, fold != FOLD], max_rounds=50).weights
        losses[fold == FOLD] = -np.log(weights @ true[:, fold == FOLD])
    assert record.crossfit_logloss == pytest.approx(losses.mean(), abs=1e-9)
    assert record.crossfit_se == pytest.approx(losses.std(ddof=1) / np.sqrt(ROWS), abs=1e-9)


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
    add(store, 0)
    path = Path(store.root) / "trials" / "c0000" / "fold1" / "true_prob.npy"
    column = np.load(path)
    column[3] = value
    np.save(path, column)
    with pytest.raises(RunFolderError, match=r"c0000/\*/true_prob.npy.*no probabilities"):
        blend(store, EnsembleConfig())


def test_unknown_method(store: RunStore) -> None:
    add(store, 0)
    with pytest.raises(ConfigError, match="gredy"):
        blend(store, EnsembleConfig(method="gredy"))


def test_max_members(store: RunStore) -> None:
    for i in range(4):
        add(store, i)
    assert len(blend(store, EnsembleConfig()).members) > 1
    assert len(blend(store, EnsembleConfig(max_members=1)).members) == 1


def test_one_fixed_split_scores_its_validation_rows(tmp_path: Path) -> None:
    store = make_store(tmp_path / "fixed", k=1)
    prob = add(store, 0, folds=(0,))["raw"]
    record = blend(store, EnsembleConfig())
    assert record.oof_logloss == pytest.approx(loss_of(prob, FOLD == 0), abs=1e-6)
    assert record.last_fold_logloss == pytest.approx(record.oof_logloss)
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
