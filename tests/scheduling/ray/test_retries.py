"""What a fold trial's next attempt finds in the run folder: the searcher on a real store."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from ray.train import WorkerGroupError

from foldrace.config.schema import RaceConfig, ResourcesConfig, SearchConfig
from foldrace.core.errors import RunFailure
from foldrace.core.plugin_files import PluginFile, import_plugins
from foldrace.core.plugins import PluginFailure, naming_plugins
from foldrace.run_folder.records import TrialRecord, VariantScore
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.ray.device_group import _memory_is_full
from foldrace.scheduling.ray.fold_trial import CANDIDATE, FOLD, JUDGED, TrialJob, trainable
from foldrace.scheduling.ray.tune_adapter import SweepSearcher
from foldrace.scheduling.room import Room
from foldrace.scheduling.search.study import open_study
from foldrace.scheduling.sweep import Sweep
from foldrace.search_spaces.space import build_space
from tests.pretend_tune import pretend_ray

STATE = b"a state"
COLUMN = np.array([0.25, 0.5], dtype=np.float32)


@pytest.mark.parametrize(
    ("error", "full"),
    [
        ("torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB.')", True),
        ("RuntimeError('cuDNN error: CUDNN_STATUS_ALLOC_FAILED')", True),
        ("RuntimeError('shapes cannot be multiplied')", False),
    ],
)
def test_a_group_whose_plugin_has_no_memory_starts_again(error: str, full: bool) -> None:
    """What a device sends is pickled: without its cause."""
    source = f"import torch\ndef f():\n    raise {error}\nPARTS = []\n"
    [module] = import_plugins(
        [PluginFile("own_loss", source.encode(), "/gone/own_loss.py")]
    ).values()
    with pytest.raises(PluginFailure, match=r"own_loss\.py line 3") as caught, naming_plugins():
        module.f()  # type: ignore[union-attr]
    sent = pickle.loads(pickle.dumps(caught.value))
    assert _memory_is_full(WorkerGroupError("one failed", {1: sent})) == full
    assert not _memory_is_full(WorkerGroupError("one", {0: RunFailure("out of memory with 1")}))


@pytest.fixture
def store(make_tiny_run: Any) -> RunStore:
    store: RunStore = make_tiny_run(k=3).store
    return store


def searcher_for(store: RunStore, max_failures: int) -> SweepSearcher:
    """One candidate, all of its folds at once."""
    space, problems = build_space(store.config(), "")
    assert not problems
    config = store.config().model_copy(
        update={
            "search": SearchConfig(backbones=("timm/test_vit",), candidates=1),
            "race": RaceConfig(rule="none"),
            "resources": ResourcesConfig(max_failures=max_failures),
        }
    )
    study = open_study(store, config, space)
    return SweepSearcher(Sweep(store, config, study, Room(lambda: 3)), store)


def start(searcher: SweepSearcher, name: str) -> tuple[str, int]:
    task = searcher.suggest(name)
    assert isinstance(task, dict)
    return task[CANDIDATE], task[FOLD]


def end(store: RunStore, candidate: str, fold: int, status: str) -> None:
    """What the worker writes."""
    score = VariantScore(rows=20, val_logloss=1.0, calibrated_logloss=1.0, val_acc=0.3, epoch=0)
    store.save_trial(
        TrialRecord(
            candidate=candidate, fold=fold, status=status, backbone="timm/test_vit", params={},  # type: ignore[arg-type]
            folds_hash=store.folds().hash, seed=0, error="boom" if status == "failed" else None,
            variants={"raw": score} if status == "finished" else {},
        )
    )  # fmt: skip


@pytest.mark.parametrize("record", [True, False], ids=["an exception", "a killed worker"])
def test_a_failed_attempt_leaves_its_state_but_to_the_last(store: RunStore, record: bool) -> None:
    searcher = searcher_for(store, max_failures=2)
    for attempt, kept in enumerate([STATE, None, None]):
        candidate, fold = start(searcher, f"try {attempt}")
        store.save_resume_state(candidate, fold, STATE)
        store.save_rung(candidate, fold, 1, "a log\n", {"raw": COLUMN})
        store.files.write(f"{store.trial_folder(candidate, fold)}/oof.npy", b"half")
        if record:
            end(store, candidate, fold, "failed")
        searcher.on_trial_complete(f"try {attempt}")
        assert store.resume_state(candidate, fold) == kept
        assert store.train_log(candidate, fold) == "a log\n"
        np.testing.assert_array_equal(store.rung_columns(candidate, fold, 1, 2)["raw"], COLUMN)
        failed = store.trial(candidate, fold)
        assert (failed is not None) == (attempt == 2)  # for good
    assert searcher.suggest("nothing more") == searcher.FINISHED


def test_a_settled_candidate_keeps_no_state(store: RunStore) -> None:
    searcher = searcher_for(store, max_failures=2)
    candidate, _ = start(searcher, "a")
    start(searcher, "b")
    for fold in range(2):
        store.save_resume_state(candidate, fold, STATE)
    end(store, candidate, 0, "diverged")
    searcher.on_trial_complete("a")
    assert store.resume_state(candidate, 0) is None
    searcher.on_trial_complete("b")  # killed, and not worth another attempt
    assert store.resume_state(candidate, 1) is None


def test_an_attempt_that_was_given_up_for_lost_may_have_finished(store: RunStore) -> None:
    """The next one leaves its trial whole, and does not even look for the images."""
    searcher = searcher_for(store, max_failures=2)
    candidate, fold = start(searcher, "lost")
    searcher.on_trial_complete("lost")
    assert start(searcher, "next") == (candidate, fold)
    end(store, candidate, fold, "finished")
    before = store.files.stamps("trials")
    with pretend_ray():
        job = TrialJob(store.root, image_root="/nowhere", session="s", use_gpu=False)
        trainable(job)({CANDIDATE: candidate, FOLD: fold, JUDGED: False})
    assert store.files.stamps("trials") == before
    searcher.on_trial_complete("next")
    assert store.trial(candidate, fold) is not None
    _, other = start(searcher, "another fold")
    assert other != fold
