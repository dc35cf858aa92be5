"""Candidates, fold trials and decisions: what counts, what is ignored, what is removed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from foldrace.run_folder.records import (
    CandidateRecord,
    RaceDecision,
    VariantScore,
)
from foldrace.run_folder.store import RunStore
from tests.run_folder.stored_runs import (
    PARAMS,
    save_fold,
    trial_record,
)


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


def test_not_a_number_cannot_be_recorded(store: RunStore) -> None:
    with pytest.raises(ValueError, match="finite"):
        VariantScore(rows=1, val_logloss=float("nan"), calibrated_logloss=1.0, val_acc=0.0, epoch=0)


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
    (folder / ".part-0123-resume.pt").write_bytes(b"half")
    store.clear_trial("c0000", 1)
    assert [p.name for p in folder.iterdir()] == ["resume.pt"]
    assert store.resume_state("c0000", 1) == b"new"
    assert store.trials() == {}
    save_fold(store, 1, np.full((70, 3), 1 / 3, np.float32))
    assert store.resume_state("c0000", 1) is None
    store.clear_trial("c0000", 7)  # nothing there


def test_an_attempt_leaves_to_the_next_one_what_it_goes_on_from(
    store: RunStore, tmp_path: Path
) -> None:
    """Its state, its log, its columns at the rungs and the decision about it, and nothing else."""
    columns = {"raw": np.linspace(0, 1, 20, dtype=np.float32), "ema": np.ones(20, np.float32)}
    save_fold(store, 1, np.full((70, 3), 1 / 3, np.float32))
    store.files.delete("trials/c0000/fold1/trial.json")  # killed before it was written
    store.save_resume_state("c0000", 1, b"state")
    store.save_rung("c0000", 1, 8, "epoch\n0\n", columns)
    store.save_decision(decision(store, 1, "park"))
    store.clear_trial("c0000", 1)
    folder = tmp_path / "run/trials/c0000/fold1"
    kept = {"resume.pt", "train_log.csv", "rung8.safetensors", "decision.json"}
    assert {path.name for path in folder.iterdir()} == kept
    assert store.train_log("c0000", 1) == "epoch\n0\n"


def test_columns_of_a_rung_are_those_that_were_saved(store: RunStore, tmp_path: Path) -> None:
    columns = {"raw": np.linspace(0, 1, 20, dtype=np.float32), "ema": np.ones(20, np.float32)}
    store.save_rung("c0000", 1, 8, "epoch\n0\n", columns)
    store.save_rung("c0000", 1, 15, "epoch\n0\n1\n", {"raw": np.zeros(20, np.float32)})
    found = store.rung_columns("c0000", 1, 8, 20)
    assert found.keys() == columns.keys()
    for variant, column in columns.items():
        assert found[variant].dtype == np.float32
        np.testing.assert_array_equal(found[variant], column)
    assert list(store.rung_columns("c0000", 1, 15, 20)) == ["raw"]
    assert store.train_log("c0000", 1) == "epoch\n0\n1\n"
    assert store.rung_columns("c0000", 1, 9, 20) == {}  # no such rung
    assert store.rung_columns("c0000", 1, 8, 21) == {}  # of other folds
    file = tmp_path / "run/trials/c0000/fold1/rung8.safetensors"
    whole = file.read_bytes()
    for damaged in (b"", whole[:-4], b"x" * len(whole)):
        file.write_bytes(damaged)
        assert store.rung_columns("c0000", 1, 8, 20) == {}


def test_the_size_of_a_resume_state_is_that_of_its_file(store: RunStore) -> None:
    assert store.resume_state_bytes("c0000", 0) == 0
    store.save_resume_state("c0000", 0, b"12345")
    assert store.resume_state_bytes("c0000", 0) == 5


def test_a_settled_candidates_states_go(store: RunStore) -> None:
    for candidate in ("c0000", "c0001"):
        for k in (0, 2):
            store.save_resume_state(candidate, k, b"state")
    store.forget_resume_states("c0000")
    states = [store.resume_state(c, k) for c in ("c0000", "c0001") for k in range(3)]
    assert states == [None, None, None, b"state", None, b"state"]


def test_bytes_of_the_weights_are_those_of_all_folds(complete: RunStore) -> None:
    assert complete.weight_bytes("c0000", "raw") == 3 * len(b"raw weights")
    assert complete.weight_bytes("c0000", "ema") == 3 * len(b"ema weights")


def test_removed_weights_leave_all_else(complete: RunStore, tmp_path: Path) -> None:
    assert complete.has_weights("c0000", "raw") and not complete.has_weights("c0000", "snap1")
    before = {p for p in (tmp_path / "run").rglob("*") if p.is_file()}
    complete.remove_weights("c0000", "ema")
    complete.remove_weights("c0000", "snap1")
    assert complete.has_weights("c0000", "raw") and not complete.has_weights("c0000", "ema")
    gone = before - {p for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert {p.name for p in gone} == {"best_ema.safetensors"} and len(gone) == 3


def test_candidates_are_in_the_order_of_their_numbers(store: RunStore) -> None:
    names = ["c0002", "c9999", "c10000"]
    for name in reversed(names):
        store.save_candidate(CandidateRecord(candidate=name, backbone="b", params=PARAMS))
    assert [record.candidate for record in store.candidates()] == names


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
        score = VariantScore(rows=10, val_logloss=1.0, calibrated_logloss=1.0, val_acc=0.5, epoch=0)
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
    score = VariantScore(rows=10, val_logloss=1.0, calibrated_logloss=1.0, val_acc=0.5, epoch=0)
    for k, status in enumerate(statuses):
        variants = {"raw": score} if status == "finished" else {}
        store.save_trial(trial_record(store, k, status=status, variants=variants))
    store.save_decision(decision(store, 0, "stop" if stops else "continue"))
    (summary,) = store.summaries()
    assert summary.status == expected
    assert (summary.gain, summary.gain_se) == (-0.5, 0.1)


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize(
    ("statuses", "actions", "expected"),
    [
        ((), ["park"], "parked"),  # in its first fold
        (("finished",), ["park"], "parked"),  # between two folds
        (("finished",), ["park", "continue"], ""),  # it goes on
        (("finished", "finished"), ["continue", "park"], "parked"),
        (("failed",), ["park"], "failed"),
        (("finished", "diverged"), ["park"], "diverged"),
        (("finished",), ["park", "stop"], "stopped"),
        (("finished",), ["stop", "park"], "stopped"),  # for ever
        (("finished",) * 3, ["park"], "complete"),
    ],
)
def test_who_is_parked(
    store: RunStore, statuses: tuple[str, ...], actions: list[str], expected: str, running: bool
) -> None:
    """The same whether the sweep goes on or not; the latest decision counts."""
    store.save_candidate(CandidateRecord(candidate="c0000", backbone="b", params=PARAMS))
    for k, status in enumerate(statuses):
        store.save_trial(trial_record(store, k, status=status))
    for k, action in enumerate(actions):
        store.save_decision(decision(store, k, action, number=k))
    (summary,) = store.summaries(running)
    assert summary.status == (expected or ("running" if running else "unfinished"))
    assert summary.settled == (summary.status not in ("parked", "running", "unfinished"))


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
