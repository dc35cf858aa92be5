"""Whom the blend of a run folder is made of: other runs, predictions made elsewhere, copies, the
names that are excluded or forced in, and every method of the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from foldrace.config.schema import EnsembleConfig
from foldrace.core.errors import ConfigError, Problem, RunFolderError, UserError
from foldrace.core.temperature import at_temperature
from foldrace.dataset.duplicates import NearDuplicate, save_near_duplicates
from foldrace.dataset.test_set import ImageSet
from foldrace.ensemble.methods import METHODS
from foldrace.ensemble.pool import Member
from foldrace.ensemble.pooling import POOLINGS, pool_terms
from foldrace.ensemble.selection.eligible import Prices
from foldrace.ensemble.selection.external import (
    NOTHING_ADDED,
    AddedPredictions,
    AddSpec,
    add_sources,
)
from foldrace.ensemble.selection.select import Request, blend_run
from foldrace.run_folder.blend_records import EnsembleRecord
from foldrace.run_folder.store import RunStore
from tests.ensemble.selection_runs import (
    CLASSES,
    LABELS,
    PLAIN,
    ROWS,
    add,
    blend,
    loss_of,
    make_store,
    true_column,
)

TEST = ImageSet(Path(), ("1", "2"), ("T1", "T2"), "ID", CLASSES, ("ID", *CLASSES))


def blend_with(
    store: RunStore,
    config: EnsembleConfig,
    *runs: RunStore,
    added: AddedPredictions = NOTHING_ADDED,
) -> EnsembleRecord:
    roots = tuple(run.root for run in runs)
    return blend_run(store, config, Request(lambda members: Prices({}, {}), roots, added))


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    """Four candidates, the first the best."""
    store = make_store(tmp_path / "run")
    for i in range(4):
        backbone = "timm/x" if i < 2 else "timm/y"
        add(store, i, 0.7 + 0.3 * i, variants=("raw", "ema"), backbone=backbone)
    return store


def names(record: EnsembleRecord) -> set[tuple[str, str]]:
    return {(m.candidate, m.variant) for m in record.members}


def test_excluded_names(store: RunStore) -> None:
    """A candidate, one variant, a backbone."""
    free = blend(store, EnsembleConfig(method="uniform"))
    assert len(names(free)) == 8
    record = blend(store, EnsembleConfig(method="uniform", exclude=("c0000", "c0001 ema")))
    assert names(free) - names(record) == {("c0000", "raw"), ("c0000", "ema"), ("c0001", "ema")}
    assert record.members_considered == 5
    record = blend(store, EnsembleConfig(method="uniform", exclude=("timm/y",)))
    assert {candidate for candidate, _ in names(record)} == {"c0000", "c0001"}
    with pytest.raises(ConfigError, match=r"ensemble\.exclude: excludes all 8 members"):
        blend(store, EnsembleConfig(exclude=("timm/x", "timm/y")))
    assert store.blend.record() == record


@pytest.mark.parametrize("method", ["greedy", "optimal", "geometric", "stacking"])
def test_included_names(store: RunStore, method: str) -> None:
    """Each gets a weight, though none would: the best variant of a candidate, the best member of a
    backbone, and a variant that is named."""
    free = blend(store, EnsembleConfig(method="greedy"))
    assert "c0003" not in {candidate for candidate, _ in names(free)}
    config = EnsembleConfig(method=method, calibrate=False)
    for wish in ("c0003", "c0003 ema", "timm/y"):
        found = names(blend(store, config.model_copy(update={"include": (wish,)})))
        losses = {
            (s.candidate.candidate, v): -np.log(store.true_prob(s.candidate.candidate, v)).mean()
            for s in store.summaries()
            for v in ("raw", "ema")
            if wish in (s.candidate.candidate, s.candidate.backbone, f"c0003 {v}")
            and (wish != "c0003 ema" or s.candidate.candidate == "c0003")
        }
        assert min(losses, key=lambda key: losses[key]) in found


def test_all_unknown_names_are_told_before_any_array_is_read(store: RunStore) -> None:
    Path(store.root, "trials/c0000/fold0/oof.npy").write_bytes(b"torn")
    config = EnsembleConfig(
        method="gredy", exclude=("c0009", "c0001"), include=("c0001 snap1", "timm/z", "c0002")
    )
    with pytest.raises(ConfigError) as caught:
        blend(store, config)
    texts = [str(p) for p in caught.value.problems]
    allowed = (
        "candidates: c0000, c0001, c0002, c0003; backbones: timm/x, timm/y; a variant: `c0001 ema`"
    )
    assert texts[0].startswith("ensemble.method: got 'gredy'; did you mean 'greedy'?")
    assert texts[1:] == [
        f"ensemble.exclude: 'c0009' names no member; {allowed}",
        f"ensemble.include: 'c0001 snap1' names no member; {allowed}",
        f"ensemble.include: 'timm/z' names no member; {allowed}",
    ]


def test_a_name_both_excluded_and_forced_in(store: RunStore) -> None:
    config = EnsembleConfig(exclude=("c0001",), include=("c0001",))
    with pytest.raises(ConfigError, match=r"include: 'c0001' is excluded by ensemble\.exclude"):
        blend(store, config)


def test_several_runs_are_one_pool(store: RunStore, tmp_path: Path) -> None:
    """As if all candidates lay in one folder."""
    other, whole = make_store(tmp_path / "other"), make_store(tmp_path / "whole")
    for i in range(4):
        add(whole, i, 0.7 + 0.3 * i, variants=("raw", "ema"))
    add(other, 7, 0.6)
    add(whole, 7, 0.6)
    record, expected = blend_with(store, PLAIN, other), blend(whole, PLAIN)
    assert names(record) == names(expected)
    assert {m.candidate: m.run for m in record.members if m.run} == {"c0007": other.root}
    assert record.oof_logloss == pytest.approx(expected.oof_logloss, abs=1e-12)
    assert record.crossfit_logloss == pytest.approx(expected.crossfit_logloss, abs=1e-12)
    assert (record.members_considered, record.candidates_considered) == (9, 5)
    assert record.members_without_weights == 0
    assert other.blend.record() is None


def test_a_run_without_candidates_blends_those_of_others(store: RunStore, tmp_path: Path) -> None:
    empty = make_store(tmp_path / "empty")
    record = blend_with(empty, EnsembleConfig(), store)
    assert {m.run for m in record.members} == {store.root}
    assert record.oof_logloss == blend(store, EnsembleConfig()).oof_logloss


def test_every_wrong_run_is_told(store: RunStore, tmp_path: Path) -> None:
    roots = (str(tmp_path / "no"), str(store.root), make_store(tmp_path / "split", k=1).root)
    with pytest.raises(RunFolderError) as caught:
        blend_run(store, EnsembleConfig(), Request(lambda members: Prices({}, {}), roots))
    assert [str(p).split(":")[0] for p in caught.value.problems] == list(roots)


def test_all_wrong_wishes_are_one_message(store: RunStore) -> None:
    """Of config, further runs and files that could not be read, whose names are known."""
    config = EnsembleConfig(method="gredy", include=("c0009", "mine"))
    bad = Problem("mine.csv", "is no file")
    request = Request(
        lambda members: Prices({}, {}), ("/nowhere/run",), problems=(bad,),
        unread=(Member("mine", "added"),),
    )  # fmt: skip
    with pytest.raises(UserError) as caught:
        blend_run(store, config, request)
    wheres = ["ensemble.method", "ensemble.include", "mine.csv", "/nowhere/run"]
    assert [p.where for p in caught.value.problems] == wheres
    assert "'c0009' names no member" in caught.value.problems[1].message


def test_candidates_that_are_not_complete_or_have_no_weights(store: RunStore) -> None:
    """They may be excluded, as before they ran, and not be forced in."""
    add(store, 4, 0.5, folds=(0,), lost="failed")
    store.remove_weights("c0003", "raw")
    config = EnsembleConfig(method="uniform", exclude=("c0004", "c0003 raw"))
    assert len(names(blend(store, config))) == 7
    with pytest.raises(ConfigError) as caught:
        blend(store, EnsembleConfig(include=("c0004", "c0003 raw", "c0003")))
    told = [p.message.split(":")[0] for p in caught.value.problems]
    assert told == ["'c0004' cannot predict", "'c0003 raw' cannot predict"]


def test_a_forced_copy_is_the_member_that_is_kept(tmp_path: Path) -> None:
    """Copies of two run folders are told apart by name."""
    store, other = make_store(tmp_path / "run"), make_store(tmp_path / "other")
    for number, noise in enumerate((0.3, 2.0)):
        add(store, number, noise)
        add(other, number, noise)
    config = EnsembleConfig(include=("other:c0001",))
    record = blend_with(store, config, other)
    assert ("c0001", "raw") in names(record)
    same = ("c0000 raw", f"c0000 raw of {other.root}"), ("c0001 raw", f"c0001 raw of {other.root}")
    assert record.duplicates == same


def elsewhere(folder: Path, name: str, prob: NDArray[np.float64] | None) -> AddSpec:
    """An --add with test predictions; None: them alone."""
    np.save(folder / f"{name} test.npy", np.full((2, 3), 1 / 3))
    if prob is None:
        return AddSpec(name, None, folder / f"{name} test.npy")
    np.save(folder / f"{name}.npy", prob)
    return AddSpec(name, folder / f"{name}.npy", folder / f"{name} test.npy")


def good(seed: int, noise: float = 0.3) -> NDArray[np.float64]:
    logits = 1.5 * np.eye(3)[LABELS] + noise * np.random.default_rng(seed).normal(size=(ROWS, 3))
    return np.asarray(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))


def test_added_members(store: RunStore, tmp_path: Path) -> None:
    prob = good(8)
    added = add_sources(store, [elsewhere(tmp_path, "mine", prob)], TEST)
    record = blend_with(store, PLAIN, added=added)
    (member,) = (m for m in record.members if m.added)
    assert (member.candidate, member.variant, member.run) == ("mine", "added", "")
    assert record.best_single == "mine added"
    assert record.best_single_oof_logloss == pytest.approx(loss_of(prob), abs=1e-6)
    assert (record.members_considered, record.members_without_weights) == (9, 0)
    chosen = sum(
        m.weight * (true_column(prob) if m.added else store.true_prob(m.candidate, m.variant))
        for m in record.members
    )
    assert record.mixture_logloss == pytest.approx(-np.log(chosen).mean(), abs=1e-6)
    assert store.files.names("ensemble/added") == ["mine"]
    again = blend(store, PLAIN)
    assert not any(m.added for m in again.members)
    assert store.files.names("ensemble/added") == []


def test_an_added_member_without_weight_is_not_kept(store: RunStore, tmp_path: Path) -> None:
    wrong = np.eye(3)[(LABELS + 1) % 3] * 0.97 + 0.01
    added = add_sources(store, [elsewhere(tmp_path, "bad", wrong)], TEST)
    record = blend_with(store, EnsembleConfig(), added=added)
    assert not any(m.added for m in record.members) and record.members_considered == 9
    assert store.files.names("ensemble/added") == []


def test_predictions_of_the_test_set_alone(store: RunStore, tmp_path: Path) -> None:
    """Equal parts with the blend, which they do not touch."""
    specs = [elsewhere(tmp_path, name, None) for name in ("one", "two")]
    record = blend_with(store, EnsembleConfig(), added=add_sources(store, specs, TEST))
    assert [(u.name, u.weight) for u in record.unvalidated] == [("one", 1 / 3), ("two", 1 / 3)]
    assert store.files.names("ensemble/added") == ["one", "two"]
    alone = blend(store, EnsembleConfig())
    kept = {name: d for name, d in record.digests.items() if not name.startswith("added/")}
    assert alone == record.model_copy(update={"unvalidated": (), "digests": kept})


def damage(store: RunStore) -> EnsembleConfig:
    path = Path(store.root, "trials/c0000/fold0/oof.npy")
    array = np.load(path)
    array[0, 0] = np.nan
    np.save(path, array)
    return EnsembleConfig()


@pytest.mark.parametrize(
    "fail",
    [
        damage,
        lambda store: EnsembleConfig(method="gredy"),
        lambda store: EnsembleConfig(method="snapshot"),
        lambda store: EnsembleConfig(max_bytes=1),
        lambda store: EnsembleConfig(include=("nobody",)),
    ],
)
def test_a_blend_that_fails_leaves_the_folder_as_it_was(
    store: RunStore, tmp_path: Path, fail: Callable[[RunStore], EnsembleConfig]
) -> None:
    """An earlier blend has a member of the same name."""
    blend_with(store, PLAIN, added=add_sources(store, [elsewhere(tmp_path, "m", good(8))], TEST))
    config = fail(store)
    before = contents(store)
    specs = [elsewhere(tmp_path, "m", good(9)), elsewhere(tmp_path, "n", None)]
    with pytest.raises((ConfigError, RunFolderError)):
        blend_with(store, config, added=add_sources(store, specs, TEST))
    assert contents(store) == before
    assert before.keys() >= {"ensemble/added/m/oof.npy", "ensemble/ensemble.json"}


def contents(store: RunStore) -> dict[str, bytes]:
    """Of all files but the derived matrix."""
    root = Path(store.root)
    files = (path for path in root.rglob("*") if path.is_file())
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in files
        if "matrix" not in path.parts
    }


def test_the_same_predictions_count_once(tmp_path: Path) -> None:
    store = make_store(tmp_path / "twice")
    for number, seed in enumerate((5, 6, 5, 5)):
        add(store, number, seed=seed)
    record = blend(store, EnsembleConfig(method="uniform"))
    assert record.duplicates == (("c0000 raw", "c0002 raw", "c0003 raw"),)
    assert names(record) == {("c0000", "raw"), ("c0001", "raw")}
    assert (record.members_considered, record.candidates_considered) == (2, 4)


def test_near_duplicates(store: RunStore) -> None:
    """The loss without the rows that resemble another; before anyone looked nothing is said."""
    assert blend(store, PLAIN).near_duplicates is None
    save_near_duplicates(store.files, [])
    found = blend(store, PLAIN).near_duplicates
    assert found is not None and found.rows == 0
    prob = store.blend.oof().astype(np.float64)
    worst = np.argsort(prob[np.arange(ROWS), LABELS])[:2]
    pairs = [NearDuplicate(f"{i}.png", "other.png", "test", 2) for i in (*worst, worst[0])]
    save_near_duplicates(store.files, pairs)
    record = blend(store, PLAIN)
    assert record.near_duplicates is not None and record.near_duplicates.rows == 2
    without = np.delete(np.arange(ROWS), worst)
    expected = -np.log(prob[without, LABELS[without]]).mean()
    assert record.near_duplicates.oof_logloss_without == pytest.approx(expected, abs=1e-3)
    assert expected != pytest.approx(record.oof_logloss, abs=1e-3)
    save_near_duplicates(store.files, [replace(pairs[0], image_path="gone.png")])
    with pytest.raises(RunFolderError, match=r"near_duplicates\.csv: is damaged or not of this"):
        blend(store, PLAIN)


@pytest.mark.parametrize("calibrate", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_every_method(tmp_path: Path, method: str, calibrate: bool) -> None:
    """What the folder keeps gives the blend's OOF rows again."""
    store = make_store(tmp_path / "run")
    variants = {"soup": ("raw", "soup"), "snapshot": ("raw", "snap1", "snap2")}
    for i in range(3):
        add(store, i, 2.0 - 0.1 * i, variants=variants.get(method, ("raw", "ema")))
    record = blend(store, EnsembleConfig(method=method, calibrate=calibrate))
    assert record.method == method
    assert (record.certificate is None) == (record.pooling != "arithmetic")
    assert 0 < record.oof_logloss < np.log(3) and 0 < record.crossfit_logloss < np.log(3) + 1
    assert record.crossfit_se > 0 and record.single_crossfit_logloss > 0
    assert calibrate or record.blend_temperature == 1
    weights = np.array([m.weight for m in record.members])
    combiner = POOLINGS[record.pooling](weights, store.blend.combiner_arrays(record))
    terms = (
        (i, at_temperature(store.oof_log_prob(m.candidate, m.variant), m.temperature))
        for i, m in enumerate(record.members)
    )
    pooled = np.log(np.maximum(pool_terms(combiner, terms), 1e-15))
    prob = np.exp(at_temperature(pooled, record.blend_temperature)).astype(np.float64)
    np.testing.assert_allclose(store.blend.oof(), prob, atol=2e-3)
    assert loss_of(prob) == pytest.approx(record.oof_logloss, abs=1e-5)


@pytest.mark.parametrize("method", ["soup", "snapshot"])
def test_methods_that_need_what_no_trial_has(store: RunStore, method: str) -> None:
    with pytest.raises(ConfigError, match=rf"ensemble\.method: '{method}' needs {method}s") as got:
        blend(store, EnsembleConfig(method=method))
    assert got.value.exit_code == 2
    assert store.blend.record() is None
