"""Tables in the files that people have: any encoding, any separator, JSON lines, Parquet."""

from __future__ import annotations

import random
import string
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldrace.core.errors import Problem
from foldrace.dataset.readers import likely_encoding
from foldrace.dataset.tables import Table, read_table

LINES = ["image,label,weight", "사진 1.jpg,고양이,1", "b.jpg,강아지,2"]


def read(path: Path, encoding: str | None = None) -> tuple[Table | None, list[str]]:
    problems: list[Problem] = []
    table = read_table(path, path.name, problems, encoding)
    return table, [str(problem) for problem in problems]


def sound(path: Path, encoding: str | None = None) -> Table:
    table, problems = read(path, encoding)
    assert problems == [] and table is not None
    return table


@pytest.mark.parametrize(
    ("encoding", "words"),
    [
        ("cp949", "고양이 강아지 올빼미"),
        ("cp949", "정상 불량"),
        ("cp949", "현대_그랜저 기아_K5 쌍용_티볼리"),
        ("cp932", "ネコ イヌ"),
        ("cp932", "正常 異常"),
        ("gb18030", "老虎 狮子 大象"),
        ("big5", "貓咪 小狗"),
        ("cp1252", "Bär Löwe Äffchen"),
        ("cp1252", "café crème brûlée"),
        ("cp1252", "piñata niño"),
        ("cp1250", "žába kočka jabłko"),
        ("cp1254", "kuş köpek ağaç"),
        ("cp1251", "кошка собака"),
        ("koi8-r", "яблоко груша"),
        ("cp866", "Норма Дефект"),
        ("cp1253", "γάτα σκύλος"),
        ("cp1255", "חתול כלב"),
        ("cp1256", "قطة كلب"),
        ("cp874", "แมว สุนัข"),
        ("cp850", "Bär Löwe"),
    ],
)
def test_older_encodings_are_found_by_their_letters_and_named(
    encoding: str, words: str, tmp_path: Path
) -> None:
    names = words.split()
    text = "image,label\n" + "".join(f"im{i:02d}.jpg,{names[i % len(names)]}\n" for i in range(6))
    (tmp_path / "t.csv").write_bytes(text.encode(encoding))
    table = sound(tmp_path / "t.csv")
    assert set(table.cells("label")) == set(names)
    [note] = table.notes
    assert note.startswith("t.csv: read as cp") or encoding in note
    assert "data.encoding names another" in note


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be",
                                      "utf-32"])  # fmt: skip
def test_what_the_bytes_give_away_needs_no_word(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("\n".join(LINES).encode(encoding))
    table = sound(tmp_path / "t.csv", encoding="cp1252")  # for what is no Unicode
    assert (table.columns, table.notes) == (("image", "label", "weight"), ())
    assert table.cells("label") == ["고양이", "강아지"]


def test_the_given_encoding(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes("image,label\na.jpg,汽车\nb.jpg,飞机\n".encode("gb18030"))
    table = sound(path, encoding="gb18030")
    assert (table.cells("label"), table.notes) == (["汽车", "飞机"], ())
    assert read(path, encoding="ascii")[1][0].startswith("t.csv: is not text in ascii")


@given(st.binary(max_size=200))
def test_no_bytes_stop_the_look_for_letters(data: bytes) -> None:
    found = likely_encoding(data)
    assert found is None or data.decode(found) is not None


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".txt"])
@pytest.mark.parametrize(("mark", "word"), [(",", ""), ("\t", ""), (";", "semicolons"),
                                            ("|", "bars")])  # fmt: skip
def test_what_stands_between_the_cells(mark: str, word: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"t{suffix}"
    path.write_text("\n".join(line.replace(",", mark) for line in LINES), encoding="utf-8")
    table = sound(path)
    assert table.columns == ("image", "label", "weight")
    assert table.notes == ((f"t{suffix}: {word} between the cells",) if word else ())


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("id\na\nb\n", ("id",)),
        ("id;x\na,1;b,2\nc,3;d,4\n", ("id", "x")),
        ('id,x\n"a;1","b;2"\n"c;3","d;4"\n', ("id", "x")),
        ("id,x;y\na,b;c\n", ("id", "x;y")),
        ('id;"x;y"\n1;2\n', ("id", "x;y")),
    ],
)
def test_separators_within_cells(text: str, columns: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    assert sound(tmp_path / "t.csv").columns == columns


def test_the_same_table_in_each_form(tmp_path: Path) -> None:
    """As pandas writes it; a number beside a missing one becomes 3.0 in all of them."""
    frame = pd.DataFrame(
        {
            "image": ["a.jpg", "나.jpg", "c.jpg"],
            "label": ["01", "NA", "x, y"],
            "count": [3, None, 5],
            "ok": [True, False, True],
        }
    )
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_csv(tmp_path / "t.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "t.parquet", index=False)
    frame.to_json(tmp_path / "t.jsonl", orient="records", lines=True, force_ascii=False)
    tables = [sound(tmp_path / f"t{suffix}") for suffix in (".csv", ".tsv", ".parquet", ".jsonl")]
    for table in tables:
        assert table.columns == ("image", "label", "count", "ok")
        assert table.cells("image") == ["a.jpg", "나.jpg", "c.jpg"]
        assert table.cells("label") == ["01", "NA", "x, y"]
        assert table.cells("count") == ["3.0", "", "5.0"]
        assert [cell.lower() for cell in table.cells("ok")] == ["true", "false", "true"]
    assert [table.lines for table in tables] == [(2, 3, 4), (2, 3, 4), (1, 2, 3), (1, 2, 3)]


def test_json_lines_with_other_keys_in_each(tmp_path: Path) -> None:
    text = '{"file_name": "a.jpg", "label": 3}\n\n{"label": null, "file_name": "b.jpg", "n": [1]}\n'
    (tmp_path / "t.jsonl").write_text(text, encoding="utf-8")
    table = sound(tmp_path / "t.jsonl")
    assert table.columns == ("file_name", "label", "n")
    assert table.rows == (["a.jpg", "3", ""], ["b.jpg", "", "[1]"])
    assert table.lines == (1, 3)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("t.jsonl", b'{"a": 1}\n{"a": \n', "line 2 is not valid JSON"),
        ("t.jsonl", b'{"a": 1}\n[1, 2]\n', "line 2 holds list; needed: one object a line"),
        ("t.jsonl", b"[" * 100_000, "line 1 is not valid JSON"),
        ("t.jsonl", b"", "has no rows"),
        ("t.parquet", b"PAR1 and no more", "cannot be read as Parquet"),
        ("t.csv", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\xff\xfe", "is text in no encoding"),
    ],
)
def test_what_is_no_table(name: str, data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    table, problems = read(tmp_path / name)
    assert table is None
    assert words in problems[0]


def test_few_bytes_that_stand_for_very_many_cells_are_refused(tmp_path: Path) -> None:
    zeros = pa.table({"a": pa.array(np.zeros(10_000_001, np.int8))})
    pq.write_table(zeros, tmp_path / "t.parquet")
    lines = "\n".join(f'{{"k{i}": 1}}' for i in range(3_200))
    (tmp_path / "t.jsonl").write_text(lines)
    for name, cells in (("t.parquet", "10,000,001"), ("t.jsonl", "10,240,000")):
        assert (tmp_path / name).stat().st_size < 100_000
        table, problems = read(tmp_path / name)
        assert table is None
        assert f"has {cells} cells in " in problems[0] and "allowed: 10,000,000" in problems[0]


def test_a_text_that_is_there_a_million_times_is_held_once(tmp_path: Path) -> None:
    """Else the file below would take a terabyte."""
    word = "".join(random.Random(0).choices(string.ascii_letters, k=1_000_000))
    column = pa.DictionaryArray.from_arrays(np.zeros(1_000_000, np.int32), [word])
    pq.write_table(pa.table({"a": column}), tmp_path / "t.parquet")
    table = sound(tmp_path / "t.parquet")
    assert len(table.rows) == 1_000_000
    assert table.rows[0][0] == word and table.rows[0][0] is table.rows[-1][0]


def test_columns_of_every_kind_in_a_parquet_file(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": pa.array(["a", None, "나"]),
            "large": pa.array(["b", "b", None], pa.large_string()),
            "kind": pa.array(["x", None, "x"]).dictionary_encode(),
            "whole": pa.array([1, None, 3]),
            "list": pa.array([[1], None, []]),
            "day": pa.array([date(2001, 1, 1), None, None]),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    found = sound(tmp_path / "t.parquet")
    assert found.rows == (
        ["a", "b", "x", "1", "[1]", '"2001-01-01"'],
        ["", "b", "", "", "", ""],
        ["나", "", "x", "3", "[]", ""],
    )


def test_pictures_within_a_parquet_file(tmp_path: Path) -> None:
    frame = pd.DataFrame({"image": [{"bytes": b"\xff\xd8", "path": "a.jpg"}] * 2, "label": [0, 1]})
    frame.to_parquet(tmp_path / "t.parquet")
    assert (
        "it holds the pictures themselves; write them to files"
        in read(tmp_path / "t.parquet")[1][0]
    )
