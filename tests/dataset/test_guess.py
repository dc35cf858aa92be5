"""What is taken for what in folders, zips and tables as people have them, and what is asked where
there are several readings. The guess is checked by the readers of the data, too."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from foldrace.config.schema import DataConfig
from foldrace.core.errors import DataError
from foldrace.dataset.guess import DataGuess, class_folders, guess_data
from foldrace.dataset.manifest import Manifest, read_manifest
from foldrace.dataset.test_set import read_test_set

ROWS = 12
KINDS = ("cat", "dog", "owl")


def touch(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def save(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def pack(path: Path, names: Iterable[str]) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, name)


def files(prefix: str = "train", suffix: str = ".jpg", count: int = ROWS) -> list[str]:
    return [f"{prefix}/im{i:02d}{suffix}" for i in range(count)]


def by_class(prefix: str = "") -> list[str]:
    return [f"{prefix}{kind}/{i}.png" for kind in KINDS for i in range(4)]


def kinds(count: int = ROWS) -> list[str]:
    return [KINDS[i % 3] for i in range(count)]


def guessed(source: Path, **given: object) -> DataGuess:
    return guess_data(source, given)


def manifest(guess: DataGuess) -> Manifest:
    """The training rows that the guess leads to, every one of them a file."""
    column = guess.folds.get("column")
    found = read_manifest(
        DataConfig.model_validate(guess.data), None if column is None else str(column)
    )
    assert all(found.file(row).is_file() for row in range(len(found)))
    return found


def problems(source: Path, **given: object) -> str:
    with pytest.raises(DataError) as error:
        guessed(source, **given)
    return str(error.value)


def simple(folder: Path, *columns: str, **cells: Sequence[object]) -> Path:
    """train.csv over train/im00.jpg ..., with a column `image` and those given."""
    touch(folder, files())
    rows = zip(files(), *(cells[name] for name in columns), strict=True)
    save(folder / "train.csv", ["image", *columns], rows)
    return folder


@pytest.mark.parametrize("wrapped", ["", "data/", "data/train/", "a/b/"])
def test_a_folder_per_class(wrapped: str, tmp_path: Path) -> None:
    touch(tmp_path, by_class(wrapped))
    rows = manifest(guessed(tmp_path))
    assert rows.classes == KINDS
    assert len(rows) == ROWS


@pytest.mark.parametrize("wrapped", ["", "train/", "a/b/"])
def test_a_zip_of_a_folder_per_class(wrapped: str, tmp_path: Path) -> None:
    pack(tmp_path / "photos.zip", by_class(wrapped))
    guess = guessed(tmp_path / "photos.zip")
    assert guess.data == {"train": str(tmp_path / "photos.zip")}
    assert manifest(guess).classes == KINDS


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    names = [f"{kind}/{i}.jpg" for kind in ("bus", "train", "tram") for i in range(3)]
    touch(tmp_path, names)
    assert manifest(guessed(tmp_path)).classes == ("bus", "train", "tram")


def test_folders_for_training_and_validation(tmp_path: Path) -> None:
    touch(tmp_path, [*by_class("train/"), *by_class("val/")])
    guess = guessed(tmp_path)
    assert guess.data == {"train": str(tmp_path / "train")}
    assert "val is not used: the folds are made of train alone" in guess.notes


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("image_path", "target"),
        ("filename", "label"),
        ("Image", "Class"),
        ("id", "category"),
        ("img_path", "species"),
        ("파일", "품종"),
    ],
)
@pytest.mark.parametrize("suffix", [".jpg", ""])
@pytest.mark.parametrize("start", ["train/", ""])
def test_names_of_columns(image: str, label: str, suffix: str, start: str, tmp_path: Path) -> None:
    """Paths from the table's folder or from the images' one; ids with and without a suffix."""
    touch(tmp_path, [*files(), *files("test")])
    cells = [f"{start}im{i:02d}{suffix}" for i in range(ROWS)]
    header = ["row", image, label, "width"]
    rows = zip(range(ROWS), cells, kinds(), [31.5 + i for i in range(ROWS)], strict=True)
    save(tmp_path / "train.csv", header, rows)
    guess = guessed(tmp_path)
    assert (guess.data["image_column"], guess.data["label_column"]) == (image, label)
    found = manifest(guess)
    assert found.classes == KINDS
    assert [found.file(row) for row in range(ROWS)] == [tmp_path / name for name in files()]


def test_a_competition_in_zips(tmp_path: Path) -> None:
    """A sample submission, ids without a suffix, another name of the image column in the test."""
    pack(tmp_path / "train.zip", files())
    pack(tmp_path / "test.zip", files("test"))
    ids = [f"im{i:02d}" for i in range(ROWS)]
    save(tmp_path / "train.csv", ["id", "breed"], zip(ids, kinds(), strict=True))
    save(tmp_path / "test.csv", ["key", "picture"], [(f"T{i}", i) for i in ids])
    sample = save(
        tmp_path / "sample_submission.csv", ["key", *KINDS], [(f"T{i}", 0, 0, 0) for i in ids]
    )
    guess = guessed(tmp_path)
    assert guess.data["train_images"] == str(tmp_path / "train.zip")
    assert guess.data["test_images"] == str(tmp_path / "test.zip")
    assert guess.data["test_image_column"] == "picture"
    assert guess.data["sample_submission"] == str(sample)
    classes = manifest(guess).classes
    test = read_test_set(DataConfig.model_validate(guess.data), classes)
    assert test is not None
    assert test.ids == tuple(f"T{i}" for i in ids)
    assert all(test.file(row).read_text() == f"test/{ids[row]}.jpg" for row in range(len(test)))


def test_a_whole_competition_in_one_zip(tmp_path: Path) -> None:
    touch(tmp_path / "in", [*files(), *files("test")])
    save(tmp_path / "in" / "labels.csv", ["id", "kind"], zip(files(), kinds(), strict=True))
    names = [p for p in (tmp_path / "in").rglob("*") if p.is_file()]
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as file:
        for path in names:
            file.write(path, f"pets/{path.relative_to(tmp_path / 'in')}")
    guess = guessed(tmp_path / "pets.zip")
    assert manifest(guess).classes == KINDS
    assert Path(str(guess.data["test"])).name == "test"
    assert guess.notes[0].startswith("pets.zip is unpacked to ")


def test_a_table_of_labels_beside_class_folders_wins(tmp_path: Path) -> None:
    touch(tmp_path, by_class("images/"))
    rows = [(f"images/{name}", name.split("/")[0]) for name in by_class()[:10]]
    save(tmp_path / "labels.csv", ["file", "animal_kind"], rows)
    assert len(manifest(guessed(tmp_path))) == 10


def test_the_test_images_labels_are_never_read(tmp_path: Path) -> None:
    touch(tmp_path, [*by_class("train/"), *files("test")])
    save(tmp_path / "test_labels.csv", ["id", "label"], zip(files("test"), kinds(), strict=True))
    guess = guessed(tmp_path)
    assert guess.data == {"train": str(tmp_path / "train"), "test": str(tmp_path / "test")}
    assert any("test_labels.csv is not used" in note for note in guess.notes)


def test_a_table_alone_is_without_a_test_set(tmp_path: Path) -> None:
    touch(tmp_path, files("test"))
    save(tmp_path / "sample_submission.csv", ["id", *KINDS], [(n, 0, 0, 0) for n in files("test")])
    guess = guessed(simple(tmp_path, "kind", kind=kinds()) / "train.csv")
    assert set(guess.data) == {"train", "image_column", "label_column"}


def test_the_samples_classes_tell_which_column_has_the_labels(tmp_path: Path) -> None:
    folder = simple(tmp_path, "label", "kind", label=["x", "y"] * 6, kind=kinds())
    touch(folder, files("test"))
    save(folder / "sample_submission.csv", ["id", *KINDS], [(n, 0, 0, 0) for n in files("test")])
    assert guessed(folder).data["label_column"] == "kind"


def test_a_sample_of_labels_names_their_column(tmp_path: Path) -> None:
    folder = simple(tmp_path, "colour", "kind", colour=["x", "y"] * 6, kind=kinds())
    touch(folder, files("test"))
    save(folder / "sample_submission.csv", ["id", "kind"], [(n, "cat") for n in files("test")])
    assert guessed(folder).data["label_column"] == "kind"


def test_two_columns_that_may_hold_the_labels(tmp_path: Path) -> None:
    folder = simple(tmp_path, "breed", "colour", breed=kinds(), colour=["red", "grey"] * 6)
    message = problems(folder)
    assert "each of these columns may hold the labels: breed (3 values), colour (2 values)" in (
        message
    )
    assert "--set data.label_column=breed" in message
    assert guessed(folder, label_column="colour").data["label_column"] == "colour"


def test_a_class_and_its_number_are_no_contradiction(tmp_path: Path) -> None:
    numbers = [KINDS.index(kind) for kind in kinds()]
    folder = simple(tmp_path, "label_id", "label", label_id=numbers, label=kinds())
    assert guessed(folder).data["label_column"] == "label"


def test_one_hot_labels(tmp_path: Path) -> None:
    columns = {name: [int(name == kind) for kind in kinds()] for name in KINDS}
    guess = guessed(simple(tmp_path, *KINDS, **columns))
    assert guess.data["label_column"] == [*KINDS]
    assert "labels in columns [cat, dog, owl] (one-hot)" in guess.notes[-1]
    found = manifest(guess)
    assert [found.classes[label] for label in found.labels] == kinds()


def test_one_hot_labels_beside_another_column_that_may_hold_labels(tmp_path: Path) -> None:
    columns = {name: [int(name == kind) for kind in kinds()] for name in KINDS}
    folder = simple(tmp_path, "colour", *KINDS, colour=["red", "blue"] * 6, **columns)
    message = problems(folder)
    assert "may hold the labels: colour (2 values), columns [cat, dog, owl] (one-hot)" in message
    assert guessed(folder, label_column=[*KINDS]).data["label_column"] == [*KINDS]
    touch(folder, files("test"))
    save(folder / "sample_submission.csv", ["id", *KINDS], [(n, 0, 0, 0) for n in files("test")])
    assert guessed(folder).data["label_column"] == [*KINDS]


def test_numbers_measured_are_no_labels(tmp_path: Path) -> None:
    message = problems(simple(tmp_path, "weight", weight=[0.5 + i // 2 for i in range(ROWS)]))
    assert "no column holds labels" in message
    assert "columns: image, weight" in message


def test_groups_are_kept_together_and_told(tmp_path: Path) -> None:
    patients = [f"p{i // 2}" for i in range(ROWS)]
    folder = simple(tmp_path, "label", "Patient_ID", label=kinds(), Patient_ID=patients)
    guess = guessed(folder)
    assert guess.data["group_column"] == "Patient_ID"
    assert manifest(guess).groups == tuple(patients)
    assert any("Patient_ID has 6 groups of 2.0 rows" in note for note in guess.notes)
    assert "group_column" not in guessed(folder, group_column=None).data


@pytest.mark.parametrize(
    ("cells", "note"),
    [
        ([f"p{i}" for i in range(ROWS)], False),  # one row each: ids
        ([f"p{i % 3}" for i in range(ROWS)], True),  # the classes by another name
    ],
)
def test_columns_that_are_no_groups(cells: list[str], note: bool, tmp_path: Path) -> None:
    guess = guessed(simple(tmp_path, "label", "patient", label=kinds(), patient=cells))
    assert "group_column" not in guess.data
    assert any("not taken for groups" in line for line in guess.notes) == note


def test_two_columns_of_groups(tmp_path: Path) -> None:
    halves, thirds = [i // 2 for i in range(ROWS)], [f"s{i % 4}" for i in range(ROWS)]
    message = problems(
        simple(
            tmp_path, "label", "patient", "session", label=kinds(), patient=halves, session=thirds
        )
    )
    assert "each of these columns may hold groups" in message
    assert "data.group_column=patient, or null for none" in message


@pytest.mark.parametrize(
    ("name", "cells", "folds"),
    [
        ("fold", [i % 4 for i in range(ROWS)], {"k": 4, "column": "fold"}),
        ("kfold", [i // 3 % 2 for i in range(ROWS)], {"k": 2, "column": "kfold"}),
        ("split", ["train", "train", "train", "valid"] * 3, {"k": 1, "column": "split"}),
        ("fold", [1 + i % 4 for i in range(ROWS)], {}),
        ("bend", [i % 4 for i in range(ROWS)], {}),
    ],
)
def test_folds(name: str, cells: list[object], folds: object, tmp_path: Path) -> None:
    guess = guessed(simple(tmp_path, "label", name, **{"label": kinds(), name: cells}))
    assert guess.folds == folds
    assert guess.data["label_column"] == "label"


def test_two_tables_that_may_hold_the_training_images(tmp_path: Path) -> None:
    folder = simple(tmp_path, "label", label=kinds())
    (folder / "train.csv").rename(folder / "train_a.csv")
    save(folder / "train_b.csv", ["image", "label"], zip(files(), kinds(), strict=True))
    message = problems(folder)
    assert "each may be the training table: train_a.csv, train_b.csv" in message
    assert f"--set data.train={folder / 'train_a.csv'}" in message
    chosen = guessed(folder, train=str(folder / "train_b.csv"))
    assert chosen.data["train"] == str(folder / "train_b.csv")


def test_two_folders_that_hold_the_same_names(tmp_path: Path) -> None:
    touch(tmp_path, [*files("small"), *files("large")])
    save(tmp_path / "train.csv", ["id", "label"], [(f"im{i:02d}", kinds()[i]) for i in range(ROWS)])
    message = problems(tmp_path)
    assert f"lie in each of {tmp_path / 'large'}, {tmp_path / 'small'}" in message
    assert f"--set data.train_images={tmp_path / 'large'}" in message


def test_an_unpacked_zip_beside_its_folder(tmp_path: Path) -> None:
    touch(tmp_path, by_class("train/"))
    pack(tmp_path / "train.zip", by_class())
    assert guessed(tmp_path).data["train"] == str(tmp_path / "train")


def test_a_sample_submission_without_test_images(tmp_path: Path) -> None:
    touch(tmp_path, by_class("train/"))
    save(tmp_path / "sample_submission.csv", ["id", *KINDS], [("a", 0, 0, 0)])
    message = problems(tmp_path)
    assert "--set data.test=PATH" in message
    assert "--set data.sample_submission=null" in message
    assert guessed(tmp_path, sample_submission=None).data == {"train": str(tmp_path / "train")}


@pytest.mark.parametrize("names", [[], ["notes.txt"], ["a.jpg", "b.jpg"], ["only/a.jpg"]])
def test_no_labelled_images(names: list[str], tmp_path: Path) -> None:
    touch(tmp_path, names)
    message = problems(tmp_path)
    assert "holds no labelled images; needed: one folder of images per class, or a table" in message
    assert "--set data.train=PATH" in message


def test_a_table_without_images(tmp_path: Path) -> None:
    table = save(tmp_path / "iris.csv", ["length", "label"], [(1, "a"), (2, "b")])
    assert "no column names image files below" in problems(table)


def test_a_table_whose_images_lie_elsewhere(tmp_path: Path) -> None:
    touch(tmp_path / "images", files())
    rows = zip([f"im{i:02d}" for i in range(ROWS)], kinds(), strict=True)
    table = save(tmp_path / "tables" / "t.csv", ["id", "kind"], rows)
    assert "--set data.train_images=FOLDER" in problems(table)
    guess = guessed(table, train_images=str(tmp_path / "images" / "train"))
    assert (guess.data["image_column"], guess.data["label_column"]) == ("id", "kind")
    guess.data["train_images"] = str(tmp_path / "images" / "train")
    assert manifest(guess).classes == KINDS


@pytest.mark.parametrize("start", ["", "../images/train/", "images/train/", "../train/"])
@pytest.mark.parametrize("name", ["train.csv", "labels.tsv"])
def test_tables_in_a_folder_beside_the_images(start: str, name: str, tmp_path: Path) -> None:
    names = files("images/train")
    touch(tmp_path, names)
    ids = [f"{start}im{i:02d}.jpg" if start else f"im{i:02d}" for i in range(ROWS)]
    rows = [f"{i},{kind}" for i, kind in zip(ids, kinds(), strict=True)]
    path = tmp_path / "tables" / name
    path.parent.mkdir()
    path.write_text("\n".join(["id,kind", *rows]), encoding="utf-8")
    found = manifest(guessed(tmp_path))
    assert [found.file(row).resolve() for row in range(ROWS)] == [tmp_path / n for n in names]


def test_absolute_paths(tmp_path: Path) -> None:
    touch(tmp_path / "images", files())
    rows = zip([str(tmp_path / "images" / name) for name in files()], kinds(), strict=True)
    guess = guessed(save(tmp_path / "tables" / "t.csv", ["path", "kind"], rows))
    assert "train_images" not in guess.data
    assert manifest(guess).classes == KINDS


def test_a_column_that_the_user_names_is_taken_as_it_is(tmp_path: Path) -> None:
    table = save(
        tmp_path / "t.csv", ["lost", "kind"], [(f"x{i}.jpg", k) for i, k in enumerate("aabb")]
    )
    assert guessed(table, image_column="lost").data["image_column"] == "lost"


def test_nothing_there(tmp_path: Path) -> None:
    assert problems(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'}: does not exist"


@pytest.mark.parametrize(
    ("paths", "classes"),
    [
        (["a/1.jpg", "b/1.jpg"], ["a", "b"]),
        (["w/a/1.jpg", "w/b/1.jpg"], ["a", "b"]),
        (["w/a/1.jpg", "w/b/x/1.jpg"], ["a", "b"]),
        (["a/1.jpg", "1.jpg"], []),
        (["a/1.jpg", "a/2.jpg"], []),
        ([], []),
    ],
)
def test_class_folders(paths: list[str], classes: list[str]) -> None:
    assert class_folders(paths) == classes
