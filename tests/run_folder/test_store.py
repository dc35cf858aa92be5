"""The run folder as a whole: names that users' scripts rely on, config, classes, plugins."""

from __future__ import annotations

import json
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from foldrace.core.errors import RunFolderError
from foldrace.core.plugin_files import PluginFile
from foldrace.run_folder.records import (
    CandidateRecord,
)
from foldrace.run_folder.store import RunStore
from tests.run_folder.stored_runs import (
    CLASSES,
    PARAMS,
    config,
    ensemble_record,
    folds_text,
    new_store,
    save_fold,
)


def test_the_folder_has_the_names_of_the_contract(complete: RunStore, tmp_path: Path) -> None:
    complete.write_tables(complete.summaries())
    complete.blend.save(ensemble_record(complete), "round\n", np.zeros((70, 3), np.float16))
    root = tmp_path / "run"
    names = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
    trial = (
        "trial.json", "train_log.csv", "best.safetensors", "best_ema.safetensors", "rows.npy",
        "oof.npy", "oof_ema.npy", "true_prob.npy", "true_prob_ema.npy",
    )  # fmt: skip
    top = {"sweep.yaml", "folds.csv", "classes.json", "leaderboard.csv", "trials.csv",
               "decisions.csv"}  # fmt: skip
    blend = {f"ensemble/{n}" for n in ("ensemble.json", "trajectory.csv", "oof.npy")}
    trials = {f"trials/c0000/fold{k}/{n}" for k in range(3) for n in trial}
    assert names == top | blend | trials | {"trials/c0000/candidate.json"}


def test_arrays_have_the_types_of_the_contract(complete: RunStore, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "trials" / "c0000" / "fold1"
    arrays = {n: np.load(folder / n, allow_pickle=False) for n in ("rows.npy", "oof.npy")}
    assert (arrays["rows.npy"].dtype, arrays["oof.npy"].dtype) == (np.int64, np.float16)
    assert arrays["oof.npy"].shape == (20, 3)
    true = np.load(folder / "true_prob.npy", allow_pickle=False)
    assert (true.dtype, true.shape) == (np.float32, (20,))


def test_what_was_put_in_comes_out(complete: RunStore) -> None:
    again = RunStore.open(complete.root)
    assert again.config() == config()
    assert again.classes() == CLASSES
    assert again.folds().hash == complete.folds().hash
    assert again.labels()[:4].tolist() == [0, 1, 2, 0]
    assert again.fold_count == 3
    assert again.weights("c0000", 1, "ema") == b"ema weights"
    assert again.train_log("c0000", 0) == "epoch,train_loss\n0,1\n"
    assert again.train_log("c0000", 7) is None
    assert again.blend.record() is None
    record = ensemble_record(again)
    written = again.blend.save(record, "round\n", np.zeros((70, 3), np.float16))
    assert again.blend.record() == written
    assert written.model_copy(update={"combiner": record.combiner, "digests": {}}) == record
    assert again.blend.trajectory() == "round\n"
    assert again.blend.oof().tolist() == np.ones((70, 3)).tolist()


def test_targets_of_no_class_are_named(complete: RunStore) -> None:
    complete.files.write("classes.json", json.dumps(["가", "b"]).encode())
    with pytest.raises(RunFolderError) as error:
        complete.labels()
    assert str(error.value) == (
        f"{complete.root}/folds.csv: 23 rows are of no class of classes.json, for example line 4 "
        "has the target 'c'; allowed: 가, b"
    )


def test_file_names_that_are_not_utf8_survive(tmp_path: Path) -> None:
    name = b"caf\xe9.png".decode(errors="surrogateescape")
    store = RunStore(tmp_path / "run")
    text = f"image_path,target,group,fold\n{name},b,,0\n"
    store.create(config(1), text, CLASSES)
    assert RunStore.open(store.root).folds().image_paths == (name,)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("sweep.yaml", "config"),
        ("ensemble/ensemble.json", "blend.record"),
    ],
)
def test_damaged_files_are_named(complete: RunStore, name: str, read: str) -> None:
    complete.files.write(name, b"{}")
    with pytest.raises(RunFolderError, match="is damaged") as error:
        attrgetter(read)(complete)()
    assert error.value.problems[0].where.endswith(name)


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="is no run folder"):
        RunStore.open(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match="cannot be written"):
        new_store(tmp_path / "file" / "run", np.array([0]))


def test_a_whole_run_in_an_object_store(
    s3_environment: str, fold: NDArray[np.int64], prob: NDArray[np.float32]
) -> None:
    query = f"endpoint_override=http://{s3_environment}&scheme=http&region=us-east-1"
    store = new_store(f"s3://runs/cars/run1?{query}", fold)
    store.save_candidate(CandidateRecord(candidate="c0000", backbone="b", params=PARAMS))
    for k in range(3):
        save_fold(store, k, prob)
    again = RunStore.open(store.root)
    assert again.config() == config()
    assert again.weights("c0000", 2, "raw") == b"raw weights"
    assert [s.status for s in again.summaries()] == ["complete"]
    assert again.true_prob("c0000", "ema").shape == (70,)
    assert again.weight_bytes("c0000", "raw") == 3 * len(b"raw weights")
    record, oof = ensemble_record(again), np.zeros((70, 3), np.float16)
    record = again.blend.save(record, "", oof, {"a": np.ones(2)})
    assert again.blend.combiner_arrays(record)["a"].tolist() == [1, 1]
    record = again.blend.save(record, "", oof)
    assert again.blend.combiner_arrays(record) == {}
    with again.blend.only_writer():
        assert again.files.names("ensemble") == ["ensemble.json", "oof.npy", "trajectory.csv"]
    again.write_tables(again.summaries())
    again.save_resume_state("c0000", 2, memoryview(b"state"))
    again.clear_trial("c0000", 2)
    assert again.resume_state("c0000", 2) == b"state"
    again.forget_resume_states("c0000")
    assert again.resume_state("c0000", 2) is None
    save_fold(again, 2, prob)
    again.remove_weights("c0000", "ema")
    assert again.has_weights("c0000", "raw") and not again.has_weights("c0000", "ema")
    again.forget_trial("c0000", 1)
    assert sorted(again.trials()) == [("c0000", 0), ("c0000", 2)]
    assert again.files.names("trials/c0000") == ["candidate.json", "fold0", "fold2"]
    assert again.log_folder() is None


def test_the_runs_own_copies_of_its_plugins(tmp_path: Path) -> None:
    assert new_store(tmp_path / "plain", np.array([0, 1])).plugins() == ()
    files = [PluginFile(name, f"X = '{name}'".encode(), f"/{name}.py") for name in ("b", "a")]
    store = RunStore(tmp_path / "plugged")
    store.create(config(), folds_text(np.array([0, 1])), CLASSES, files)
    found = RunStore.open(store.root).plugins()
    assert found == (files[1], files[0])  # by name
    assert found[0].path == f"{store.root}/plugins/a.py"
