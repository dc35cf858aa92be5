"""Plugins' rows in a table: what is added, what is refused and where, who has them."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from foldrace.core.errors import ConfigError, Problem, RunFailure
from foldrace.core.metrics import METRICS, Metric
from foldrace.core.plugin_files import PluginFile
from foldrace.core.plugins import (
    NO_PARTS,
    Parts,
    PluginTable,
    Table,
    UnfitRow,
    check_plugins,
    load_parts,
    naming_plugins,
)
from foldrace.core.standard_errors import all_metrics

HEAD = "from foldrace.core.metrics import Metric\n"
OWN = HEAD + "def f(prob, labels):\n    return 1.0\nPARTS = [Metric('own', 'mine', f, True)]\n"


def _used(row: Metric) -> None:
    if row.function(np.ones((2, 2)) / 2, np.zeros(2, np.int64)) != 1.0:
        raise UnfitRow("should be 1")


TABLES = (PluginTable(METRICS, _used),)
BUILT_IN = list(METRICS)
SHOWN = [name for name in BUILT_IN if name != "qwk"]


def file(name: str, source: str) -> PluginFile:
    return PluginFile(name, source.encode(), f"/gone/{name}.py")


def checked(folder: Path, source: str) -> tuple[Parts, list[Problem]]:
    """The parts and the problems of one file, less the folder in `where`."""
    path = folder / "own_parts.py"
    path.write_text(source, encoding="utf-8")
    parts, problems = check_plugins([str(path)], TABLES)
    return parts, [Problem(p.where.removeprefix(f"{path} "), p.message) for p in problems]


def test_rows_stand_after_the_built_in_ones_of_whoever_has_them() -> None:
    first, second = file("own_a", OWN), file("own_b", OWN.replace("'own'", "'other'"))
    both, one = load_parts([first, second], TABLES), load_parts([second], TABLES)
    assert list(both[METRICS]) == [*BUILT_IN, "own", "other"]
    assert list(one[METRICS]) == [*BUILT_IN, "other"] and one.files == (second,)
    assert list(NO_PARTS[METRICS]) == list(METRICS) == BUILT_IN


def test_built_in_tables_do_not_change() -> None:
    with pytest.raises(TypeError, match="does not support item assignment"):
        METRICS["own"] = METRICS["accuracy"]  # type: ignore[index]
    with pytest.raises(TypeError, match="does not support item deletion"):
        del METRICS["accuracy"]  # type: ignore[attr-defined]
    NO_PARTS[METRICS] | {"own": METRICS["accuracy"]}  # type: ignore[operator]
    assert list(METRICS) == BUILT_IN


def test_loading_again_changes_nothing_even_from_another_place() -> None:
    here = load_parts([file("own_a", OWN)], TABLES)
    there = load_parts([PluginFile("own_a", OWN.encode(), "/run/plugins/own_a.py")], TABLES)
    assert there[METRICS]["own"] is here[METRICS]["own"]


def test_two_versions_of_a_file_are_there_at_once() -> None:
    old = load_parts([file("own_a", OWN)], TABLES)
    new = load_parts([file("own_a", OWN.replace("1.0", "2.0"))], TABLES)
    values = [
        parts[METRICS]["own"].function(np.empty(0), np.empty(0))  # type: ignore[arg-type]
        for parts in (old, new, old)
    ]
    assert values == [1.0, 2.0, 1.0]


def test_another_process_makes_the_parts_of_their_files() -> None:
    parts = load_parts([file("own_a", OWN)], TABLES)
    sent = pickle.dumps(parts)
    assert b"own_a" in sent and len(sent) < len(OWN) + 300  # no function of it
    assert list(pickle.loads(sent)[METRICS]) == [*BUILT_IN, "own"]


def test_rows_of_tables_that_a_process_does_not_know_are_left_out() -> None:
    both = HEAD + "PARTS = ['a text', Metric('own', '', lambda p, t: 1.0, True)]"
    parts = load_parts([file("own_a", both)], TABLES)
    texts = Table(str, "text", (), key="__doc__")
    assert list(parts[texts].values()) == ["a text"] and "own" in parts[METRICS]


@pytest.mark.parametrize(
    ("source", "where", "message"),
    [
        ("x = 1\n", "", "defines no PARTS; it should end in PARTS = ["),
        ("x = 1\nPARTS = 3\n", "line 2", "has PARTS = 3"),
        ("PARTS = [\n  1,\n  'x',\n]\n", "line 2", "holds 1; allowed are records: Metric"),
        (HEAD + "PARTS = [Metric]\n", "line 2", "holds <class 'foldrace.core.metrics.Metric'>"),
        (HEAD + "PARTS = [Metric('own')]\n", "line 2", "missing 3 required positional"),
        (OWN.replace("'own'", "'accuracy'"), "line 4", "'accuracy' exists already, in Foldrace"),
        (OWN.replace("'own'", "7"), "line 4", "name is 7, should be a text"),
        (OWN.replace("1.0", "2.0"), "line 4", "metric 'own' should be 1"),
        (OWN.replace("1.0", "1 / 0"), "line 3", "'own', tried, raises ZeroDivisionError"),
        (OWN.replace("f(prob, labels)", "f(prob)"), "line 4", "'own', tried, raises TypeError"),
        (OWN.replace("= [", ": list = [m for m in [").replace("]\n", "]] * 2\n"), "line 4",
         "'own' exists already, in"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_line(
    tmp_path: Path, source: str, where: str, message: str
) -> None:
    problem = checked(tmp_path, source)[1][0]
    assert message in problem.message
    assert problem.where == (where or f"{tmp_path}/own_parts.py")


def test_every_problem_at_once_and_the_right_rows_are_there(tmp_path: Path) -> None:
    source = OWN.rstrip("]\n") + ",\n  Metric('accuracy', '', f, True), 5,\n]\n"
    parts, problems = checked(tmp_path, source)
    assert [p.where for p in problems] == ["line 5", "line 5"]
    assert "accuracy" in problems[0].message and "holds 5" in problems[1].message
    assert "own" in parts[METRICS]


def test_two_plugins_with_one_name_name_each_other(tmp_path: Path) -> None:
    for name in ("own_a", "own_b"):
        (tmp_path / f"{name}.py").write_text(OWN)
    _, [problem] = check_plugins([str(tmp_path / f"own_{x}.py") for x in "ba"], TABLES)
    assert problem.where == f"{tmp_path}/own_b.py line 4"
    assert f"in {tmp_path}/own_a.py line 4" in problem.message


def test_a_broken_plugin_stays_broken_in_a_process_that_is_used_again() -> None:
    wrong = file("own_a", OWN.replace("'own'", "'accuracy'"))
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"/gone/own_a\.py line 4"):
            load_parts([wrong], TABLES)


def test_errors_out_of_a_plugin_name_it() -> None:
    parts = load_parts([file("own_a", OWN.replace("1.0", "1 / 0"))], TABLES)
    named = r"plugin /gone/own_a\.py line 3: ZeroDivisionError"
    with pytest.raises(RunFailure, match=named), naming_plugins():
        parts[METRICS]["own"].function(np.empty(0), np.empty(0))  # type: ignore[arg-type]
    with pytest.raises(KeyError), naming_plugins():
        raise KeyError("of our own")


def test_a_metric_that_fails_later_costs_a_warning_alone(caplog: pytest.LogCaptureFixture) -> None:
    source = HEAD + (
        "PARTS = [Metric('own', '', lambda p, t: {}['x'], True),\n"
        "         Metric('none', '', lambda p, t: float('nan'), True)]"
    )
    parts = load_parts([file("own_a", source)], TABLES)
    scores = all_metrics(np.array([[0.9, 0.1], [0.8, 0.2]]), np.array([0, 1]), parts)
    assert [score.name for score in scores] == SHOWN and scores[1].value == 0.5
    own = "metric own is left out: plugin /gone/own_a.py line 2: KeyError: 'x'"
    assert own in caplog.text and "metric none is left out: it gives nan" in caplog.text
    assert "Traceback" not in caplog.text


def test_a_metric_cannot_change_what_the_next_one_gets() -> None:
    source = HEAD + "PARTS = [Metric('own', '', lambda p, t: p.sort() or t.fill(0) or 1.0, True)]"
    prob, labels = np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 1])
    before = all_metrics(prob, labels)
    parts = load_parts([file("own_a", source)], TABLES)
    assert all_metrics(prob, labels, parts) == before  # it fails
    labels[0] = 1  # ours may be written to as ever
