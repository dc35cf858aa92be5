"""Members of this and of other run folders, from real folders on disk."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from foldrace.core.errors import RunFolderError
from foldrace.ensemble.selection.members import other_runs, run_sources
from foldrace.run_folder.records import CandidateRecord
from foldrace.run_folder.store import RunStore
from tests.ensemble.made_runs import (
    CLASSES,
    FOLD,
    LABELS,
    ROWS,
    TABLE,
    Table,
    add_candidate,
    make_run,
    random_prob,
)


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    store = make_run(tmp_path / "run")
    add_candidate(store, "c0000", random_prob(0))
    add_candidate(store, "c0001", random_prob(1), variant="ema")
    return store


def test_members_are_the_variants_of_complete_candidates_with_weights(store: RunStore) -> None:
    add_candidate(store, "c0002", random_prob(2), folds=(0, 1))
    store.save_candidate(CandidateRecord(candidate="c0003", backbone="timm/x", params={}))
    add_candidate(store, "c0004", random_prob(4))
    store.files.delete("trials/c0004/fold1/best.safetensors")
    sources = run_sources(store)
    assert [(s.member.candidate, s.member.variant) for s in sources] == [
        ("c0000", "raw"),
        ("c0001", "ema"),
    ]
    assert {(s.member.backbone, s.member.run) for s in sources} == {("timm/x", "")}
    assert sources[1].where == f"{store.root}/trials/c0001/*/oof_ema.npy"


def test_arrays_are_those_of_the_store(store: RunStore) -> None:
    source = run_sources(store)[1]
    np.testing.assert_allclose(np.exp(source.log_prob()), random_prob(1), rtol=0.01)
    expected = random_prob(1)[np.arange(ROWS), LABELS].astype(np.float32)
    np.testing.assert_array_equal(source.true_prob(), expected)


@pytest.mark.parametrize("name", ["oof.npy", "true_prob.npy", "rows.npy"])
def test_the_fingerprint_follows_the_files(store: RunStore, name: str) -> None:
    before = [s.fingerprint for s in run_sources(store)]
    assert [s.fingerprint for s in run_sources(store)] == before
    assert len(set(before)) == 2
    path = Path(store.root) / "trials" / "c0000" / "fold1" / name
    data = path.read_bytes()
    store.files.write("trials/c0000/fold1/train_log.csv", b"epoch\n")
    assert [s.fingerprint for s in run_sources(store)] == before
    store.files.write(f"trials/c0000/fold1/{name}", data)  # a new file of the same size
    after = [s.fingerprint for s in run_sources(store)]
    assert after[0] != before[0] and after[1] == before[1]
    os.utime(path, (0, 0))
    assert run_sources(store)[0].fingerprint not in (before[0], after[0])


def test_members_of_another_run_say_where_they_are(store: RunStore, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other")
    add_candidate(other, "c0000", random_prob(9))
    (source,) = other_runs(store, [f"{tmp_path}/./other"])
    assert source.member.run == other.root
    assert source.member != run_sources(store)[0].member
    np.testing.assert_allclose(np.exp(source.log_prob()), random_prob(9), rtol=0.01)


ANOTHER_FOLD, ANOTHER_LABEL = FOLD.copy(), LABELS.copy()
ANOTHER_FOLD[[4, 5]] = (FOLD[4] + 1) % 3, FOLD[4]
ANOTHER_LABEL[6] = (LABELS[6] + 1) % 3


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (replace(TABLE, classes=("a", "c", "b")), "class 1 is 'c' here and 'b' there"),
        (replace(TABLE, classes=(*CLASSES, "d")), "class 3 is 'd' here and missing there"),
        (
            replace(TABLE, paths=("x.png", *TABLE.paths[1:])),
            "the image in line 2 of folds.csv is 'x.png' here and '0.png' there",
        ),
        (
            replace(TABLE, labels=ANOTHER_LABEL),
            f"the target in line 8 of folds.csv is '{CLASSES[ANOTHER_LABEL[6]]}' here and "
            f"'{CLASSES[LABELS[6]]}' there",
        ),
        (
            replace(TABLE, fold=ANOTHER_FOLD),
            f"the fold in line 6 of folds.csv is {ANOTHER_FOLD[4]} here and {FOLD[4]} there",
        ),
        (
            replace(TABLE, groups=("g",) * ROWS),
            "the group in line 2 of folds.csv is 'g' here and missing there",
        ),
        (
            Table(FOLD[:60], LABELS[:60], TABLE.paths[:60], groups=("",) * 60),
            "folds.csv has 60 rows here and 90 there",
        ),
    ],
)
def test_a_run_that_does_not_fit_names_the_first_difference(
    store: RunStore, tmp_path: Path, table: Table, says: str
) -> None:
    other = make_run(tmp_path / "other", table)
    with pytest.raises(RunFolderError) as caught:
        other_runs(store, [other.root])
    (problem,) = caught.value.problems
    assert problem.where == other.root
    assert problem.message.startswith(f"cannot be blended with {store.root}: {says}; allowed")
    assert caught.value.exit_code == 2


def test_every_run_that_does_not_fit_is_listed(store: RunStore, tmp_path: Path) -> None:
    empty = make_run(tmp_path / "empty")
    add_candidate(empty, "c0000", random_prob(0), folds=(0, 1))
    sound = make_run(tmp_path / "sound")
    add_candidate(sound, "c0000", random_prob(9))
    roots = [empty.root, f"{tmp_path}/nothing", sound.root, sound.root, store.root]
    with pytest.raises(RunFolderError) as caught:
        other_runs(store, roots)
    assert [str(p) for p in caught.value.problems] == [
        f"{empty.root}: has no complete candidate with its weights; first `resume {empty.root}`",
        f"{tmp_path}/nothing: is no run folder (it has no sweep.yaml); `run CONFIG` makes one",
        f"{sound.root}: is named twice; name each further run once",
        f"{store.root}: is named twice; name each further run once",
    ]
