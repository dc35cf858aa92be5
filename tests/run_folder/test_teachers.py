"""Teachers in a run folder: what is written is read back, and no other fold's array is."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from foldrace.core.errors import RunFolderError
from foldrace.run_folder.records import CandidateRecord, TeacherKind, TeacherRef, TrialRecord
from foldrace.run_folder.store import RunStore
from foldrace.run_folder.tables import leaderboard_csv
from foldrace.run_folder.teachers import FoldTeacher, TeacherModel, TeacherRecord, rows_digest
from tests.run_folder.stored_runs import CLASSES, new_store, save_fold, trial_record

FOLD = np.arange(12) % 3
IMAGES = ("/photos/a, b.png", "/photos/사진.png")


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return new_store(tmp_path / "run", FOLD)


def record(
    store: RunStore, kind: TeacherKind = "blend", model_fold: int | None = None, extra: int = 0
) -> TeacherRecord:
    """`model_fold` None: the models of each fold itself."""
    folds = [
        FoldTeacher(
            fold=k,
            models=(
                TeacherModel(
                    candidate="c0000", variant="raw", fold=k if model_fold is None else model_fold,
                    weight=1, temperature=1, weights_digest="",
                ),
            ),
            method="greedy",
            blend_temperature=1,
            chosen_on=8,
            rows_digest=rows_digest(store.folds(), k, extra),
            array_digest="",
        )
        for k in range(3)
    ]  # fmt: skip
    return TeacherRecord(
        kind=kind, folds_hash=store.folds().hash, folds=tuple(folds), unlabelled=extra
    )


def arrays(extra: int = 0) -> dict[int, NDArray[np.float16]]:
    """Each fold says with certainty which fold it is."""
    found = {}
    for fold in range(3):
        prob = np.full((8 + extra, len(CLASSES)), 0.05)
        prob[:, fold] = 0.9
        found[fold] = np.log(prob).astype(np.float16)
    return found


def saved(store: RunStore) -> TeacherRef:
    return store.teachers.save(record(store), arrays())


def folder(store: RunStore, teacher: TeacherRef) -> Path:
    return Path(store.root) / "teachers" / teacher.digest


def test_what_is_written_is_read_back(store: RunStore) -> None:
    teacher = store.teachers.save(record(store, extra=2), arrays(2), IMAGES)
    assert (teacher.kind, teacher.unlabelled) == ("blend", 2)
    for fold, array in arrays(2).items():
        read = store.teachers.log_prob(teacher.digest, fold, store.folds())
        np.testing.assert_array_equal(read, array)
    assert store.teachers.images(teacher.digest) == IMAGES
    assert store.teachers.problems(teacher.digest, store.folds()) == []


def test_the_same_teacher_is_found_again_another_is_not(store: RunStore) -> None:
    teacher = store.teachers.save(record(store, extra=2), arrays(2), IMAGES)
    assert store.teachers.find(record(store, extra=2), IMAGES) == teacher
    assert store.teachers.find(record(store, extra=2), IMAGES[::-1]) is None
    assert store.teachers.find(record(store)) is None
    assert store.teachers.find(record(store, "best", extra=2), IMAGES) is None


def test_the_array_of_another_fold_is_refused_by_name(store: RunStore) -> None:
    """The leak that matters: fold 1's teacher has seen every label of fold 0."""
    teacher = saved(store)
    place = folder(store, teacher)
    (place / "fold0.npy").write_bytes((place / "fold1.npy").read_bytes())
    with pytest.raises(RunFolderError, match="fold 1, whose teacher has seen labels of fold 0"):
        store.teachers.log_prob(teacher.digest, 0, store.folds())
    [problem] = store.teachers.problems(teacher.digest, store.folds())
    assert problem.where.endswith("fold0.npy")


def test_a_leak_whose_record_was_made_to_fit_is_refused(store: RunStore) -> None:
    """Digests put right and all: then the record is no longer the one that students name."""
    teacher = saved(store)
    place = folder(store, teacher)
    planted = (place / "fold1.npy").read_bytes()
    (place / "fold0.npy").write_bytes(planted)
    file = place / "teacher.json"
    text = json.loads(file.read_bytes())
    text["folds"][0]["array_digest"] = hashlib.sha256(planted).hexdigest()
    file.write_text(json.dumps(text), encoding="utf-8")
    with pytest.raises(RunFolderError, match="has changed since its students' records"):
        store.teachers.log_prob(teacher.digest, 0, store.folds())


def test_models_of_another_fold_are_no_honest_teacher(store: RunStore) -> None:
    with pytest.raises(RunFolderError) as caught:
        store.teachers.save(record(store, model_fold=1), arrays())
    assert len(caught.value.problems) == 2  # of folds 0 and 2
    assert "would leak" in str(caught.value)
    assert store.files.names("teachers") == []


def test_best_fold_may_but_is_marked(store: RunStore) -> None:
    teacher = store.teachers.save(record(store, "best-fold", model_fold=1), arrays())
    assert teacher.is_optimistic
    assert not saved(store).is_optimistic
    assert str(teacher) == "best-fold (optimistic)"


def test_another_folds_csv_is_refused(store: RunStore, tmp_path: Path) -> None:
    teacher = saved(store)
    other = new_store(tmp_path / "other", np.roll(FOLD, 1))
    with pytest.raises(RunFolderError, match=r"another folds\.csv"):
        store.teachers.log_prob(teacher.digest, 0, other.folds())


@pytest.mark.parametrize("file", ["fold2.npy", "teacher.json", "unlabelled.csv"])
def test_a_damaged_or_lost_file_is_named(store: RunStore, file: str) -> None:
    teacher = store.teachers.save(record(store, extra=2), arrays(2), IMAGES)
    path = folder(store, teacher) / file
    path.write_bytes(path.read_bytes()[:-3])
    found = store.teachers.problems(teacher.digest, store.folds())
    assert found and all(problem.where.endswith(file) for problem in found)
    path.unlink()
    found = store.teachers.problems(teacher.digest, store.folds())
    assert found and all(problem.where.endswith(file) for problem in found)


def test_a_student_s_teacher_is_on_the_leaderboard_and_outlives_its_candidate_json(
    store: RunStore,
) -> None:
    teacher = store.teachers.save(record(store, "best-fold", model_fold=1), arrays())
    student = CandidateRecord(
        candidate="c0000", backbone="timm/resnet18", params={"lr": 1e-3}, teacher=teacher
    )
    store.save_candidate(student)
    prob = np.full((12, 3), 1 / 3, dtype=np.float32)
    for fold in range(3):
        ended = save_fold(store, fold, prob)
        taught = ended.model_copy(update={"teacher": teacher, "attempt": ""})
        path = Path(store.root) / f"trials/c0000/fold{fold}/trial.json"
        path.write_text(TrialRecord.model_validate(taught).model_dump_json(), encoding="utf-8")
    [summary] = store.summaries()
    assert summary.status == "complete" and not summary.is_member
    assert ",best-fold (optimistic)," in leaderboard_csv([summary])
    (Path(store.root) / "trials/c0000/candidate.json").write_text("{", encoding="utf-8")
    assert RunStore(store.root).candidate("c0000") == student.model_copy(
        update={"params": trial_record(store, 0).params}
    )
