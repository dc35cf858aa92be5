"""A blend that is cut off, and two at once: the folder never mixes them."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from foldrace.config.schema import EnsembleConfig
from foldrace.core.errors import RunFolderError
from foldrace.core.files import LocalFiles
from foldrace.core.temperature import at_temperature
from foldrace.dataset.test_set import ImageSet
from foldrace.ensemble.pooling import POOLINGS, pool_terms
from foldrace.ensemble.selection.eligible import Prices
from foldrace.ensemble.selection.external import AddSpec, add_sources, added_test
from foldrace.ensemble.selection.select import Request, blend_run
from foldrace.run_folder.blend_records import EnsembleRecord
from foldrace.run_folder.store import RunStore
from tests.ensemble.selection_runs import CLASSES, LABELS, ROWS, add, make_store

TEST = ImageSet(Path(), ("1", "2"), ("T1", "T2"), "ID", CLASSES, ("ID", *CLASSES))
FIRST = EnsembleConfig(method="stacking", include=("m",))
SECOND = EnsembleConfig(method="stacking", include=("m",), exclude=("c0000", "c0001"))


class Stopped(Exception):
    """The process ends here."""


class Stopping(LocalFiles):
    """Lets some changes through and no more."""

    def __init__(self, path: Path, changes: int) -> None:
        super().__init__(path)
        self._left = changes

    def _change(self) -> None:
        if self._left == 0:
            raise Stopped
        self._left -= 1

    def write(self, name: str, data: bytes | memoryview) -> None:
        self._change()
        super().write(name, data)

    def delete(self, name: str) -> None:
        self._change()
        super().delete(name)


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    store = make_store(tmp_path / "run")
    for i in range(4):
        add(store, i, 1.0 + 0.1 * i)
    return store


def predictions(folder: Path, name: str, seed: int) -> AddSpec:
    """Files of a model made elsewhere."""
    rng = np.random.default_rng(seed)
    logits = 1.5 * np.eye(3)[LABELS] + rng.normal(size=(ROWS, 3))
    oof, test = folder / f"{name}{seed}-oof.npy", folder / f"{name}{seed}-test.npy"
    np.save(oof, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))
    np.save(test, rng.dirichlet(np.ones(3), size=2))
    return AddSpec(name, oof, test)


def blend_with(store: RunStore, config: EnsembleConfig, *specs: AddSpec) -> EnsembleRecord:
    added = add_sources(store, specs, TEST)
    return blend_run(store, config, Request(lambda members: Prices({}, {}), (), added))


def predicted(store: RunStore) -> NDArray[np.float64]:
    """What the folder's blend makes of two images: a trained member's rows 0 and 1 stand for its
    models."""
    record = store.blend.record()
    assert record is not None
    weights = np.array([m.weight for m in record.members])
    combiner = POOLINGS[record.pooling](weights, store.blend.combiner_arrays(record))
    store.blend.check_added(record)

    def log_prob(candidate: str, variant: str, is_added: bool) -> NDArray[np.floating]:
        if is_added:
            return np.log(added_test(store, candidate, TEST.ids))
        return store.oof_log_prob(candidate, variant)[:2]

    terms = (
        (i, at_temperature(log_prob(m.candidate, m.variant, m.added), m.temperature))
        for i, m in enumerate(record.members)
    )
    return pool_terms(combiner, terms)


def oof_or_none(store: RunStore) -> NDArray[np.float32] | None:
    try:
        store.blend.trajectory()
        return store.blend.oof()
    except RunFolderError as error:
        assert "blends again" in str(error)
        return None


@pytest.mark.parametrize("method", ["stacking", "greedy"])
def test_a_blend_cut_off_anywhere_leaves_the_old_one_or_the_new_one(
    store: RunStore, tmp_path: Path, method: str
) -> None:
    blend_with(store, FIRST.model_copy(update={"include": ()}))
    before, before_oof = predicted(store), store.blend.oof()
    second = EnsembleConfig(method=method, exclude=("c0000",))
    ends = []
    for changes in range(20):
        copy = RunStore(shutil.copytree(store.root, tmp_path / f"copy{changes}"))
        whole = RunStore(copy.root)
        copy.files = Stopping(Path(copy.root), changes)
        try:
            blend_with(copy, second)
        except Stopped:
            found, oof = predicted(whole), oof_or_none(whole)
            is_old = np.array_equal(found, before)
            ends.append(is_old)
            if oof is not None:
                assert np.array_equal(oof, before_oof) == is_old
            continue
        break
    else:
        pytest.fail("it never ended")
    after = predicted(whole)
    assert not np.array_equal(after, before)
    assert ends == sorted(ends, reverse=True) and sum(ends) >= 3
    assert oof_or_none(whole) is not None
    names = [name for name in whole.files.names("ensemble") if name.startswith("combiner")]
    record = whole.blend.record()
    assert record is not None
    assert names == ([record.combiner] if method == "stacking" else [])


def test_a_member_of_the_same_name_that_was_not_blended_is_refused(
    store: RunStore, tmp_path: Path
) -> None:
    blend_with(store, FIRST, predictions(tmp_path, "m", 8))
    before = predicted(store)
    refused = 0
    for changes in range(30):
        copy = RunStore(shutil.copytree(store.root, tmp_path / f"copy{changes}"))
        whole = RunStore(copy.root)
        copy.files = Stopping(Path(copy.root), changes)
        try:
            blend_with(copy, SECOND, predictions(tmp_path, "m", 9))
        except Stopped:
            record = whole.blend.record()
            assert record is not None
            is_old = record == store.blend.record()
            try:
                found = predicted(whole)
            except RunFolderError as error:
                assert is_old and "added/m/added.json" in str(error) and "--add" in str(error)
                refused += 1
                continue
            assert np.array_equal(found, before) == is_old
            continue
        break
    assert refused >= 4
    assert not np.array_equal(predicted(whole), before)


def test_a_record_is_not_written_over_another_blend(store: RunStore) -> None:
    first = blend_with(store, FIRST.model_copy(update={"include": ()}))
    store.blend.update(first.model_copy(update={"device": "a GPU"}))
    second = blend_with(store, EnsembleConfig(exclude=("c0000",)))
    with pytest.raises(RunFolderError, match=r"replaced by another blend.*blends again"):
        store.blend.update(first)
    assert store.blend.record() == second


def test_two_blends_at_once_keep_what_they_need(store: RunStore, tmp_path: Path) -> None:
    """Each with a member that the other removes."""
    blend_with(store, EnsembleConfig())  # what both would compute
    specs = [predictions(tmp_path, name, 8) for name in ("left", "right")]
    fresh = multiprocessing.get_context("spawn")
    start = fresh.Barrier(2, timeout=60)
    processes = [
        fresh.Process(target=_blend_often, args=(store.root, spec, start)) for spec in specs
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    record = store.blend.record()
    assert record is not None
    assert np.isfinite(predicted(store)).all()
    kept = sorted(member.candidate for member in record.members if member.added)
    assert store.files.names("ensemble/added") == kept and len(kept) == 1


def _blend_often(root: str, spec: AddSpec, start: object) -> None:
    store = RunStore(root)
    config = EnsembleConfig(method="uniform", calibrate=False, include=(spec.name,))
    for _ in range(8):
        start.wait()  # type: ignore[attr-defined]
        blend_with(store, config, spec)
        with store.blend.only_writer():  # nobody is halfway
            predicted(store)
