"""Test sets and sample submissions as people have them, and the texts of what is wrong with
them."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest

from foldrace.config.schema import DataConfig
from foldrace.core.errors import DataError, RunFailure
from foldrace.dataset.manifest import read_manifest
from foldrace.dataset.test_set import read_test_set
from foldrace.inference.submission import check_submission, submission_csv

REAL = Path(__file__).parents[3] / "shared" / "data" / "sign_digits"
CLASSES = ("cat", "dog")
TEST = "id,image_path\nt1,1.jpg\nt2,2.jpg\nt3,3.jpg\n"
SAMPLE = "id,dog,cat\nt3,0,0\nt1,0,0\nt2,0,0\n"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLDRACE_CACHE", str(tmp_path / "cache"))


def touch(folder: Path, names: Iterable[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def make_zip(path: Path, names: Iterable[str]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, "x")
    return path


def config(train: Path, **keys: object) -> DataConfig:
    texts = {k: str(v) if isinstance(v, Path) else v for k, v in keys.items()}
    return DataConfig.model_validate({"train": str(train), **texts})


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_no_test_set(tmp_path: Path) -> None:
    assert read_test_set(config(tmp_path), CLASSES) is None


def test_sample_gives_rows_and_columns_their_order(tmp_path: Path) -> None:
    data = config(
        tmp_path,
        test=write(tmp_path / "test.csv", TEST),
        sample_submission=write(tmp_path / "sample.csv", SAMPLE),
    )
    found = read_test_set(data, CLASSES)
    assert found is not None
    assert found.ids == ("t3", "t1", "t2")
    assert found.image_paths == ("3.jpg", "1.jpg", "2.jpg")
    assert (found.id_column, found.form.class_columns) == ("id", ("dog", "cat"))
    assert found.form.header == ("id", "dog", "cat")
    assert (found.table, found.lines) == (str(tmp_path / "test.csv"), (4, 2, 3))
    assert found.file(0) == tmp_path / "3.jpg"


def test_header_and_ids_stay_as_the_sample_writes_them(tmp_path: Path) -> None:
    nfd = normalize("NFD", "고양이")
    sample = f" ID ,{nfd}, dog\r\n t2,0,0\r\n{nfd} ,0,0\r\n"
    data = config(
        tmp_path,
        test=write(tmp_path / "test.csv", "ID,image_path\n고양이,1.jpg\nt2 ,2.jpg\n"),
        sample_submission=write(tmp_path / "sample.csv", sample),
    )
    found = read_test_set(data, ("dog", "고양이"))
    assert found is not None
    assert found.form.header == (" ID ", nfd, " dog")
    assert (found.id_column, found.form.class_columns) == ("ID", ("고양이", "dog"))
    assert found.ids == (" t2", f"{nfd} ")
    assert found.image_paths == ("2.jpg", "1.jpg")
    text = submission_csv(found, ("dog", "고양이"), np.array([[0.25, 0.75], [1.0, 0.0]]))
    assert text == f" ID ,{nfd}, dog\n t2,0.75,0.25\n{nfd} ,0,1\n"
    assert "columns equal the sample's, in its order" in check_submission(text, found)
    for other in (text.replace(" ID ", "ID"), normalize("NFC", text), text.replace(" t2", "t2")):
        with pytest.raises(RunFailure, match="equal the sample's"):
            check_submission(other, found)


@pytest.mark.parametrize("header", ["", "Unnamed: 0", '"the ""id"", of it"'])
def test_odd_id_columns_come_back(tmp_path: Path, header: str) -> None:
    sample = f"{header},cat,dog\nt1,0,0\nt2,0,0\nt3,0,0\n"
    data = config(
        tmp_path,
        test=write(tmp_path / "test.csv", TEST),
        sample_submission=write(tmp_path / "sample.csv", sample),
    )
    found = read_test_set(data, CLASSES)
    assert found is not None
    text = submission_csv(found, CLASSES, np.tile([1.0, 0.0], (3, 1)))
    assert text == sample.replace(",0,0", ",1,0")
    check_submission(text, found)


def test_two_forms_of_one_column_are_that_column_twice(tmp_path: Path) -> None:
    sample = f"id,고양이,{normalize('NFD', '고양이')},dog\nt1,0,0,0\n"
    data = config(
        tmp_path,
        test=write(tmp_path / "test.csv", TEST),
        sample_submission=write(tmp_path / "sample.csv", sample),
    )
    with pytest.raises(DataError, match="columns that are there twice: 고양이"):
        read_test_set(data, ("dog", "고양이"))


def test_without_a_sample(tmp_path: Path) -> None:
    data = config(tmp_path, test=write(tmp_path / "test.csv", TEST))
    found = read_test_set(data, CLASSES)
    assert found is not None
    assert found.ids == ("t1", "t2", "t3")
    assert (found.id_column, found.form.class_columns) == ("id", CLASSES)
    assert found.form.header == ("id", *CLASSES)
    assert found.lines == (2, 3, 4)


def test_id_column_is_the_samples_wherever_it_stands(tmp_path: Path) -> None:
    text = "n,image_path,id\n1,1.jpg,t1\n1,2.jpg,t2\n1,3.jpg,t3\n"
    sample = write(tmp_path / "sample.csv", SAMPLE)
    data = config(tmp_path, test=write(tmp_path / "t.csv", text), sample_submission=sample)
    found = read_test_set(data, CLASSES)
    assert found is not None
    assert found.image_paths[0] == "3.jpg"


@pytest.mark.parametrize("suffix", ["", ".jpg"])
@pytest.mark.parametrize("zipped", [False, True])
def test_folder_of_test_images(tmp_path: Path, suffix: str, zipped: bool) -> None:
    members = [f"test/t{i}.jpg" for i in (1, 2, 3)]
    if zipped:
        test = make_zip(tmp_path / "test.zip", members)
    else:
        test = touch(tmp_path / "images", members)
    rows = "".join(f"t{i}{suffix},0,0\n" for i in (2, 1, 3))
    sample = write(tmp_path / "sample.csv", "name,cat,dog\n" + rows)
    found = read_test_set(config(tmp_path, test=test, sample_submission=sample), CLASSES)
    assert found is not None
    assert found.ids == (f"t2{suffix}", f"t1{suffix}", f"t3{suffix}")
    assert found.id_column == "name"
    assert found.file(0).name == "t2.jpg"
    plain = read_test_set(config(tmp_path, test=test), CLASSES)
    assert plain is not None
    assert (plain.ids, plain.id_column) == (("t1.jpg", "t2.jpg", "t3.jpg"), "id")
    assert plain.form.header == ("id", *CLASSES)
    assert (plain.table, plain.lines) == (None, None)


def failing(tmp_path: Path, test: str, sample: str | None = None, **keys: object) -> list[str]:
    if sample is not None:
        keys["sample_submission"] = write(tmp_path / "sample.csv", sample)
    data = config(tmp_path, test=write(tmp_path / "test.csv", test), **keys)
    with pytest.raises(DataError) as error:
        read_test_set(data, CLASSES)
    return [str(problem) for problem in error.value.problems]


def test_missing_image_column_says_which_key_to_set(tmp_path: Path) -> None:
    (found,) = failing(tmp_path, "ID,img_path\n1,a.jpg\n")
    assert "has no column 'image_path'; columns: ID, img_path" in found
    assert found.endswith("Set data.test_image_column")


@pytest.mark.parametrize("column", ["label", " label "])
def test_sample_that_asks_for_labels(tmp_path: Path, column: str) -> None:
    sample = f"id,{column}\nt3,cat\nt1,cat\nt2,cat\n"
    data = config(
        tmp_path,
        test=write(tmp_path / "test.csv", TEST),
        sample_submission=write(tmp_path / "sample.csv", sample),
    )
    found = read_test_set(data, CLASSES)
    assert found is not None and found.form.kind == "labels"
    assert (found.ids, found.form.class_columns) == (("t3", "t1", "t2"), CLASSES)
    text = submission_csv(found, CLASSES, np.array([[0.1, 0.9], [0.5, 0.5], [0.8, 0.2]]))
    assert text == f"id,{column}\nt3,dog\nt1,cat\nt2,cat\n"
    assert "every label is a class" in check_submission(text, found)
    with pytest.raises(RunFailure, match="every label is a class"):
        check_submission(text.replace("t1,cat", "t1,0.5"), found)


def test_sample_columns(tmp_path: Path) -> None:
    unknown, missing, twice = failing(tmp_path, TEST, "id,dog,dog,rabbit\nt1,0,0,0\n")
    assert "sample.csv: columns that are no class of the training data: rabbit" in unknown
    assert "training classes without a column: cat" in missing
    assert "columns that are there twice: dog" in twice


def test_sample_ids(tmp_path: Path) -> None:
    rows = "".join(f"{i},0,0\n" for i in ("t1", "t1", "t2", "t9"))
    twice, unknown, missing = failing(tmp_path, TEST, "id,cat,dog\n" + rows)
    assert "ids that are there twice: t1" in twice
    assert "ids without a test image: t9" in unknown
    assert "test images without an id in it: t3" in missing


def test_repeated_test_ids(tmp_path: Path) -> None:
    (found,) = failing(tmp_path, "id,image_path\nt1,1.jpg\nt1,2.jpg\n")
    assert "ids that are there twice: t1" in found
    folder = touch(tmp_path / "images", ["a/1.jpg", "b/1.jpg"])
    paths = read_test_set(config(tmp_path, test=folder), CLASSES)
    assert paths is not None and paths.ids == ("a/1.jpg", "b/1.jpg")
    assert "ids are paths such as a/1.jpg" in paths.readings[0]


def test_missing_files(tmp_path: Path) -> None:
    data = config(tmp_path, test=tmp_path / "no.csv", sample_submission=tmp_path / "nor.csv")
    with pytest.raises(DataError) as error:
        read_test_set(data, CLASSES)
    assert [p.where for p in error.value.problems] == ["data.sample_submission", "data.test"]


@pytest.mark.skipif(not REAL.is_dir(), reason="the sign_digits photos are not on this machine")
@pytest.mark.parametrize("whole_zip", [False, True])
def test_real_archives(tmp_path: Path, whole_zip: bool) -> None:
    table = {"test": REAL / "test.csv", "test_images": REAL / "test.zip"}
    data = config(
        REAL / "train.zip",
        **({"test": REAL / "test.zip"} if whole_zip else table),
        test_image_column="img_path",
        sample_submission=REAL / "sample_submission.csv",
    )
    manifest = read_manifest(data)
    found = read_test_set(data, manifest.classes)
    assert found is not None
    assert manifest.classes == tuple("0123456789")
    assert (len(manifest), len(found)) == (1655, 407)
    assert found.ids[0] == "TEST_0000"
    assert found.file(0).name == "TEST_0000.jpg"
    assert all(found.file(row).is_file() for row in range(len(found)))
    assert all(manifest.file(row).is_file() for row in range(len(manifest)))
