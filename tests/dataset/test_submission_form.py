"""What a sample submission asks for, whatever its ids, columns and placeholders look like; what the
user sets; and the text that is then written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from foldrace.config.schema import DataConfig
from foldrace.core.errors import DataError, RunFailure
from foldrace.dataset.submission_form import match_classes
from foldrace.dataset.test_set import ImageSet, read_test_set
from foldrace.inference.submission import check_submission, submission_csv

TWO, THREE, BITS = ("cat", "dog"), ("cat", "dog", "owl"), ("0", "1")
IDS = ("t2", "t0", "t1")


def read(
    folder: Path, sample: str | None, classes: Sequence[str] = TWO, **keys: object
) -> ImageSet:
    """Test images t0.jpg, t1.jpg, t2.jpg in a folder `test`, ids as the sample has them."""
    for i in range(3):
        (folder / "test").mkdir(exist_ok=True)
        (folder / "test" / f"t{i}.jpg").write_bytes(b"x")
    if sample is not None:
        (folder / "sample.csv").write_text(sample, encoding="utf-8")
        keys["sample_submission"] = str(folder / "sample.csv")
    data = DataConfig.model_validate({"train": "t.csv", "test": str(folder / "test"), **keys})
    found = read_test_set(data, classes)
    assert found is not None
    return found


def problems(folder: Path, sample: str, classes: Sequence[str] = TWO, **keys: object) -> str:
    with pytest.raises(DataError) as error:
        read(folder, sample, classes, **keys)
    return str(error.value)


def column(name: str, *cells: str, ids: Sequence[str] = IDS) -> str:
    """A sample of one column; one cell for all rows or one for each."""
    each = cells * len(ids) if len(cells) == 1 else cells
    return f"id,{name}\n" + "".join(f"{i},{cell}\n" for i, cell in zip(ids, each, strict=True))


PROB = np.array([[0.125, 0.875], [0.5, 0.5], [0.75, 0.25]])


def written(found: ImageSet, classes: Sequence[str], prob: NDArray[np.float64] = PROB) -> str:
    """The checked text of a submission."""
    text = submission_csv(found, classes, prob)
    check_submission(text, found)
    return text


@pytest.mark.parametrize(
    ("sample", "classes", "kind", "of"),
    [
        (column("target", "cat"), TWO, "labels", None),
        (column("target", "cat", "dog", "cat"), TWO, "labels", None),
        (column("target", ""), TWO, "labels", None),
        (column("target", "NaN"), TWO, "labels", None),
        (column("target", "-"), THREE, "labels", None),
        (column("target", "0"), TWO, "labels", None),  # the training table's column
        (column("class", "0"), THREE, "labels", None),
        (column("class", "unknown"), THREE, "labels", None),
        (column("label", "1", "0", "1"), BITS, "labels", None),
        (column("label", "4"), tuple("01234"), "labels", None),
        (column("label", "0"), BITS, "probability_of", "1"),
        (column("label", "0.5"), BITS, "probability_of", "1"),
        (column("has_cactus", "0.1", "0.9", "0.5"), BITS, "probability_of", "1"),
        (column("damaged", "0.5"), ("no", "yes"), "probability_of", "yes"),
        (column("dog", "0.5"), TWO, "probability_of", "dog"),
        (column("cat", "0"), TWO, "probability_of", "cat"),
        ("id,dog,cat\n" + "".join(f"{i},0,0\n" for i in IDS), TWO, "probabilities", None),
    ],
)
def test_what_the_sample_asks_for(
    sample: str, classes: tuple[str, ...], kind: str, of: str | None, tmp_path: Path
) -> None:
    found = read(tmp_path, sample, classes)
    assert (found.form.kind, found.form.of) == (kind, of)
    assert found.ids == IDS
    words = {
        "labels": "the most probable class in column",
        "probability_of": "probability of class",
    }
    assert words.get(kind, "probabilities of 2 classes") in str(found.form)


@pytest.mark.parametrize(
    ("sample", "classes", "words"),
    [
        (column("target", "0.5"), TWO, ("of which class", "probability_of: dog", "or of cat")),
        (column("kind", "0"), TWO, ("of which class are they the probability",)),
        (column("label", "cat", "cow", "cat"), TWO, ("no class of the training data: cow",)),
        (column("target", "0.2", "0.5", "0.9"), THREE, ("no class of the", "data.submission: ")),
        ("id,x,y\nt0,1,2\nt1,1,2\nt2,1,2\n", TWO, ("Several labels of an image, or several",)),
        ("id,cat\nt0,0\nt1,0\nt2,0\n", THREE, ("training classes without a column: dog, owl",)),
        ("id\nt0\nt1\nt2\n", TWO, ("has no column beside 'id'",)),
        (
            column("target", "cat", ids=("a", "b", "c")),
            TWO,
            ("its ids look like 'a', the images'",),
        ),
    ],
)
def test_what_has_two_readings_or_none(
    sample: str, classes: tuple[str, ...], words: tuple[str, ...], tmp_path: Path
) -> None:
    found = problems(tmp_path, sample, classes)
    assert all(word in found for word in words), found


@pytest.mark.parametrize("setting", ["labels", {"probability_of": "dog"}])
@pytest.mark.parametrize("cell", ["0.5", "0", "cat", "?"])
def test_the_user_decides(setting: object, cell: str, tmp_path: Path) -> None:
    found = read(tmp_path, column("target", cell), submission=setting)
    text = written(found, TWO)
    if setting == "labels":
        assert text == column("target", "dog", "cat", "cat")
    else:
        assert text == column("target", "0.875", "0.5", "0.25")
        with pytest.raises(RunFailure, match="every value lies in"):
            check_submission(text.replace("0.875", "1.5"), found)


def test_settings_that_do_not_fit(tmp_path: Path) -> None:
    one, two = column("target", "0.5"), "id,dog,cat\n" + "".join(f"{i},0,0\n" for i in IDS)
    assert "fills one column" in problems(tmp_path, two, THREE, submission="labels")
    assert "without a column: cat, dog" in problems(tmp_path, one, submission="probabilities")
    wrong = {"probability_of": "dgo"}
    found = problems(tmp_path, one, submission=wrong)
    assert "got 'dgo'; did you mean 'dog'? allowed: cat, dog" in found


def test_without_a_sample_the_setting_gives_the_form(tmp_path: Path) -> None:
    ids = [f"t{i}.jpg" for i in range(3)]
    assert written(read(tmp_path, None), TWO).startswith("id,cat,dog\nt0.jpg,0.125,0.875\n")
    labels = read(tmp_path, None, submission="labels", label_column="kind")
    assert written(labels, TWO) == column("kind", "dog", "cat", "cat", ids=ids)
    one = read(tmp_path, None, submission={"probability_of": "dog"})
    assert written(one, TWO) == column("dog", "0.875", "0.5", "0.25", ids=ids)


@pytest.mark.parametrize("header", ["", "Unnamed: 0", "index"])
@pytest.mark.parametrize("first", [0, 1, 17])
def test_row_numbers_of_the_sample_stay_where_they_are(
    header: str, first: int, tmp_path: Path
) -> None:
    rows = "".join(f"{n},{i},cat\n" for n, i in enumerate(IDS, start=first))
    found = read(tmp_path, f"{header},id,target\n{rows}")
    assert (found.form.kind, found.id_column, found.ids) == ("labels", "id", IDS)
    text = written(found, TWO)
    expected = zip(IDS, ("dog", "cat", "cat"), strict=True)
    assert text == f"{header},id,target\n" + "".join(
        f"{n},{i},{kind}\n" for n, (i, kind) in enumerate(expected, start=first)
    )
    with pytest.raises(RunFailure, match="ids equal"):
        check_submission(text.replace(f"\n{first},", "\n7,"), found)


@pytest.mark.parametrize("columns", [("id", "class", "p"), ("id", "p", "class")])
def test_the_long_form_has_a_row_for_each_image_and_class(
    columns: tuple[str, ...], tmp_path: Path
) -> None:
    """In the sample's order, which may be any."""
    pairs = [(i, c) for c in ("dog", "cat") for i in IDS]
    cells = [{"id": i, "class": c, "p": "0"} for i, c in pairs]
    sample = ",".join(columns) + "\n"
    sample += "".join(",".join(row[name] for name in columns) + "\n" for row in cells)
    found = read(tmp_path, sample)
    assert (found.form.kind, found.ids) == ("long", IDS)
    text = written(found, TWO)
    lines = [dict(zip(columns, line.split(","), strict=True)) for line in text.splitlines()[1:]]
    assert [(line["id"], line["class"]) for line in lines] == pairs
    assert [float(line["p"]) for line in lines] == [0.875, 0.5, 0.25, 0.125, 0.5, 0.75]
    with pytest.raises(RunFailure, match="every row sums to 1"):
        check_submission(text.replace("0.875", "0.5"), found)


@pytest.mark.parametrize("mark", ["_", "-", ":"])
def test_the_long_form_whose_ids_end_with_the_class(mark: str, tmp_path: Path) -> None:
    rows = [f"{i}{mark}{c}" for i in IDS for c in TWO]
    found = read(tmp_path, "ID,Label\n" + "".join(f"{row},0.5\n" for row in rows))
    assert (found.form.kind, found.ids) == ("long", IDS)
    expected = zip(rows, PROB.ravel(), strict=True)
    assert written(found, TWO) == "ID,Label\n" + "".join(f"{r},{p:g}\n" for r, p in expected)


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        (("t2.jpg", "t0.jpg", "t1.jpg"), False),
        (("t2", "t0", "t1"), True),
        (("test/t2.jpg", "test/t0.jpg", "test/t1.jpg"), True),
        (("./test/t2.jpg", "./test/t0.jpg", "./test/t1.jpg"), True),
        (("test\\t2.jpg", "test\\t0.jpg", "test\\t1.jpg"), True),
        (("test/t2", "test/t0", "test/t1"), True),
        (("T2.png", "T0.png", "T1.png"), True),
    ],
)
def test_ids_of_the_sample(ids: tuple[str, ...], told: bool, tmp_path: Path) -> None:
    found = read(tmp_path, column("target", "cat", ids=ids))
    assert found.ids == ids
    assert [found.file(row).name for row in range(3)] == ["t2.jpg", "t0.jpg", "t1.jpg"]
    assert any("ids matched by" in note for note in found.readings) == told
    assert written(found, TWO) == column("target", "dog", "cat", "cat", ids=ids)


def test_ids_that_have_lost_their_zeros(tmp_path: Path) -> None:
    folder = tmp_path / "test"
    folder.mkdir()
    for i in range(1, 4):
        (folder / f"{i:05d}.jpg").write_bytes(b"x")
    (tmp_path / "s.csv").write_text(column("target", "cat", ids="312"), encoding="utf-8")
    sample = str(tmp_path / "s.csv")
    found = read_test_set(DataConfig(train="t", test=str(folder), sample_submission=sample), TWO)
    assert found is not None
    assert [found.file(row).name for row in range(3)] == ["00003.jpg", "00001.jpg", "00002.jpg"]


@pytest.mark.parametrize(
    ("names", "meant"),
    [
        (("Dog", "CAT"), ["dog", "cat"]),
        (("prob_dog", "prob_cat"), ["dog", "cat"]),
        (("dog.p", "cat.p"), ["dog", "cat"]),
        (("Class_Dog", "Class_Cat"), ["dog", "cat"]),
        (("dog", "dog"), None),
        (("dog", "cow"), None),
        (("dog",), None),
    ],
)
def test_columns_that_are_called_nearly_like_classes(
    names: tuple[str, ...], meant: list[str] | None
) -> None:
    assert match_classes(names, TWO) == meant
    assert match_classes(("car_a_x", "car_b_x"), ("car_a", "car_b")) == ["car_a", "car_b"]
    assert match_classes(("cat", "Cat"), ("Cat", "cat")) == ["cat", "Cat"]
    assert match_classes(("1.0", "0.0"), ("0", "1")) == ["1", "0"]


def test_their_header_stays_as_it_is(tmp_path: Path) -> None:
    found = read(tmp_path, "id,prob_dog,prob_cat\n" + "".join(f"{i},0,0\n" for i in IDS))
    assert "'prob_dog' is class 'dog'" in str(found.form)
    assert written(found, TWO).startswith("id,prob_dog,prob_cat\nt2,0.875,0.125\n")


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_what_stands_between_the_cells_stays(mark: str, tmp_path: Path) -> None:
    sample = "id,dog,cat\n" + "".join(f"{i},0,0\n" for i in IDS)
    found = read(tmp_path, sample.replace(",", mark))
    assert written(found, TWO).startswith(f"id{mark}dog{mark}cat\nt2{mark}0.875{mark}0.125\n")


def test_a_sample_without_a_test_set_is_a_problem_at_once(tmp_path: Path) -> None:
    sample = str(tmp_path / "s.csv")
    with pytest.raises(DataError, match=r"s\.csv: there is no data\.test"):
        read_test_set(DataConfig(train="t.csv", sample_submission=sample), TWO)
