"""Training tables, folders and zips as people have them, and the texts of what is wrong with
them."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest

from foldrace.config.schema import DataConfig
from foldrace.core.errors import DataError
from foldrace.dataset.manifest import Manifest, read_manifest

BASIC = "image_path,target\na.jpg,cat\nb.jpg,dog\n"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLDRACE_CACHE", str(tmp_path / "cache"))


def touch(folder: Path, names: Iterable[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def make_zip(path: Path, members: dict[str, str] | Iterable[str]) -> Path:
    contents = members if isinstance(members, dict) else dict.fromkeys(members, "x")
    with zipfile.ZipFile(path, "w") as file:
        for name, text in contents.items():
            file.writestr(name, text)
    return path


def config(train: Path, **keys: object) -> DataConfig:
    texts = {k: str(v) if isinstance(v, Path) else v for k, v in keys.items()}
    return DataConfig.model_validate({"train": str(train), **texts})


def from_csv(tmp_path: Path, content: str | bytes, **keys: object) -> Manifest:
    path = tmp_path / "train.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    fold_column = keys.pop("fold_column", None)
    assert fold_column is None or isinstance(fold_column, str)
    return read_manifest(config(path, **keys), fold_column)


def problems(tmp_path: Path, content: str | bytes, **keys: object) -> list[str]:
    with pytest.raises(DataError) as error:
        from_csv(tmp_path, content, **keys)
    return [str(problem) for problem in error.value.problems]


def names(manifest: Manifest) -> list[str]:
    return [manifest.classes[label] for label in manifest.labels]


# --- training CSV


def test_csv(tmp_path: Path) -> None:
    manifest = from_csv(tmp_path, BASIC)
    assert len(manifest) == 2
    assert manifest.image_root == tmp_path
    assert manifest.file(1) == tmp_path / "b.jpg"
    assert manifest.labels.dtype == np.int64
    assert (manifest.classes, manifest.groups, manifest.given_folds) == (("cat", "dog"), None, None)
    assert (manifest.table, manifest.lines) == (str(tmp_path / "train.csv"), (2, 3))


def test_every_cell_is_text_and_classes_are_natural_sorted(tmp_path: Path) -> None:
    classes = ["NA", "None", "01", "1", "10", "2", "nan", "", "true"]
    rows = "".join(f"{i}.jpg,{name}\n" for i, name in enumerate(classes) if name)
    manifest = from_csv(tmp_path, "image_path,target\n" + rows)
    assert manifest.classes == ("01", "1", "2", "10", "NA", "nan", "None", "true")
    assert names(manifest) == [name for name in classes if name]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp949"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_encodings_and_line_ends(tmp_path: Path, encoding: str, end: str) -> None:
    text = end.join(["image_path,target", "사진/a.jpg,고양이", "b.jpg,강아지", ""])
    manifest = from_csv(tmp_path, text.encode(encoding))
    assert manifest.image_paths == ("사진/a.jpg", "b.jpg")
    assert manifest.classes == ("강아지", "고양이")


def test_quotes_commas_and_blank_lines(tmp_path: Path) -> None:
    text = 'image_path,target\n"a, 1.jpg","say ""hi"""\n\n"b\nc.jpg", dog \n'
    manifest = from_csv(tmp_path, text)
    assert manifest.image_paths == ("a, 1.jpg", "b\nc.jpg")
    assert names(manifest) == ['say "hi"', "dog"]
    assert manifest.lines == (2, 4)


def test_windows_and_absolute_paths(tmp_path: Path) -> None:
    text = f"image_path,target\nsub\\a.jpg,x\n{tmp_path}/b.jpg,y\n"
    manifest = from_csv(tmp_path, text, train_images=touch(tmp_path / "images", ["sub/a.jpg"]))
    assert manifest.file(0) == tmp_path / "images/sub/a.jpg"
    assert manifest.file(1) == tmp_path / "b.jpg"


def test_decomposed_hangul_still_finds_its_file_and_its_class(tmp_path: Path) -> None:
    nfd, nfc = normalize("NFD", "고양이"), "고양이"
    touch(tmp_path, [f"{nfd}/사진.jpg", f"{nfc}2/{normalize('NFD', '사진')}.jpg"])
    text = f"image_path,target\n{nfc}/사진.jpg,{nfd}\n{nfd}2/사진.jpg,{nfc}\nb.jpg,개\n"
    manifest = from_csv(tmp_path, text)
    assert manifest.classes == ("개", "고양이")
    assert [manifest.file(row).exists() for row in range(3)] == [True, True, False]


def test_a_name_too_long_for_the_disk_is_a_missing_file(tmp_path: Path) -> None:
    text = f"image_path,target\n{'x' * 300}.jpg,cat\n{'고' * 300}.jpg,dog\n"
    manifest = from_csv(tmp_path, text)
    assert manifest.file(0).name == "x" * 300 + ".jpg"
    assert manifest.file(1).name == "고" * 300 + ".jpg"


def test_groups_and_given_folds(tmp_path: Path) -> None:
    text = "image_path,target,car,part\na.jpg,x,c1,0\nb.jpg,y,c2, 1\n"
    manifest = from_csv(tmp_path, text, group_column="car", fold_column="part")
    assert manifest.groups == ("c1", "c2")
    assert manifest.given_folds == ("0", "1")


def test_missing_columns_are_all_named_with_the_closest(tmp_path: Path) -> None:
    found = problems(tmp_path, "img_path,tarjet\na,b\n", group_column="car", fold_column="part")
    assert len(found) == 4
    assert "train.csv: has no column 'image_path'; columns: img_path, tarjet" in found[0]
    assert "did you mean 'img_path'?). Set data.image_column" in found[0]
    assert "did you mean 'tarjet'?). Set data.label_column" in found[1]
    assert "has no column 'car'" in found[2]
    assert found[3].endswith("Set folds.column")


def test_lines_are_counted_as_an_editor_does(tmp_path: Path) -> None:
    text = 'image_path,target\n"a\nb.jpg",x\n\n,y\nc.jpg,\nd.jpg,z,extra\ne.jpg\nf.jpg,x\n'
    found = problems(tmp_path, text)
    assert len(found) == 3
    assert "the header has 2 cells, but these lines have another number: 7, 8;" in found[0]
    assert "column 'image_path' is empty in line 5; fill in" in found[1]
    assert "column 'target' is empty in line 6" in found[2]


def test_long_lists_are_capped(tmp_path: Path) -> None:
    text = BASIC + "".join(f"{i}.jpg,\n" for i in range(332))
    assert "23 and 312 more; fill in" in problems(tmp_path, text)[0]


def test_repeated_images(tmp_path: Path) -> None:
    text = BASIC + "./a.jpg,dog\nb.jpg,dog\n"
    conflict, same = problems(tmp_path, text)
    assert "the same image with different labels: a.jpg (lines 2 and 4: cat, dog)" in conflict
    assert "the same image twice: b.jpg (lines 3 and 5: dog); keep one" in same


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "has no rows"),
        (b"image_path,target\n", "has no rows; needed: a header line and one per image"),
        (bytes(range(1, 256)) * 3, "is text in no encoding that is known by its letters; name it"),
        (b"\xff\xfe\x00\xd8\x00", "is not text in utf-16"),
        (b"\0" * 99, "is text in no encoding"),
        (b'image_path,target\na.jpg,"x\n', "line 2 is not valid CSV"),
        (b"image_path;target\na.jpg;x\n", "only the class 'x'"),
        (
            b"image_path,target,target\na.jpg,x,y\n",
            "image_path, target, target; rename or remove",
        ),
        (b"image_path,target\na.jpg,x\nb.jpg,x\n", "only the class 'x'; needed: at least 2"),
    ],
)
def test_broken_tables(tmp_path: Path, content: bytes, expected: str) -> None:
    assert expected in problems(tmp_path, content)[0]


def test_missing_sources(tmp_path: Path) -> None:
    (tmp_path / "train.csv").touch()
    with pytest.raises(DataError, match=r"data\.train: .*trian\.csv does not exist; .*train\.csv"):
        read_manifest(config(tmp_path / "trian.csv"))
    (tmp_path / "train.feather").touch()
    with pytest.raises(
        DataError, match=r"no known kind; allowed: a \.csv, .*, a folder or a \.zip"
    ):
        read_manifest(config(tmp_path / "train.feather"))


def test_csv_and_image_problems_come_together(tmp_path: Path) -> None:
    found = problems(tmp_path, "image_path,target\na.jpg,\n", train_images=tmp_path / "no.zip")
    assert any("no.zip does not exist" in text for text in found)
    assert any("is empty in line 2" in text for text in found)


# --- training images


@pytest.mark.parametrize("prefix", ["", "train/", "outer/train/"])
@pytest.mark.parametrize("zipped", [False, True])
def test_train_images_with_and_without_wrapping_folder(
    tmp_path: Path, prefix: str, zipped: bool
) -> None:
    members = [f"{prefix}a.jpg", f"{prefix}b.jpg"]
    images = (
        make_zip(tmp_path / "i.zip", members) if zipped else touch(tmp_path / "images", members)
    )
    manifest = from_csv(tmp_path, BASIC, train_images=images)
    assert manifest.file(0).is_file()
    assert manifest.file(1).is_file()


@pytest.mark.parametrize("prefix", ["", "train/", "outer/train/"])
@pytest.mark.parametrize("zipped", [False, True])
def test_folder_per_class(tmp_path: Path, prefix: str, zipped: bool) -> None:
    nfd = normalize("NFD", "고양이")
    members = [f"{prefix}{name}" for name in ("10/1.jpg", "2/b.PNG", f"{nfd}/sub/c.jpg")]
    litter = ["README.txt", f"{prefix}2/notes.txt", f"{prefix}.hidden/x.jpg"]
    if zipped:
        train = make_zip(tmp_path / "train.zip", [*members, *litter])
    else:
        train = touch(tmp_path / "classes", [*members, *litter])
    manifest = read_manifest(config(train))
    assert manifest.classes == ("2", "10", "고양이")
    assert manifest.image_paths == ("2/b.PNG", "10/1.jpg", f"{nfd}/sub/c.jpg")
    assert all(manifest.file(row).is_file() for row in range(3))
    assert (manifest.table, manifest.lines) == (None, None)


def test_folder_problems(tmp_path: Path) -> None:
    folder = touch(tmp_path / "d", ["cat/1.jpg", "loose.jpg", "dog/notes.txt"])
    with pytest.raises(DataError) as error:
        read_manifest(config(folder, group_column="car"), "part")
    text = str(error.value)
    assert "data.group_column: is 'car', but data.train has no CSV" in text
    assert "folds.column: is 'part'" in text
    assert "images beside the class folders: loose.jpg" in text
    assert "class folders without images: dog" in text
    assert "only the class 'cat'" in text


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("valid", ["valid", "val", "Validation"])
def test_of_a_folder_of_splits_the_training_part_is_taken(
    tmp_path: Path, valid: str, zipped: bool
) -> None:
    members = ["train/cat/1.jpg", "train/dog/1.jpg", f"{valid}/cat/2.jpg", "test/cat/1.jpg"]
    given = make_zip(tmp_path / "a.zip", members) if zipped else touch(tmp_path / "a", members)
    manifest = read_manifest(config(given))
    assert manifest.image_paths == ("cat/1.jpg", "dog/1.jpg")
    assert manifest.image_root.name == "train"
    [note] = manifest.readings
    assert "data.train: train of" in note and f"not {', '.join(sorted(['test', valid]))};" in note


def test_a_folder_of_splits_without_a_training_part(tmp_path: Path) -> None:
    folder = touch(tmp_path, ["valid/cat/1.jpg", "valid/dog/1.jpg", "test/1.jpg"])
    with pytest.raises(DataError, match=r"called test, valid: set data\.train to one of them"):
        read_manifest(config(folder))


@pytest.mark.parametrize("prefix", ["", "data/"])
def test_zip_with_its_csv(tmp_path: Path, prefix: str) -> None:
    members = {f"{prefix}train.csv": BASIC, f"{prefix}a.jpg": "x", f"{prefix}b.jpg": "x"}
    manifest = read_manifest(config(make_zip(tmp_path / "all.zip", members)))
    assert names(manifest) == ["cat", "dog"]
    assert manifest.file(0).is_file()
    assert manifest.table == f"{prefix}train.csv in {tmp_path / 'all.zip'}"
    bad = make_zip(tmp_path / "bad.zip", {f"{prefix}train.csv": "image_path,target\na,\n"})
    with pytest.raises(DataError, match=rf"^{prefix}train\.csv in {bad}: column 'target' is empty"):
        read_manifest(config(bad))


def test_zip_with_several_csvs(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "all.zip", {"a.csv": BASIC, "b.csv": BASIC})
    with pytest.raises(DataError, match=r"holds 2 tables: a\.csv, b\.csv; unpack it and set"):
        read_manifest(config(path))


def test_max_per_class_keeps_the_first_rows_of_each(tmp_path: Path) -> None:
    rows = "".join(f"i{n}.png,{'ab'[n % 2]},g{n}\n" for n in range(10))
    (tmp_path / "t.csv").write_text("image_path,target,group\n" + rows, encoding="utf-8")
    data = DataConfig(train=str(tmp_path / "t.csv"), group_column="group", max_per_class=2)
    manifest = read_manifest(data)
    assert manifest.image_paths == ("i0.png", "i1.png", "i2.png", "i3.png")
    assert manifest.labels.tolist() == [0, 1, 0, 1]
    assert manifest.groups == ("g0", "g1", "g2", "g3")
    assert manifest.lines == (2, 3, 4, 5)
