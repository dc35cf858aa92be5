"""Ids, paths and labels as the tables of competitions have them: what is meant is found and told
in a line; what has two readings is asked."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from foldrace.config.schema import DataConfig
from foldrace.core.errors import DataError
from foldrace.dataset.manifest import Manifest, read_manifest

KINDS = ("cat", "dog")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLDRACE_CACHE", str(tmp_path / "cache"))


def touch(folder: Path, names: Iterable[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def table(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read(train: Path, **keys: object) -> Manifest:
    texts = {k: str(v) if isinstance(v, Path) else v for k, v in keys.items()}
    return read_manifest(DataConfig.model_validate({"train": str(train), **texts}))


def problems(train: Path, **keys: object) -> str:
    with pytest.raises(DataError) as error:
        read(train, **keys)
    return str(error.value)


def of_ids(folder: Path, *ids: str) -> Path:
    lines = (f"{name},{KINDS[i % 2]}" for i, name in enumerate(ids))
    return table(folder / "t.csv", "image_path,target", *lines)


def file_names(manifest: Manifest) -> list[str]:
    names = [manifest.file(row) for row in range(len(manifest))]
    assert all(name.is_file() for name in names)
    return [name.relative_to(manifest.image_root).as_posix() for name in names]


@pytest.mark.parametrize(
    ("ids", "files"),
    [
        (("im1", "im2"), ("im1.jpg", "im2.png")),
        (("im1.jpg", "im2.jpg"), ("im1.png", "im2.PNG")),
        (("im1.jpg", "im2.jpg"), ("im1.JPG", "im2.jpeg")),
        (("IM1", "Im2.Jpg"), ("im1.jpg", "im2.jpg")),
        (("1", "10"), ("00001.jpg", "00010.jpg")),
        (("a.b.1", "a.b.2"), ("a.b.1.jpg", "a.b.2.jpg")),
        (("x/im1", "y/im1"), ("x/im1.jpg", "y/im1.jpg")),
        (("im1.jpg ", " im2"), ("im1.jpg", "im2.jpg")),
        (("사진1", "사진2.jpeg"), ("사진1.jpg", "사진2.jpg")),
    ],
)
def test_ids_that_are_called_otherwise_than_the_files(
    ids: tuple[str, ...], files: tuple[str, ...], tmp_path: Path
) -> None:
    touch(tmp_path, files)
    manifest = read(of_ids(tmp_path, *ids))
    assert file_names(manifest) == list(files)
    [note] = manifest.readings
    assert "of 2 images are called otherwise than the files: " in note


@pytest.mark.parametrize(
    ("ids", "files"),
    [
        (("im1", "im2"), ("im1.jpg", "im1.png", "im2.jpg")),
        (("1", "2"), ("01.jpg", "001.jpg", "2.jpg")),
        (("im1.jpg", "im1.png"), ("im1.png",)),
        (("im1", "lost"), ("im1.jpg",)),
    ],
)
def test_what_is_not_sure_stays_as_it_is_written(
    ids: tuple[str, ...], files: tuple[str, ...], tmp_path: Path
) -> None:
    touch(tmp_path, files)
    manifest = read(of_ids(tmp_path, *ids))
    there = [manifest.file(row).is_file() for row in range(2)]
    assert sorted(there) == [False, True]


def test_files_as_they_are_written_need_no_word(tmp_path: Path) -> None:
    touch(tmp_path, ["a.jpg", "b.jpg"])
    assert read(of_ids(tmp_path, "a.jpg", "b.jpg")).readings == ()


def test_files_in_folders_below_that_no_id_names(tmp_path: Path) -> None:
    touch(tmp_path / "images", ["0/a/a1.jpg", "b/b2.jpg"])
    manifest = read(of_ids(tmp_path, "a1", "b2"), train_images=tmp_path / "images")
    assert file_names(manifest) == ["0/a/a1.jpg", "b/b2.jpg"]
    assert "a1 is 0/a/a1.jpg" in manifest.readings[0]


def test_a_lost_image_is_not_taken_from_another_folder(tmp_path: Path) -> None:
    touch(tmp_path, ["a.jpg", "b.jpg", "old/c.jpg"])
    manifest = read(of_ids(tmp_path, "a.jpg", "b.jpg", "c.jpg"))
    assert [manifest.file(row).is_file() for row in range(3)] == [True, True, False]


@pytest.mark.parametrize("images", ["train", ".", "csv", None])
def test_paths_that_start_elsewhere(images: str | None, tmp_path: Path) -> None:
    """../train/... from the table's folder, whatever the config says."""
    touch(tmp_path, ["train/a.jpg", "train/b.jpg", "csv/readme.txt"])
    path = of_ids(tmp_path / "csv", "../train/a.jpg", "../train/b.jpg")
    keys = {} if images is None else {"train_images": tmp_path / images}
    manifest = read(path, **keys)
    assert all(manifest.file(row).is_file() for row in range(2))
    assert len(manifest.readings) == (images in (".",))


def test_paths_that_name_the_folder_once_more(tmp_path: Path) -> None:
    touch(tmp_path, ["train/a.jpg", "train/b.jpg"])
    path = of_ids(tmp_path / "csv", "train/a.jpg", "train/b.jpg")
    manifest = read(path, train_images=tmp_path / "train")
    assert file_names(manifest) == ["train/a.jpg", "train/b.jpg"]
    assert f"start from {tmp_path}" in manifest.readings[0]


@pytest.mark.parametrize(
    "head", ["../input/pets", "/kaggle/input/pets", "C:\\Users\\me\\pets", "./pets"]
)
def test_paths_of_another_machine(head: str, tmp_path: Path) -> None:
    touch(tmp_path, ["train/a.jpg", "train/b.jpg"])
    path = of_ids(tmp_path, f"{head}/train/a.jpg", f"{head}/train/b.jpg")
    manifest = read(path)
    assert file_names(manifest) == ["train/a.jpg", "train/b.jpg"]
    assert f"start from {tmp_path}, without " in manifest.readings[0]


def test_images_in_the_folder_named_after_the_part(tmp_path: Path) -> None:
    touch(tmp_path, ["train/1.jpg", "train/2.jpg", "test/1.jpg", "test/2.jpg"])
    manifest = read(of_ids(tmp_path, "1", "2"))
    assert manifest.image_root == tmp_path / "train"
    assert file_names(manifest) == ["1.jpg", "2.jpg"]


@pytest.mark.parametrize(
    ("written", "allowed"),
    [("../train/a.jpg", True), ("../../a.jpg", False), ("../train/../../../etc/a.jpg", False)],
)
def test_paths_in_an_archive_stay_in_it(written: str, allowed: bool, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as file:
        file.writestr("csv/t.csv", f"image_path,target\n{written},cat\n../train/b.jpg,dog\n")
        for name in ("train/a.jpg", "train/b.jpg"):
            file.writestr(name, name)
    if allowed:
        manifest = read(tmp_path / "all.zip")
        assert all(manifest.file(row).is_file() for row in range(2))
    else:
        found = problems(tmp_path / "all.zip")
        assert f"paths lead out of the archive: line 2: {written}" in found


def test_a_table_in_an_archive_may_not_lead_out_of_the_images_folder(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as file:
        file.writestr("t.csv", "image_path,target\n../secret.jpg,cat\nb.jpg,dog\n")
    touch(tmp_path, ["images/b.jpg", "secret.jpg"])
    found = problems(tmp_path / "t.zip", train_images=tmp_path / "images")
    assert "paths lead out of the archive: line 2: ../secret.jpg" in found


# --- columns and labels


@pytest.mark.parametrize("image", ["file_name", "image_id", "ID", "파일"])
@pytest.mark.parametrize("label", ["label", "Class", "breed"])
def test_columns_that_no_key_names(image: str, label: str, tmp_path: Path) -> None:
    names = [f"im{i}.jpg" for i in range(8)]
    touch(tmp_path / "train", names)
    rows = (f"{i},{name},{KINDS[i % 2]},{i / 7:.3f}" for i, name in enumerate(names))
    path = table(tmp_path / "t.csv", f"n,{image},{label},score", *rows)
    manifest = read(path, train_images=tmp_path / "train")
    assert manifest.classes == KINDS
    assert file_names(manifest) == names
    assert f"images in column {image} (data.image_column)" in manifest.readings[0]
    assert f"labels in column {label} (data.label_column)" in manifest.readings[1]


def test_columns_that_a_key_names_are_not_looked_for(tmp_path: Path) -> None:
    touch(tmp_path, ["a.jpg", "b.jpg"])
    path = table(tmp_path / "t.csv", "file,label", "a.jpg,cat", "b.jpg,dog")
    assert "has no column 'photo'; columns: file, label" in problems(path, image_column="photo")
    assert "has no column 'kind'" in problems(path, label_column="kind")


def test_two_columns_that_may_hold_labels_are_asked(tmp_path: Path) -> None:
    names = [f"im{i}.jpg" for i in range(8)]
    touch(tmp_path, names)
    rows = (f"{name},{KINDS[i % 2]},{'xyz'[i % 3]}" for i, name in enumerate(names))
    path = table(tmp_path / "t.csv", "image_path,breed,colour", *rows)
    found = problems(path)
    assert "may hold the labels: breed (2 values), colour (3 values)" in found
    assert "data.label_column=breed" in found
    assert read(path, label_column="colour").classes == ("x", "y", "z")


@pytest.mark.parametrize(
    ("cells", "classes", "told"),
    [
        (["0", "1", "2", "10"], ("0", "1", "2", "10"), False),
        (["0.0", "1.0", "2.0", "10.0"], ("0", "1", "2", "10"), True),
        (["0", "1.0", "2", "3.00"], ("0", "1", "2", "3"), True),
        (["0.5", "1.5", "0.5", "1.5"], ("0.5", "1.5"), False),
        (["1.0", "v2.0", "1.0", "v2.0"], ("1.0", "v2.0"), False),
        (["01", "1", "NA", "True"], ("01", "1", "NA", "True"), False),
    ],
)
def test_numbers_as_labels(
    cells: list[str], classes: tuple[str, ...], told: bool, tmp_path: Path
) -> None:
    lines = (f"{i}.jpg,{cell}" for i, cell in enumerate(cells))
    manifest = read(table(tmp_path / "t.csv", "image_path,target", *lines))
    assert manifest.classes == classes
    assert any("is read as" in note for note in manifest.readings) == told


ONE_HOT = ("a,1,0,0", "b,0,1,0", "c,0,0,1", "d,0,1,0")


@pytest.mark.parametrize("keys", [{}, {"label_column": ["cat", "dog", "owl"]}])
@pytest.mark.parametrize(("one", "zero"), [("1", "0"), ("1.0", "0.0"), ("True", "False"),
                                           (" 1", " 0")])  # fmt: skip
def test_one_hot_labels(keys: dict[str, object], one: str, zero: str, tmp_path: Path) -> None:
    touch(tmp_path, [f"{name}.jpg" for name in "abcd"])
    lines = [line.replace("1", "I").replace("0", zero).replace("I", one) for line in ONE_HOT]
    manifest = read(table(tmp_path / "t.csv", "image_path,cat, dog,owl", *lines), **keys)
    assert [manifest.classes[label] for label in manifest.labels] == ["cat", "dog", "owl", "dog"]
    assert any("[cat, dog, owl] (one-hot)" in note for note in manifest.readings) == (not keys)


def test_a_one_hot_class_without_an_image_is_none(tmp_path: Path) -> None:
    lines = [f"{line},0.0" for line in ONE_HOT]
    manifest = read(table(tmp_path / "t.csv", "image_path,cat,dog,owl,unknown", *lines))
    assert manifest.classes == ("cat", "dog", "owl")


def test_several_classes_of_an_image_are_refused_with_the_reason(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", "image_path,cat,dog", "a,1,1", "b,0,1", "c,0,0", "d,x,1")
    found = problems(path, label_column=["cat", "dog"])
    assert "cat, dog have several classes, where only one can be predicted (no multi" in found
    assert "multi-label): line 2" in found
    assert "cat, dog have no class: line 4" in found
    assert "cat, dog have cells that are neither 0 nor 1: line 5" in found
    assert "has no column 'owl'" in problems(path, label_column=["cat", "owl"])


# --- folders that bring their table along


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_folder_of_hugging_face(suffix: str, whole: bool, zipped: bool, tmp_path: Path) -> None:
    import pandas as pd

    root = tmp_path / "data"
    touch(root, [f"train/{i}.png" for i in range(4)] + ["test/9.png"])
    frame = pd.DataFrame({"file_name": [f"{i}.png" for i in range(4)], "label": list("abab")})
    write = {".csv": frame.to_csv, ".parquet": frame.to_parquet}.get(suffix)
    path = root / "train" / f"metadata{suffix}"
    if write is None:
        frame.to_json(path, orient="records", lines=True)
    else:
        write(path, index=False)
    given = root if whole else root / "train"
    if zipped:
        with zipfile.ZipFile(tmp_path / "d.zip", "w") as file:
            for member in given.rglob("*.*"):
                file.write(member, member.relative_to(given))
        given = tmp_path / "d.zip"
    manifest = read(given)
    assert (manifest.classes, len(manifest)) == (("a", "b"), 4)
    assert all(manifest.file(row).is_file() for row in range(4))


def test_the_header_once_more_is_no_row(tmp_path: Path) -> None:
    touch(tmp_path, ["a.jpg", "b.jpg"])
    lines = (
        "image_path,target",
        "image_path,target",
        "a.jpg,cat",
        "image_path,target",
        "b.jpg,dog",
    )
    found = read(table(tmp_path / "t.csv", *lines))
    assert file_names(found) == ["a.jpg", "b.jpg"] and found.classes == ("cat", "dog")
    assert found.readings[0].endswith("the header stands again in line 2, 4; left out")
    assert found.lines == (3, 5)


@pytest.mark.parametrize("other", ["annotations/a.xml", "labels/x/a.txt"])
def test_the_one_folder_with_images_is_taken(other: str, tmp_path: Path) -> None:
    touch(tmp_path, [other, "images/cat/a.jpg", "images/dog/b.jpg"])
    found = read(tmp_path)
    assert file_names(found) == ["cat/a.jpg", "dog/b.jpg"] and found.classes == ("cat", "dog")
    assert f"images of {tmp_path.name}, not {other.split('/')[0]}" in found.readings[0]


def test_an_empty_class_beside_the_only_one_is_no_other_folder(tmp_path: Path) -> None:
    touch(tmp_path, ["cat/one/a.jpg", "dog/readme.txt"])
    assert "holds only the class 'cat'" in problems(tmp_path)
    touch(tmp_path, ["c.jpg", "cat/two/b.jpg"])
    assert "images beside the class folders: c.jpg" in problems(tmp_path)


def test_an_archive_within_an_archive_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as inner:
        inner.writestr("cat/a.jpg", b"a")
    with zipfile.ZipFile(tmp_path / "out.zip", "w") as outer:
        outer.write(tmp_path / "in.zip", "data/in.zip")
    text = problems(tmp_path / "out.zip")
    assert "out.zip: holds no image, but data/in.zip; unpack it and set data.train to" in text
