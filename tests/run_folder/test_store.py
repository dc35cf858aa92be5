"""The run folder: names that users' scripts rely on, completeness, and no pickle."""

from __future__ import annotations

import csv
import io
import json
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, log_loss

from foldrace.config.load import differing_keys
from foldrace.config.schema import DataConfig, FoldsConfig, SearchConfig, SweepConfig
from foldrace.core.errors import RunFolderError
from foldrace.core.plugin_files import PluginFile
from foldrace.run_folder.blend_records import EnsembleRecord, MemberRecord
from foldrace.run_folder.records import (
    CandidateRecord,
    Oof,
    RaceDecision,
    TrialRecord,
    VariantScore,
)
from foldrace.run_folder.store import RunStore

CLASSES = ("가", "b", "c")
PARAMS: dict[str, int | float] = {"lr": 1e-3, "batch_size": 32}


def config(k: int = 3) -> SweepConfig:
    return SweepConfig(
        name="test",
        data=DataConfig(train="/data/train.csv"),
        folds=FoldsConfig(k=k),
        search=SearchConfig(backbones=("timm/resnet18",)),
    )


def folds_text(fold: NDArray[np.int64]) -> str:
    lines = [f"{i}.png,{CLASSES[i % 3]},,{f}" for i, f in enumerate(fold)]
    return "\n".join(["image_path,target,group,fold", *lines]) + "\n"


def new_store(root: Path | str, fold: NDArray[np.int64]) -> RunStore:
    store = RunStore(root)
    store.create(config(int(fold.max()) + 1), folds_text(fold), CLASSES)
    return store


def trial_record(store: RunStore, fold: int, **changes: object) -> TrialRecord:
    values: dict[str, object] = {
        "candidate": "c0000",
        "fold": fold,
        "status": "finished",
        "backbone": "timm/resnet18",
        "params": PARAMS,
        "folds_hash": store.folds().hash,
        "seed": 1,
    }
    return TrialRecord.model_validate(values | changes)


def save_fold(
    store: RunStore, fold: int, prob: NDArray[np.float32], candidate: str = "c0000"
) -> None:
    """A finished trial with the same probabilities as raw and, sharpened, as EMA."""
    rows = np.flatnonzero(store.folds().fold == fold)
    labels = store.labels()[rows]
    oof, scores = {}, {}
    for variant, p in (("raw", prob[rows]), ("ema", sharpened(prob)[rows])):
        true = p[np.arange(len(rows)), labels]
        oof[variant] = Oof(np.log(p).astype(np.float16), true)
        scores[variant] = VariantScore(
            rows=len(rows),
            val_logloss=float(-np.log(true.astype(np.float64)).mean()),
            val_acc=float((p.argmax(1) == labels).mean()),
            best_epoch=fold,
        )
    record = trial_record(
        store, fold, candidate=candidate, variants=scores, epochs_trained=4, seconds=1.5
    )
    weights = {"raw": b"raw weights", "ema": b"ema weights"}
    store.save_trial(record, oof, rows, weights, "epoch,train_loss\n0,1\n")


def sharpened(prob: NDArray[np.float32]) -> NDArray[np.float32]:
    squared = prob**2
    return np.asarray(squared / squared.sum(1, keepdims=True), dtype=np.float32)


def exact(prob: NDArray[np.float32]) -> NDArray[np.float64]:
    """Rows that sum to 1 in float64."""
    wide = prob.astype(np.float64)
    return np.asarray(wide / wide.sum(1, keepdims=True))


@pytest.fixture
def fold() -> NDArray[np.int64]:
    """Folds of different sizes, in no order."""
    return np.random.default_rng(1).permutation(np.repeat([0, 1, 2], [40, 20, 10]))


@pytest.fixture
def prob(fold: NDArray[np.int64]) -> NDArray[np.float32]:
    rng = np.random.default_rng(2)
    return rng.dirichlet(np.ones(3), size=len(fold)).astype(np.float32)


@pytest.fixture
def store(tmp_path: Path, fold: NDArray[np.int64]) -> RunStore:
    return new_store(tmp_path / "run", fold)


@pytest.fixture
def complete(store: RunStore, prob: NDArray[np.float32]) -> RunStore:
    store.save_candidate(
        CandidateRecord(candidate="c0000", backbone="timm/resnet18", params=PARAMS)
    )
    for k in (2, 0, 1):
        save_fold(store, k, prob)
    return store


def ensemble_record(store: RunStore) -> EnsembleRecord:
    return EnsembleRecord(
        method="greedy",
        members=(MemberRecord(candidate="c0000", variant="raw", weight=1.0),),
        oof_logloss=0.5,
        crossfit_logloss=0.6,
        crossfit_se=0.01,
        certificate=0.001,
        best_single_oof_logloss=0.5,
        best_single="c0000 raw",
        oof_accuracy=0.9,
        last_fold_logloss=0.7,
        members_considered=1,
        candidates_considered=1,
        folds_hash=store.folds().hash,
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


def test_what_the_combiner_knows_comes_back_bit_for_bit(complete: RunStore) -> None:
    record, oof = ensemble_record(complete), np.zeros((70, 3), np.float16)
    assert complete.blend.combiner_arrays(record) == {}
    wide = np.random.default_rng(0).normal(size=(3, 4))
    arrays = {"coefficients": wide.T, "bias": np.array(-0.25), "none": np.empty((0, 2))}
    written = complete.blend.save(record, "round\n", oof, arrays)
    found = RunStore.open(complete.root).blend.combiner_arrays(written)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (np.float64, array.shape)
        np.testing.assert_array_equal(found[name], array)
    complete.blend.update(written.model_copy(update={"oof_logloss": 0.25}))
    assert complete.blend.combiner_arrays(written).keys() == arrays.keys()
    simple = complete.blend.save(record, "round\n", oof)  # one that knows nothing more
    assert complete.blend.combiner_arrays(simple) == {}
    assert complete.files.names("ensemble") == ["ensemble.json", "oof.npy", "trajectory.csv"]


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 64])
def test_damaged_combiner_arrays_are_named(complete: RunStore, content: bytes) -> None:
    complete.files.write("ensemble/combiner.safetensors", content)
    with pytest.raises(
        RunFolderError, match=r"combiner\.safetensors: cannot be read.*blends again"
    ):
        complete.blend.combiner_arrays(ensemble_record(complete))


def test_bytes_of_the_weights_are_those_of_all_folds(complete: RunStore) -> None:
    assert complete.weight_bytes("c0000", "raw") == 3 * len(b"raw weights")
    assert complete.weight_bytes("c0000", "ema") == 3 * len(b"ema weights")


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


def test_pooled_arrays_are_in_the_order_of_the_rows(
    complete: RunStore, prob: NDArray[np.float32]
) -> None:
    np.testing.assert_allclose(complete.oof("c0000", "raw"), prob, rtol=0.003)
    stored = np.log(prob).astype(np.float16)
    np.testing.assert_array_equal(complete.oof_log_prob("c0000", "raw"), stored)
    assert complete.oof_log_prob("c0000", "raw").dtype == np.float32
    true = prob[np.arange(70), complete.labels()]
    np.testing.assert_array_equal(complete.true_prob("c0000", "raw"), true)
    sharp = sharpened(prob)[np.arange(70), complete.labels()]
    np.testing.assert_array_equal(complete.true_prob("c0000", "ema"), sharp)


def test_with_one_split_the_rows_are_the_validation_rows(tmp_path: Path) -> None:
    fold = np.array([-1, 0, -2, -1, 0, 0, -1])
    store = new_store(tmp_path / "run", fold)
    prob = np.full((7, 3), 1 / 3, np.float32)
    save_fold(store, 0, prob)
    assert store.scored_rows().tolist() == [1, 4, 5]
    assert store.fold_count == 1
    assert store.oof("c0000", "raw").shape == (3, 3)


def damage_missing(folder: Path) -> None:
    (folder / "rows.npy").unlink()


def damage_shorter(folder: Path) -> None:
    np.save(folder / "true_prob.npy", np.ones(3, np.float32))


def damage_row_twice(folder: Path) -> None:
    rows = np.load(folder / "rows.npy")
    rows[0] = rows[1]
    np.save(folder / "rows.npy", rows)


def damage_truncated(folder: Path) -> None:
    data = (folder / "true_prob.npy").read_bytes()
    (folder / "true_prob.npy").write_bytes(data[:-8])


def damage_pickle(folder: Path) -> None:
    np.save(folder / "true_prob.npy", np.array([{"a": 1}] * 20, dtype=object), allow_pickle=True)


def damage_archive(folder: Path) -> None:
    with (folder / "true_prob.npy").open("wb") as file:
        np.savez(file, a=np.ones(20))


def damage_empty(folder: Path) -> None:
    (folder / "true_prob.npy").write_bytes(b"")


@pytest.mark.parametrize(
    "damage",
    [
        damage_missing,
        damage_shorter,
        damage_row_twice,
        damage_truncated,
        damage_pickle,
        damage_archive,
        damage_empty,
    ],
)
def test_incomplete_or_damaged_rows_never_reach_a_blend(
    complete: RunStore, tmp_path: Path, damage: object
) -> None:
    assert callable(damage)
    damage(tmp_path / "run" / "trials" / "c0000" / "fold1")
    with pytest.raises(RunFolderError, match="trials/c0000"):
        complete.true_prob("c0000", "raw")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda rows: rows[1:], "line {first} of folds.csv ({path}) is missing (19 rows for 20"),
        (
            lambda rows: np.append(rows, rows[0]),
            "line {first} of folds.csv ({path}) is there twice",
        ),
        (lambda rows: np.append(rows, 999), "row 999 (from 0) is of another fold, or none (21"),
        (lambda rows: rows.reshape(4, 5), "an odd shape (20 rows for 20 of fold 1)"),
        (lambda rows: np.array(7), " is missing (1 rows for 20 of fold 1)"),
    ],
)
def test_the_row_that_is_not_there_once_is_named(
    complete: RunStore, tmp_path: Path, damage: object, says: str
) -> None:
    assert callable(damage)
    folder = tmp_path / "run" / "trials" / "c0000" / "fold1"
    rows = np.load(folder / "rows.npy")
    np.save(folder / "rows.npy", damage(rows))
    with pytest.raises(RunFolderError) as error:
        complete.oof("c0000", "raw")
    (problem,) = error.value.problems
    expected = says.format(first=rows[0] + 2, path=f"{rows[0]}.png")
    assert problem.where == f"{complete.root}/trials/c0000/fold1/rows.npy"
    assert expected in problem.message and "each scored row once" in problem.message


def test_every_fold_that_lacks_rows_is_listed(complete: RunStore, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "trials" / "c0000"
    damage_row_twice(folder / "fold0")
    damage_shorter(folder / "fold2")
    with pytest.raises(RunFolderError) as error:
        complete.true_prob("c0000", "raw")
    assert [p.where.rpartition("c0000/")[2] for p in error.value.problems] == [
        "fold0/rows.npy",
        "fold2/true_prob.npy",
    ]
    assert "its shape is (3,) for 10 rows" in error.value.problems[1].message


def test_swapped_lengths_are_noticed(complete: RunStore, tmp_path: Path) -> None:
    """The totals fit, the folds do not."""
    trials = tmp_path / "run" / "trials" / "c0000"
    first, second = trials / "fold0" / "true_prob.npy", trials / "fold1" / "true_prob.npy"
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    with pytest.raises(RunFolderError, match="does not hold each scored row once"):
        complete.true_prob("c0000", "raw")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"candidate": "c0000"}', b"null"])
def test_a_damaged_record_is_no_record_and_is_logged_once(
    complete: RunStore, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    complete.files.write("trials/c0000/fold1/trial.json", content)
    assert complete.trial("c0000", 1) is None
    assert sorted(complete.trials()) == [("c0000", 0), ("c0000", 2)]
    assert complete.summaries()[0].status == "unfinished"
    (line,) = caplog.messages
    assert line.startswith(f"{complete.root}/trials/c0000/fold1/trial.json is ignored: ")


def test_a_record_of_other_folds_is_no_record_and_is_logged_once(
    complete: RunStore, caplog: pytest.LogCaptureFixture
) -> None:
    complete.save_trial(trial_record(complete, 1, folds_hash="other"))
    assert complete.trial("c0000", 1) is complete.trial("c0000", 1) is None
    name = f"{complete.root}/trials/c0000/fold1/trial.json"
    assert caplog.messages == [f"{name} is ignored: it is of another folds.csv"]


def test_a_record_of_a_newer_version_is_read(complete: RunStore) -> None:
    name = "trials/c0000/fold1/trial.json"
    record = json.loads(complete.files.read(name)) | {"invented_later": [1]}
    complete.files.write(name, json.dumps(record).encode())
    assert complete.trial("c0000", 1) is not None


def test_strange_entries_among_the_trials_are_left_alone(
    complete: RunStore, tmp_path: Path
) -> None:
    trials = tmp_path / "run" / "trials"
    (trials / ".DS_Store").write_text("x")
    (trials / "c0000" / "fold_old").mkdir()
    (trials / "c0000" / "foldx").mkdir()
    assert len(complete.trials()) == 3
    assert len(complete.candidates()) == 1


def test_a_trial_without_its_record_does_not_count(store: RunStore, tmp_path: Path) -> None:
    """The record is written last: whatever a killed trial left before it is not read."""
    save_fold(store, 0, np.full((70, 3), 1 / 3, np.float32))
    store.files.delete("trials/c0000/fold0/trial.json")
    assert store.trials() == {}


def test_forgotten_trials_leave_nothing(complete: RunStore, tmp_path: Path) -> None:
    complete.forget_trial("c0000", 1)
    complete.forget_trial("c0000", 9)
    assert sorted(p.name for p in (tmp_path / "run/trials/c0000").iterdir()) == [
        "candidate.json",
        "fold0",
        "fold2",
    ]


def test_a_resume_state_stays_until_its_trial_has_ended(store: RunStore, tmp_path: Path) -> None:
    folder = tmp_path / "run/trials/c0000/fold1"
    assert store.resume_state("c0000", 1) is None
    store.save_resume_state("c0000", 1, memoryview(b"old"))
    store.save_resume_state("c0000", 1, b"new")
    store.save_trial(trial_record(store, 1, status="failed", error="boom"))
    (folder / ".part-0123-resume.safetensors").write_bytes(b"half")
    store.clear_trial("c0000", 1)
    assert [p.name for p in folder.iterdir()] == ["resume.safetensors"]
    assert store.resume_state("c0000", 1) == b"new"
    assert store.trials() == {}
    save_fold(store, 1, np.full((70, 3), 1 / 3, np.float32))
    assert store.resume_state("c0000", 1) is None
    store.clear_trial("c0000", 7)  # nothing there


def test_a_settled_candidates_states_go(store: RunStore) -> None:
    for candidate in ("c0000", "c0001"):
        for k in (0, 2):
            store.save_resume_state(candidate, k, b"state")
    store.forget_resume_states("c0000")
    states = [store.resume_state(c, k) for c in ("c0000", "c0001") for k in range(3)]
    assert states == [None, None, None, b"state", None, b"state"]


def test_removed_weights_leave_all_else(complete: RunStore, tmp_path: Path) -> None:
    assert complete.has_weights("c0000", "raw") and not complete.has_weights("c0000", "snap1")
    before = {p for p in (tmp_path / "run").rglob("*") if p.is_file()}
    complete.remove_weights("c0000", "ema")
    complete.remove_weights("c0000", "snap1")
    assert complete.has_weights("c0000", "raw") and not complete.has_weights("c0000", "ema")
    gone = before - {p for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert {p.name for p in gone} == {"best_ema.safetensors"} and len(gone) == 3


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("sweep.yaml", "config"),
        ("trials/c0000/candidate.json", "candidates"),
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


def test_not_a_number_cannot_be_recorded(store: RunStore) -> None:
    with pytest.raises(ValueError, match="finite"):
        VariantScore(rows=1, val_logloss=float("nan"), val_acc=0.0, best_epoch=0)


@pytest.mark.parametrize(
    ("statuses", "running", "expected"),
    [
        (("finished",) * 3, False, "complete"),
        (("finished",) * 2, False, "unfinished"),
        (("finished",) * 2, True, "running"),
        ((), True, "running"),
        (("finished", "finished", "failed"), False, "failed"),
        (("failed", "diverged"), True, "diverged"),
    ],
)
def test_status_of_a_candidate(
    store: RunStore, statuses: tuple[str, ...], running: bool, expected: str
) -> None:
    store.save_candidate(CandidateRecord(candidate="c0000", backbone="b", params=PARAMS))
    for k, status in enumerate(statuses):
        score = VariantScore(rows=10, val_logloss=1.0, val_acc=0.5, best_epoch=0)
        variants = {"raw": score} if status == "finished" else {}
        store.save_trial(trial_record(store, k, status=status, variants=variants))
    assert store.summaries(running)[0].status == expected


def decision(store: RunStore, fold: int, action: str, number: int = 0) -> RaceDecision:
    return RaceDecision(
        number=number, candidate="c0000", fold=fold, rule="gain", action=action,  # type: ignore[arg-type]
        folds_done=fold + 1, rows=10, gain=-0.5, gain_se=0.1, z=1.0, complete=5, epochs_trained=9,
        reason="gain -0.5000 ± 0.1000",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("statuses", "stops", "expected"),
    [
        (("finished",), True, "stopped"),
        (("finished", "finished", "finished"), True, "stopped"),  # one was in flight
        (("finished", "failed"), True, "stopped"),
        (("stopped",), False, "stopped"),
        (("stopped", "finished", "finished"), False, "stopped"),
        (("finished",), False, "unfinished"),
    ],
)
def test_who_was_stopped_stays_so(
    store: RunStore, statuses: tuple[str, ...], stops: bool, expected: str
) -> None:
    store.save_candidate(CandidateRecord(candidate="c0000", backbone="b", params=PARAMS))
    score = VariantScore(rows=10, val_logloss=1.0, val_acc=0.5, best_epoch=0)
    for k, status in enumerate(statuses):
        variants = {"raw": score} if status == "finished" else {}
        store.save_trial(trial_record(store, k, status=status, variants=variants))
    store.save_decision(decision(store, 0, "stop" if stops else "continue"))
    (summary,) = store.summaries()
    assert summary.status == expected
    assert (summary.gain, summary.gain_se) == (-0.5, 0.1)


def test_a_later_decision_takes_the_place_of_a_torn_or_older_one(
    complete: RunStore, caplog: pytest.LogCaptureFixture
) -> None:
    complete.save_decision(decision(complete, 1, "continue", number=3))
    complete.save_decision(decision(complete, 0, "continue", number=8))
    complete.files.write("trials/c0000/fold2/decision.json", b'{"number": 1, "cand')
    (summary,) = complete.summaries()
    assert [(d.number, d.fold) for d in summary.decisions] == [(3, 1), (8, 0)]
    (line,) = caplog.messages
    assert line.startswith(f"{complete.root}/trials/c0000/fold2/decision.json is ignored: ")
    complete.save_decision(decision(complete, 0, "stop", number=9))
    complete.save_decision(decision(complete, 2, "continue", number=10))
    assert [d.number for d in complete.summaries()[0].decisions] == [3, 9, 10]


def test_candidates_are_in_the_order_of_their_numbers(store: RunStore) -> None:
    names = ["c0002", "c9999", "c10000"]
    for name in reversed(names):
        store.save_candidate(CandidateRecord(candidate=name, backbone="b", params=PARAMS))
    assert [record.candidate for record in store.candidates()] == names


def test_rows_of_some_folds(complete: RunStore, prob: NDArray[np.float32]) -> None:
    complete.forget_trial("c0000", 1)
    fold = complete.folds().fold
    for folds in [(0,), (2, 0)]:
        found = np.exp(complete.oof_log_prob("c0000", "raw", folds))
        np.testing.assert_allclose(found, prob[np.isin(fold, folds)], rtol=6e-3)
    with pytest.raises(RunFolderError, match="fold 1"):
        complete.oof_log_prob("c0000", "raw", (0, 1))
    complete.files.write("trials/c0000/fold2/rows.npy", complete.files.read(
        "trials/c0000/fold0/rows.npy"
    ))  # fmt: skip
    with pytest.raises(RunFolderError, match="fold 2"):
        complete.oof_log_prob("c0000", "raw", (2,))


# -- the tables


def table(text: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text.decode())))


def test_leaderboard_is_the_contract_s_and_scores_pooled_rows(
    complete: RunStore, prob: NDArray[np.float32]
) -> None:
    complete.save_candidate(
        CandidateRecord(candidate="c0001", backbone="x", params={"dropout": 0.25})
    )
    complete.write_tables(complete.summaries())
    text = complete.files.read("leaderboard.csv")
    assert text.splitlines()[0].decode() == (
        "candidate,backbone,status,folds_done,variant,oof_logloss,oof_accuracy,last_fold_logloss,"
        "gain,gain_se,epochs_trained,seconds,hp.batch_size,hp.dropout,hp.lr"
    )
    first, second = table(text)
    labels = complete.labels()
    expected = {
        v: log_loss(labels, exact(p), labels=[0, 1, 2])
        for v, p in (("raw", prob), ("ema", sharpened(prob)))
    }
    better = min(expected, key=lambda v: expected[v])
    assert (first["candidate"], first["status"], first["folds_done"]) == ("c0000", "complete", "3")
    assert first["variant"] == better
    assert float(first["oof_logloss"]) == pytest.approx(expected[better], rel=1e-5)
    accuracy = accuracy_score(labels, prob.argmax(1))
    assert float(first["oof_accuracy"]) == pytest.approx(accuracy, rel=1e-5)
    last = complete.folds().fold == 2
    best_prob = prob if better == "raw" else sharpened(prob)
    last_loss = log_loss(labels[last], exact(best_prob)[last], labels=[0, 1, 2])
    assert float(first["last_fold_logloss"]) == pytest.approx(last_loss, rel=1e-5)
    assert (first["epochs_trained"], first["seconds"]) == ("12", "4.50")
    assert (first["hp.lr"], first["hp.batch_size"], first["hp.dropout"]) == ("0.001", "32", "")
    assert (second["candidate"], second["status"]) == ("c0001", "unfinished")
    assert second["oof_logloss"] == second["variant"] == ""


def test_trials_table_is_the_contract_s(complete: RunStore) -> None:
    complete.save_trial(
        trial_record(complete, 1, status="failed", error="x", node="n1", device="cpu")
    )
    complete.write_tables(complete.summaries())
    text = complete.files.read("trials.csv")
    assert text.splitlines()[0] == (
        b"candidate,fold,status,variant,val_logloss,best_epoch,epochs_trained,seconds,node,device"
    )
    rows = table(text)
    assert [(r["fold"], r["status"]) for r in rows] == [
        ("0", "finished"),
        ("1", "failed"),
        ("2", "finished"),
    ]
    assert (rows[1]["variant"], rows[1]["val_logloss"], rows[1]["node"]) == ("", "", "n1")
    record = complete.trial("c0000", 2)
    assert record is not None and record.best is not None
    assert rows[2]["variant"] == record.best
    assert float(rows[2]["val_logloss"]) == pytest.approx(
        record.variants[record.best].val_logloss, rel=1e-5
    )
    assert rows[2]["best_epoch"] == "2"


def test_ties_go_to_the_raw_variant(store: RunStore) -> None:
    score = VariantScore(rows=10, val_logloss=1.0, val_acc=0.5, best_epoch=0)
    variants = dict.fromkeys(("snap3", "ema", "raw"), score)
    assert trial_record(store, 0, variants=variants).best == "raw"


def test_leaderboard_puts_complete_candidates_first_and_the_best_of_them(
    complete: RunStore, prob: NDArray[np.float32]
) -> None:
    for candidate, p in (("c0001", None), ("c0002", sharpened(sharpened(prob)))):
        complete.save_candidate(CandidateRecord(candidate=candidate, backbone="b", params=PARAMS))
        for k in range(3 if p is not None else 0):
            save_fold(complete, k, prob if p is None else p, candidate)
    complete.write_tables(complete.summaries())
    rows = table(complete.files.read("leaderboard.csv"))
    losses = [float(r["oof_logloss"]) for r in rows if r["oof_logloss"]]
    assert losses == sorted(losses)
    assert rows[-1]["candidate"] == "c0001"


def test_differing_keys() -> None:
    old = config()
    new = old.model_copy(
        update={
            "search": old.search.model_copy(update={"space": {"lr": 0.1}, "candidates": 7}),
            "name": "b",
        }
    )
    assert differing_keys(old, new) == ["name", "search.candidates", "search.space.lr"]
    assert differing_keys(old, old) == []


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
