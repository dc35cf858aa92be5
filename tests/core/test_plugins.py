"""Plugins' rows in a table: what is added, what is refused and where, what goes again."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from foldrace.core.errors import ConfigError, Problem, RunFailure
from foldrace.core.metrics import METRICS, Metric, all_metrics
from foldrace.core.plugin_files import PluginFile
from foldrace.core.plugins import (
    PluginTable,
    UnfitRow,
    check,
    load,
    loaded,
    naming_plugins,
    require,
)

pytestmark = pytest.mark.usefixtures("plugins_end")
HEAD = "from foldrace.core.metrics import Metric\n"
OWN = HEAD + "def f(prob, labels):\n    return 1.0\nPARTS = [Metric('own', 'mine', f, True)]\n"


def _used(row: Metric) -> None:
    if row.function(np.ones((2, 2)) / 2, np.zeros(2, np.int64)) != 1.0:
        raise UnfitRow("should be 1")


PLUGIN_TABLES = (PluginTable(Metric, "metric", METRICS, _used),)
BUILT_IN = list(METRICS)


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    yield
    load((), PLUGIN_TABLES)
    assert list(METRICS) == BUILT_IN


def file(name: str, source: str) -> PluginFile:
    return PluginFile(name, source.encode(), f"/gone/{name}.py")


def found(folder: Path, source: str) -> list[Problem]:
    """The problems of one file, less the folder in `where`."""
    (folder / "own_parts.py").write_text(source, encoding="utf-8")
    problems = check([str(folder / "own_parts.py")], PLUGIN_TABLES)
    return [Problem(p.where.removeprefix(f"{folder}/own_parts.py "), p.message) for p in problems]


def test_rows_come_and_go_with_their_files() -> None:
    first, second = file("own_a", OWN), file("own_b", OWN.replace("'own'", "'other'"))
    assert load([first, second], PLUGIN_TABLES) == []
    assert list(METRICS) == [*BUILT_IN, "own", "other"]
    assert load([second], PLUGIN_TABLES) == []
    assert list(METRICS) == [*BUILT_IN, "other"] and loaded() == (second,)
    assert load([], PLUGIN_TABLES) == []
    assert list(METRICS) == BUILT_IN


def test_loading_again_changes_nothing_even_from_another_place() -> None:
    load([file("own_a", OWN)], PLUGIN_TABLES)
    module, row = sys.modules["own_a"], METRICS["own"]
    load([PluginFile("own_a", OWN.encode(), "/run/plugins/own_a.py")], PLUGIN_TABLES)
    assert sys.modules["own_a"] is module and METRICS["own"] is row


def test_a_changed_source_replaces_its_rows() -> None:
    load([file("own_a", OWN)], PLUGIN_TABLES)
    load([file("own_a", OWN.replace("1.0", "2.0"))], PLUGIN_TABLES)
    assert METRICS["own"].function(np.empty(0), np.empty(0)) == 2.0  # type: ignore[arg-type]


def test_tables_that_join_later_get_their_rows_too() -> None:
    texts: dict[str, str] = {}
    both = HEAD + "PARTS = ['a text', Metric('own', '', lambda p, t: 1.0, True)]"
    assert load([file("own_a", both)], PLUGIN_TABLES) == []  # rows of other tables are left out
    text = PluginTable(str, "text", texts, lambda row: None, key="__doc__")
    load([file("own_a", both)], (*PLUGIN_TABLES, text))
    assert list(texts.values()) == ["a text"]
    load([], ())
    assert texts == {} and list(METRICS) == BUILT_IN


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
    problem = found(tmp_path, source)[0]
    assert message in problem.message
    assert problem.where == (where or f"{tmp_path}/own_parts.py")


def test_every_problem_at_once_and_the_right_rows_are_there(tmp_path: Path) -> None:
    source = OWN.rstrip("]\n") + ",\n  Metric('accuracy', '', f, True), 5,\n]\n"
    problems = found(tmp_path, source)
    assert [p.where for p in problems] == ["line 5", "line 5"]
    assert "accuracy" in problems[0].message and "holds 5" in problems[1].message
    assert "own" in METRICS


def test_two_plugins_with_one_name_name_each_other(tmp_path: Path) -> None:
    for name in ("own_a", "own_b"):
        (tmp_path / f"{name}.py").write_text(OWN)
    [problem] = check([str(tmp_path / f"own_{x}.py") for x in "ba"], PLUGIN_TABLES)
    assert problem.where == f"{tmp_path}/own_b.py line 4"
    assert f"in {tmp_path}/own_a.py line 4" in problem.message


def test_a_broken_plugin_stays_broken_in_a_process_that_is_used_again() -> None:
    wrong = file("own_a", OWN.replace("'own'", "'accuracy'"))
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"/gone/own_a\.py line 4"):
            require(load([wrong], PLUGIN_TABLES))


def test_errors_out_of_a_plugin_name_it() -> None:
    load([file("own_a", OWN.replace("1.0", "1 / 0"))], PLUGIN_TABLES)
    named = r"plugin /gone/own_a\.py line 3: ZeroDivisionError"
    with pytest.raises(RunFailure, match=named), naming_plugins():
        METRICS["own"].function(np.empty(0), np.empty(0))  # type: ignore[arg-type]
    with pytest.raises(KeyError), naming_plugins():
        raise KeyError("of our own")


def test_a_metric_that_fails_later_costs_a_warning_alone(caplog: pytest.LogCaptureFixture) -> None:
    source = HEAD + (
        "PARTS = [Metric('own', '', lambda p, t: {}['x'], True),\n"
        "         Metric('none', '', lambda p, t: float('nan'), True)]"
    )
    load([file("own_a", source)], PLUGIN_TABLES)
    scores = all_metrics(np.array([[0.9, 0.1], [0.8, 0.2]]), np.array([0, 1]))
    assert [score.name for score in scores] == BUILT_IN and scores[1].value == 0.5
    own = "metric own is left out: plugin /gone/own_a.py line 2: KeyError: 'x'"
    assert own in caplog.text and "metric none is nan" in caplog.text
    assert "Traceback" not in caplog.text


def test_a_metric_cannot_change_what_the_next_one_gets() -> None:
    source = HEAD + "PARTS = [Metric('own', '', lambda p, t: p.sort() or t.fill(0) or 1.0, True)]"
    prob, labels = np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 1])
    before = all_metrics(prob, labels)
    load([file("own_a", source)], PLUGIN_TABLES)
    assert all_metrics(prob, labels) == before  # it fails
    labels[0] = 1  # ours may be written to as ever
