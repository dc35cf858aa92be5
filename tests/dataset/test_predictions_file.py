"""Tables of probabilities as people write them: read in the run's order, or refused by name."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from foldrace.core.errors import Problem
from foldrace.dataset.predictions_file import ExpectedRows, read_predictions

IDS = ("a/1.jpg", "a/2.jpg", "가/3.jpg", "4, 5.jpg")
CLASSES = ("cat", "개", "owl, grey")
PROB = np.array([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5], [0.0, 0.0, 1.0], [1 / 3, 1 / 3, 1 / 3]])
EXPECTED = ExpectedRows("scored row", IDS, ("image_path", "id"), "the rows of folds.csv", CLASSES)


def table(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()


def usual(id_name: str = "image_path") -> list[list[object]]:
    """Header and rows, neither in the run's order."""
    rows: list[list[object]] = [[CLASSES[2], id_name, CLASSES[0], CLASSES[1]]]
    return rows + [[PROB[i, 2], IDS[i], PROB[i, 0], PROB[i, 1]] for i in (2, 0, 3, 1)]


def read(path: Path) -> tuple[NDArray[np.float64] | None, list[str]]:
    problems: list[Problem] = []
    values = read_predictions(path, EXPECTED, problems)
    assert (values is None) == bool(problems)
    return values, [str(p).removeprefix(f"{path}: ") for p in problems]


def read_rows(folder: Path, rows: Sequence[Sequence[object]]) -> list[str]:
    path = folder / "oof.csv"
    path.write_text(table(rows), encoding="utf-8")
    return read(path)[1]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp949"])
@pytest.mark.parametrize("id_name", ["image_path", "id"])
def test_any_order_and_encoding(tmp_path: Path, encoding: str, id_name: str) -> None:
    path = tmp_path / "oof.csv"
    path.write_text(table(usual(id_name)), encoding=encoding)
    values, problems = read(path)
    assert problems == []
    assert values is not None
    np.testing.assert_allclose(values, PROB, rtol=0, atol=1e-15)


def test_an_unknown_id_name_is_refused(tmp_path: Path) -> None:
    """Also in the first column: its values may be anything. The numbers are told with it."""
    rows = [[row[1], row[0], *row[2:]] for row in usual("file")]
    rows[1][2] = 7
    first, other, values = read_rows(tmp_path, rows)
    assert first == (
        "has no column of ids; its columns: 'file', 'owl, grey', 'cat', '개'; allowed names: "
        "'image_path', 'id'"
    )
    assert other.startswith("columns that are no class: file")
    assert values.startswith("values that are no probability: line 2, column 'cat': '7'")


@pytest.mark.parametrize(("mark", "comma"), [(";", ","), (";", "."), ("\t", "."), ("|", ".")])
def test_another_separator(tmp_path: Path, mark: str, comma: str) -> None:
    text = io.StringIO()
    header, *rows = usual()
    for row in rows:
        row[0], *row[2:] = (str(cell).replace(".", comma) for cell in (row[0], *row[2:]))
    csv.writer(text, delimiter=mark).writerows([header, *rows])
    path = tmp_path / "oof.csv"
    path.write_text(text.getvalue(), encoding="utf-8")
    values, problems = read(path)
    assert problems == [] and values is not None
    np.testing.assert_allclose(values, PROB, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        (PROB * 100, "percent: divide them by 100"),
        (4 * PROB - 2, "logits: give the softmax of each row"),
        (np.log(PROB + 1e-9) - 3, "logits: give the softmax of each row"),
        (np.log(PROB + 1e-9).astype(np.float16), "log-probabilities: give exp of them"),
    ],
)
def test_what_the_numbers_look_like(
    tmp_path: Path, values: NDArray[np.floating], hint: str
) -> None:
    np.save(tmp_path / "oof.npy", values)
    first, *_ = read(tmp_path / "oof.npy")[1]
    assert first.endswith(f"; allowed: numbers from 0 to 1; these look like {hint}")


def test_one_wrong_row_gets_no_hint(tmp_path: Path) -> None:
    values = PROB.copy()
    values[0] = [-1, 1, 1]
    np.save(tmp_path / "oof.npy", values)
    assert read(tmp_path / "oof.npy")[1][0].endswith("allowed: numbers from 0 to 1")


def test_missing_rows_and_values_of_an_npy_are_told_together(tmp_path: Path) -> None:
    values = np.vstack([PROB, PROB])
    values[7, 0] = 7
    np.save(tmp_path / "oof.npy", values)
    shape, number = read(tmp_path / "oof.npy")[1]
    assert shape.startswith("has the shape (8, 3) and the type float64; needed: (4, 3)")
    assert number.startswith("values that are no probability: row 7, column 'cat': 7.0")


def test_another_column_with_an_id_name_is_left_alone(tmp_path: Path) -> None:
    rows = [[*row, "id" if i == 0 else i] for i, row in enumerate(usual())]
    assert read_rows(tmp_path, rows) == []


def test_unicode_forms_spaces_and_backslashes(tmp_path: Path) -> None:
    rows = usual()
    rows[1][1] = " 가\\3.jpg"
    rows[0][3] = "개 "
    assert read_rows(tmp_path, rows) == []


def test_rows_are_scaled_to_one(tmp_path: Path) -> None:
    path = tmp_path / "oof.npy"
    np.save(path, PROB * 0.9991)
    values, _ = read(path)
    assert values is not None
    np.testing.assert_allclose(values, PROB, rtol=0, atol=1e-15)
    np.testing.assert_allclose(values.sum(axis=1), 1, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_npy_types(tmp_path: Path, dtype: type) -> None:
    np.save(tmp_path / "oof.npy", PROB.astype(dtype))
    values, problems = read(tmp_path / "oof.npy")
    assert problems == []
    assert values is not None
    assert values.dtype == np.float64
    np.testing.assert_allclose(values, PROB, rtol=0, atol=1e-3)


def test_wrong_columns_and_ids_are_told_together(tmp_path: Path) -> None:
    rows = usual()
    rows[0] = ["owl, grey", "image_path", "caat", "개"]
    rows[1][1] = "no.jpg"
    rows[4][1] = rows[2][1]
    assert read_rows(tmp_path, rows) == [
        "classes without a column: cat; it needs a column of ids and one for each class",
        "columns that are no class: caat; it needs a column of ids and one for each class",
        "ids that are no scored row of this run: 'no.jpg' (line 2); remove these rows; the run's "
        "ids look like 'a/1.jpg'",
        "2 of 4 scored rows are not in it: a/2.jpg, 가/3.jpg; each needs a row",
        "ids that are there twice: 'a/1.jpg' (lines 3, 5); keep one row of each",
    ]


def test_a_column_twice(tmp_path: Path) -> None:
    rows = [[*row, row[2]] for row in usual()]
    assert read_rows(tmp_path, rows) == [
        "columns that are there twice: cat; it needs a column of ids and one for each class"
    ]


def test_wrong_numbers_name_line_column_and_value(tmp_path: Path) -> None:
    rows = usual()
    rows[1][0], rows[2][2], rows[3][3], rows[4][0] = "x", "1.7", "nan", ""
    assert read_rows(tmp_path, rows) == [
        "values that are no probability: line 2, column 'owl, grey': 'x', line 3, column 'cat': "
        "'1.7', line 4, column '개': 'nan', line 5, column 'owl, grey': ''; allowed: numbers from "
        "0 to 1"
    ]
    rows = usual()
    rows[2][2], rows[3][0] = 0.72, 0.5
    assert read_rows(tmp_path, rows) == [
        "rows that do not sum to 1: line 3: 1.02, line 4: 1.16667; allowed: 1 ± 0.001, so divide "
        "each row by its sum"
    ]


def test_numbers_and_ids_are_told_together(tmp_path: Path) -> None:
    rows = usual()
    rows[1][2], rows[4][1] = -0.5, "no.jpg"
    assert [text.split(":")[0] for text in read_rows(tmp_path, rows)] == [
        "ids that are no scored row of this run",
        "1 of 4 scored rows are not in it",
        "values that are no probability",
    ]


def test_wrong_npy(tmp_path: Path) -> None:
    path = tmp_path / "oof.npy"
    np.save(path, np.full((4, 2), 0.5))
    (problem,) = read(path)[1]
    assert problem == (
        "has the shape (4, 2) and the type float64; needed: (4, 3) floating-point numbers, rows "
        "in the order of the rows of folds.csv, columns in the order of classes.json"
    )
    np.save(path, np.ones((4, 3), dtype=np.int64))
    assert "the type int64" in read(path)[1][0]
    with np.errstate(divide="ignore"):
        np.save(path, np.log(PROB))
    (problem,) = read(path)[1]
    assert "row 0 (a/1.jpg), column 'cat': -0.35667" in problem
    assert problem.endswith("; these look like log-probabilities: give exp of them")
    prob = PROB.copy()
    prob[2] = [np.inf, -np.inf, np.nan]
    np.save(path, prob)
    (problem,) = read(path)[1]
    assert "row 2 (가/3.jpg), column 'cat': inf, row 2 (가/3.jpg), column '개': -inf" in problem


def test_no_pickle_is_read(tmp_path: Path) -> None:
    path = tmp_path / "oof.npy"
    np.save(path, np.array([{}, 1], dtype=object), allow_pickle=True)
    (problem,) = read(path)[1]
    assert problem.startswith("is no readable npy file: ")
    path.write_bytes(b"PK\x03\x04")
    assert "is no readable npy file: " in read(path)[1][0]


def test_missing_and_empty_files(tmp_path: Path) -> None:
    (problem,) = read(tmp_path / "no.csv")[1]
    assert problem == (
        "does not exist; needed: a .csv, .tsv, .jsonl, .ndjson, .parquet or an .npy of predictions"
    )
    (tmp_path / "empty.csv").write_text("image_path,cat,개\n", encoding="utf-8")
    assert "has no rows" in read(tmp_path / "empty.csv")[1][0]


def test_many_faults_are_capped(tmp_path: Path) -> None:
    ids = tuple(str(i) for i in range(500))
    problems: list[Problem] = []
    np.save(tmp_path / "oof.npy", np.full((500, 3), 2.0))
    expected = ExpectedRows("test image", ids, ("id",), "the ids", CLASSES)
    assert read_predictions(tmp_path / "oof.npy", expected, problems) is None
    assert problems[0].message.count("column 'owl, grey': 2.0") == 1
    assert "and 1,495 more; allowed" in problems[0].message
