"""Fold trials of other folds or settings, changed data, and damaged small files."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from foldrace.config.schema import DataConfig, FoldsConfig, SweepConfig
from foldrace.core.errors import DataError, RunFolderError
from foldrace.dataset import left_out
from foldrace.dataset.curation import MERGED, merged_json
from foldrace.dataset.folds import folds_csv, make_folds
from foldrace.dataset.left_out import LeftOut, left_out_csv
from foldrace.dataset.manifest import read_manifest
from foldrace.dataset.places import common_root, with_root
from foldrace.run_folder.belonging import (
    require_own_trials,
    save_image_sizes,
    strange_trials,
    trained_settings,
    training_data,
)
from foldrace.run_folder.records import CandidateRecord
from foldrace.run_folder.store import RunStore
from foldrace.run_folder.trial_record import trial_record as made_record
from tests.run_folder.stored_runs import CLASSES, PARAMS, trial_record


def changed(store: RunStore, section: str, **values: object) -> None:
    """Change sweep.yaml as an editor would."""
    config = store.config()
    part = getattr(config, section).model_copy(update=values)
    store.save_config(config.model_copy(update={section: part}))


def test_what_may_be_extended_and_where_data_lie_is_no_setting(store: RunStore) -> None:
    settings = trained_settings(store.config())
    assert {"training.image_size", "folds.k", "search.seed", "data.image_column"} <= set(settings)
    for key in ("search.candidates", "race.rule", "data.train", "data.test_images", "name"):
        assert key not in settings
    assert json.loads(json.dumps(settings)) == settings


def test_trials_of_other_settings_are_named_with_both_values(store: RunStore) -> None:
    candidate = CandidateRecord(candidate="c0000", backbone="timm/resnet18", params=PARAMS)
    for fold, status in enumerate(("finished", "diverged", "failed")):
        store.save_trial(made_record(store, candidate, fold, status))  # type: ignore[arg-type]
    assert require_own_trials(store) == store.stored_trials()
    changed(store, "search", candidates=7)
    changed(store, "data", train="/elsewhere/train.csv")
    require_own_trials(store)
    before = store.config().training.image_size
    changed(store, "training", image_size=96)
    changed(store, "folds", seed=9)
    with pytest.raises(RunFolderError) as error:
        require_own_trials(store)
    trials = "2 fold trials that ended (c0000 fold0, c0000 fold1) were trained with"
    remedy = "put that back, or start a new run"
    assert [str(problem) for problem in error.value.problems] == [
        f"{store.root}/sweep.yaml: folds.seed is 9, but {trials} 42; {remedy}",
        f"{store.root}/sweep.yaml: training.image_size is 96, but {trials} {before}; {remedy}",
    ]
    assert strange_trials(store, store.stored_trials().values(), folds_alone=True) == []


def test_keys_of_another_version_are_no_difference(store: RunStore) -> None:
    settings = trained_settings(store.config()) | {"training.invented_later": 3}
    del settings["training.image_size"]
    store.save_trial(trial_record(store, 0, settings=settings))
    store.save_trial(trial_record(store, 1))  # of an older version
    require_own_trials(store)


def test_trials_of_other_folds_are_named(complete: RunStore) -> None:
    complete.save_trial(trial_record(complete, 1, folds_hash="other"))
    complete.save_trial(trial_record(complete, 2, folds_hash="other", status="failed"))
    with pytest.raises(RunFolderError) as error:
        require_own_trials(complete, folds_alone=True)
    assert str(error.value) == (
        f"{complete.root}/folds.csv: is not the one that 1 fold trial that ended (c0000 fold1) "
        "were trained on; put that one back, or start a new run"
    )


@pytest.mark.parametrize("content", [b"", b'{"candidate": "c00', b"null"])
def test_a_damaged_candidate_is_made_anew_of_its_trials(
    complete: RunStore, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    whole = complete.candidate("c0000")
    name = "trials/c0000/candidate.json"
    complete.files.write(name, content)
    complete.files.write("trials/c0000/fold0/trial.json", b"{")
    assert complete.candidates() == [whole] and complete.candidate("c0000") == whole
    expected = f"{complete.root}/{name} is ignored: it is damaged; c0000 is what trial.json of its"
    assert any(line == f"{expected} fold 1 says" for line in caplog.messages)
    assert complete.files.read(name) == content  # readers write nothing
    complete.mend()
    assert RunStore.open(complete.root).candidate("c0000") == whole
    assert complete.files.read(name) != content


def test_a_damaged_candidate_without_trials_is_left_out(
    complete: RunStore, caplog: pytest.LogCaptureFixture
) -> None:
    name = "trials/c0001/candidate.json"
    complete.files.write(name, b"{")
    complete.save_resume_state("c0001", 0, b"state")
    assert [s.candidate.candidate for s in complete.summaries()] == ["c0000"]
    assert caplog.messages == [
        f"{complete.root}/{name} is ignored: it is damaged, and no trial.json says what c0001 is: "
        "c0001 is left out"
    ]
    with pytest.raises(RunFolderError, match=r"c0001/candidate\.json: is damaged, and no"):
        complete.candidate("c0001")
    # A new candidate of that name goes on from nothing of it.
    complete.save_candidate(CandidateRecord(candidate="c0001", backbone="b", params=PARAMS))
    assert complete.resume_state("c0001", 0) is None
    assert [record.candidate for record in complete.candidates()] == ["c0000", "c0001"]


@pytest.mark.parametrize("content", [b"", b'["a", "', b"{}", b'["a", "a"]', b"\xff", None])
def test_damaged_classes_are_those_of_the_folds(
    complete: RunStore, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    order = tuple(sorted(CLASSES))  # as the manifest has them; these tests' own order is another
    complete.files.delete("classes.json")
    if content is not None:
        complete.files.write("classes.json", content)
    assert complete.classes() == order
    assert caplog.messages == [
        f"{complete.root}/classes.json is ignored: it is damaged; the classes are those of "
        "folds.csv"
    ]
    complete.mend()
    assert json.loads(complete.files.read("classes.json")) == list(order)


def test_classes_are_not_made_of_folds_that_nobody_trained_on(complete: RunStore) -> None:
    complete.files.write("classes.json", b"[")
    complete.save_trial(trial_record(complete, 1, folds_hash="other"))
    with pytest.raises(RunFolderError, match=r"classes\.json: is damaged, and folds\.csv, which"):
        complete.classes()


@pytest.mark.parametrize("keep", [0, 20, 61])
def test_damaged_folds_are_named_with_their_path(complete: RunStore, keep: int) -> None:
    complete.files.write("folds.csv", complete.files.read("folds.csv")[:keep])
    with pytest.raises(RunFolderError) as error:
        RunStore.open(complete.root).summaries()
    (problem,) = error.value.problems
    assert problem.where == f"{complete.root}/folds.csv"
    assert problem.message.startswith("is damaged: ") and "foldrace split" in problem.message


# -- the data

NAMES = ("b", "a", "c")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A table and its images, which are never decoded here."""
    folder = tmp_path / "data"
    (folder / "img").mkdir(parents=True)
    rows = []
    for i in range(30):
        (folder / f"img/{i}.png").write_bytes(bytes(100 + i))
        rows.append([f"{i}.png", NAMES[i % 3], f"g{i // 3 % 5}", str(i // 3 % 5 % 2)])
    write_table(folder, rows)
    return folder


def write_table(folder: Path, rows: list[list[str]]) -> None:
    with (folder / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image_path", "target", "group", "part"], *rows])


def read_table(folder: Path) -> list[list[str]]:
    with (folder / "train.csv").open(newline="") as file:
        return list(csv.reader(file))[1:]


@pytest.fixture
def begun(tmp_path: Path, data: Path) -> RunStore:
    """A run that has begun on them, with groups and given folds."""
    config = SweepConfig(
        name="begun",
        data=DataConfig(
            train=str(data / "train.csv"), train_images=str(data / "img"), group_column="group"
        ),
        folds=FoldsConfig(k=2, column="part"),
        search={"backbones": ("timm/resnet18",)},  # type: ignore[arg-type]
    )
    manifest = read_manifest(config.data, "part")
    store = RunStore(tmp_path / "run")
    store.create(config, folds_csv(manifest, make_folds(manifest, config.folds)), manifest.classes)
    save_image_sizes(store, manifest)
    return store


def problems_of(store: RunStore) -> list[str]:
    with pytest.raises((RunFolderError, DataError)) as error:
        training_data(store)
    return [str(problem) for problem in error.value.problems]


def test_the_data_as_they_were(begun: RunStore) -> None:
    assert training_data(begun).image_paths == begun.folds().image_paths


def test_changed_labels_are_named_with_their_lines(begun: RunStore, data: Path) -> None:
    rows = read_table(data)
    for i in range(24):
        rows[i][1] = {"a": "b", "b": "c", "c": "a"}[rows[i][1]]
    write_table(data, rows)
    *shown, last = problems_of(begun)
    assert len(shown) == 20
    assert shown[0] == f"{data}/train.csv line 2: 0.png: the label is 'c', was 'b'"
    assert shown[4] == f"{data}/train.csv line 6: 4.png: the label is 'b', was 'a'"
    assert last.startswith(
        f"{begun.root}/folds.csv: has another label than {data}/train.csv in 24 of 30 rows"
    )


def test_changed_groups_and_given_folds_are_named(begun: RunStore, data: Path) -> None:
    rows = read_table(data)
    for row in rows:
        if row[2] == "g1":
            row[2], row[3] = "g9", "0"
    write_table(data, rows)
    found = problems_of(begun)
    assert f"{data}/train.csv line 5: 3.png: the group is 'g9', was 'g1'" in found
    assert f"{data}/train.csv line 5: 3.png: the fold is 0, was 1" in found
    assert sum("in 6 of 30 rows, since" in line for line in found) == 2


def test_rows_that_came_or_went_are_named(begun: RunStore, data: Path) -> None:
    rows = read_table(data)
    write_table(data, [*rows[1:], ["new.png", "a", "g0", "0"]])
    (data / "img/new.png").write_bytes(b"x")
    (line,) = problems_of(begun)
    assert "lists 30 images, but" in line
    assert "now gives 30, without 0.png, with new.png as well; put the data back" in line
    write_table(data, rows[::-1])
    assert "now gives 30, in another order;" in problems_of(begun)[0]


def test_images_of_another_size_are_named(begun: RunStore, data: Path) -> None:
    (data / "img/4.png").write_bytes(bytes(7))
    (data / "img/9.png").unlink()
    found = problems_of(begun)
    text = "gone, or of another size than when the run began"
    assert found[:2] == [
        f"{data}/train.csv line 6: 4.png: {text}", f"{data}/train.csv line 11: 9.png: {text}"
    ]  # fmt: skip
    assert found[2].startswith(f"training images in {data}/img: 2 of 30 are not those")
    begun.files.delete("image_sizes.npy")  # of an older version
    assert len(training_data(begun)) == 30


def test_moved_data_are_found_below_another_root(begun: RunStore, data: Path) -> None:
    place = shutil.move(data, data.parent / "moved")
    found = problems_of(begun)
    assert found[-1] == (
        f"{begun.root}/sweep.yaml: data.train is gone: where the data have moved, `--data-root "
        f"DIR` names the folder that they now have in place of {data}, `--set data.train=PATH` a "
        "single place"
    )
    begun.use_data(with_root(begun.config().data, str(place)))
    assert training_data(begun).file(3) == Path(place) / "img/3.png"
    assert RunStore.open(begun.root).config().data.train == str(data / "train.csv")


@pytest.mark.parametrize(
    ("places", "root"),
    [
        ({"train": "/d/train.csv"}, "/d"),
        ({"train": "/d/photos"}, "/d/photos"),
        ({"train": "/d/all.zip", "test": "/d/all.zip"}, "/d"),
        ({"train": "/d/train.csv", "train_images": "/d/img"}, "/d"),
        ({"train": "/d/a/train.csv", "test": "/d/b/test.csv"}, "/d"),
        ({"train": "/d", "test": "/d/test"}, "/d"),
        ({"train": "/d/train", "test": "/e/test"}, "/"),
    ],
)
def test_common_root(places: dict[str, str], root: str) -> None:
    data = DataConfig(**places)  # type: ignore[arg-type]
    assert common_root(data) == root
    assert common_root(data.model_copy(update={"exclude": "/home/me/list.csv"})) == root
    there = with_root(data, "/new/place")
    for key, path in places.items():
        assert getattr(there, key) == str(Path("/new/place") / Path(path).relative_to(root))


def test_lists_move_with_the_data_that_they_lie_among() -> None:
    data = DataConfig(train="/d/a/train.csv", exclude="/d/a/list.csv", fixes="/home/me/fixes.csv")
    there = with_root(data, "/new")
    assert (there.train, there.exclude) == ("/new/train.csv", "/new/list.csv")
    assert there.fixes == "/home/me/fixes.csv"


# -- what was left out, and what was put together


def test_what_was_left_out_stays_left_out(begun: RunStore, data: Path) -> None:
    """Images that have been repaired since, and one that a folder's reader knows now."""
    rows = read_table(data)
    gone = (
        LeftOut("new.png", "training", "missing or unreadable", "it does not exist"),
        LeftOut("3.png", "test", "missing or unreadable"),
        LeftOut("4.png", "training", "listed twice"),  # the other of its two rows stays
    )
    begun.files.write(left_out.NAME, left_out_csv(gone))
    write_table(data, [rows[0], ["new.png", "a", "g0", "0"], *rows[1:]])
    (data / "img/new.png").write_bytes(b"x")
    manifest = training_data(begun)
    assert manifest.image_paths == begun.folds().image_paths
    assert manifest.lines is not None and manifest.lines[:3] == (2, 4, 5)
    begun.files.write(left_out.NAME, left_out_csv(()))
    assert "with new.png as well; put the data back" in problems_of(begun)[0]


def test_groups_that_copies_have_joined(begun: RunStore, data: Path) -> None:
    """g1 and g3 share a pair of copies, so that they are g1 in the run."""
    config = begun.config()
    keys = config.data.model_dump() | {"duplicates": "group"}
    update = {"data": DataConfig(**keys), "folds": FoldsConfig(k=2)}
    begun.save_config(config.model_copy(update=update))
    text = begun.files.read("folds.csv").decode().replace(",g3,", ",g1,")
    begun.files.write("folds.csv", text.encode())
    begun = RunStore.open(begun.root)
    assert training_data(begun).groups is not None
    rows = read_table(data)
    rows[9][2] = "g2"  # was g3
    write_table(data, rows)
    assert f"{data}/train.csv line 11: 9.png: the group is 'g2', was 'g1'" in problems_of(begun)


def test_merged_classes_of_a_run(begun: RunStore) -> None:
    assert begun.merged() == {}
    assert begun.own_classes() == begun.classes() == ("a", "b", "c")
    begun.files.write(MERGED, merged_json({"b": {"x": 3, "B": 1}}))
    assert begun.own_classes() == ("a", "B", "c", "x")
    begun.files.write(MERGED, b"{}x")
    with pytest.raises(RunFolderError, match=r"merged_classes\.json: is damaged"):
        begun.merged()
