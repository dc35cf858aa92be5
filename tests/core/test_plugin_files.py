"""Users' files as modules: what may be listed, how they import each other, which line is named."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from pathlib import Path
from types import ModuleType

import pytest

from foldrace.core.errors import Problem
from foldrace.core.plugin_files import (
    PluginFile,
    error_line,
    import_plugins,
    place_of,
    read_plugins,
)


def write(folder: Path, **sources: str) -> list[str]:
    """Paths of the files `<name>.py`."""
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
    return [str(folder / f"{name}.py") for name in sources]


def imported(paths: list[str]) -> list[ModuleType | Problem]:
    files, problems = read_plugins(paths)
    assert problems == []
    return list(import_plugins(files).values())


def test_listed_files_import_each_other_in_any_order(tmp_path: Path) -> None:
    paths = write(
        tmp_path, own_parts="from own_blocks import SIDE\nAREA = SIDE**2", own_blocks="SIDE = 3"
    )
    for listed in (paths, paths[::-1]):
        modules = {m.__name__[:-13]: m for m in imported(listed)}  # type: ignore[union-attr]
        assert modules.keys() == {"own_parts", "own_blocks"}
        assert modules["own_parts"].AREA == 9  # type: ignore[union-attr]


def test_all_forms_of_an_import_find_the_other_file(tmp_path: Path) -> None:
    late = "def late():\n    import own_blocks\n    return own_blocks.SIDE\n"
    forms = "import own_blocks\nimport own_blocks as b\nfrom own_blocks import *\nimport os.path\n"
    found = "SEEN = [own_blocks.SIDE, b.SIDE, SIDE, os.path.sep]\n"
    paths = write(tmp_path, own_blocks="SIDE = 3\n", own_parts=forms + found + late)
    module = imported(paths)[1]
    assert isinstance(module, ModuleType)
    assert module.SEEN == [3, 3, 3, "/"] and module.late() == 3


def test_files_that_import_each_other_in_a_circle(tmp_path: Path) -> None:
    paths = write(
        tmp_path,
        own_a="import own_b\nX = 1\ndef y(): return own_b.Y\n",
        own_b="import own_a\nY = 2\ndef x(): return own_a.X\n",
    )
    a, b = imported(paths)
    assert a.y() == 2 and b.x() == 1  # type: ignore[union-attr]


def test_two_versions_of_a_file_live_beside_each_other(tmp_path: Path) -> None:
    """Also where the file itself is the same and another that it imports is not."""
    found = []
    for side in (3, 4):
        (tmp_path / str(side)).mkdir()
        paths = write(
            tmp_path / str(side),
            own_blocks=f"SIDE = {side}\n",
            own_parts="import own_blocks\ndef area(): return own_blocks.SIDE**2\n",
        )
        found.append(imported(paths)[1])
    assert [module.area() for module in found] == [9, 16]  # type: ignore[union-attr]
    assert not {"own_parts", "own_blocks"} & sys.modules.keys()


def test_equal_files_run_once_in_a_process(tmp_path: Path) -> None:
    [path] = write(tmp_path, own_once="VALUE = object()\n")
    [module] = imported([path])
    moved = PluginFile("own_once", b"VALUE = object()\n", "/run/plugins/own_once.py")
    assert list(import_plugins([moved]).values()) == [module]


def test_a_record_of_postponed_annotations_finds_its_module(tmp_path: Path) -> None:
    source = (
        "from __future__ import annotations\nfrom pydantic import BaseModel\n"
        "class Part(BaseModel):\n    inner: Other | None = None\n"
        "class Other(BaseModel):\n    x: int = 0\nVALUE = Part(inner=Other(x=3))\n"
    )
    [module] = imported(write(tmp_path, own_records=source))
    assert isinstance(module, ModuleType) and module.VALUE.inner.x == 3


def test_code_runs_from_memory_wherever_the_file_is() -> None:
    source = b"# -*- coding: cp949 -*-\nNAME = '" + "사과".encode("cp949") + b"'\ndef f(): pass\n"
    file = PluginFile("own_words", source, "s3://bucket/run/plugins/own_words.py")
    [module] = import_plugins([file]).values()
    assert isinstance(module, ModuleType) and module.NAME == "사과"
    assert inspect.getsource(module.f) == "def f(): pass\n"


def test_what_is_not_listed_cannot_be_imported(tmp_path: Path) -> None:
    imported(write(tmp_path, own_old="X = 1"))
    new = PluginFile("own_new", b"import own_old", "/gone/own_new.py")
    [problem] = import_plugins([new]).values()
    assert isinstance(problem, Problem) and "No module named 'own_old'" in problem.message
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("own_old")


def test_the_plugin_wins_over_a_file_of_its_name_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cwd").mkdir()
    write(tmp_path / "cwd", own_parts="X = 'working folder'")
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.syspath_prepend(str(tmp_path / "cwd"))
    [module] = imported(write(tmp_path, own_parts="X = 'plugin'"))
    assert isinstance(module, ModuleType) and module.X == "plugin"


def test_the_plugin_wins_over_a_module_of_its_name_that_is_there_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "own_parts", ModuleType("own_parts"))
    file = PluginFile("own_parts", b"X = 1", "s3://bucket/run/plugins/own_parts.py")
    [module] = import_plugins([file]).values()
    assert isinstance(module, ModuleType) and module.X == 1


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("\nCUDA error: assert\nCompile with this."), "CUDA error: assert"),
        (
            RuntimeError("Caught.\nTraceback (most recent call last):\n  x\nKeyError: 1"),
            "KeyError: 1",
        ),
        (SyntaxError("invalid syntax"), "invalid syntax"),
    ],
)
def test_an_error_in_one_line(error: Exception, line: str) -> None:
    assert error_line(error) == f"{type(error).__name__}: {line}"
    assert error_line(ValueError()) == "ValueError"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own-parts.py", "letters, digits and _"),
        ("class.py", "letters, digits and _"),
        ("parts.txt", "ending in .py"),
        ("json.py", "would hide the Python module 'json'"),
        ("torch.py", "would hide the Python module 'torch'"),
        ("trainables.py", "would hide the Python module 'trainables'"),
    ],
)
def test_names_that_cannot_be_imported(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_text("PARTS = []")
    files, [problem] = read_plugins([str(tmp_path / name)])
    assert files == () and problem.where == str(tmp_path / name) and message in problem.message


def test_missing_files_and_folders_are_told_with_the_rest(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    paths = [*write(tmp_path, own_a=""), *write(tmp_path / "other", own_a="")]
    files, problems = read_plugins([str(tmp_path / "gone.py"), str(tmp_path), *paths, paths[0]])
    assert [f.path for f in files] == paths[:1]
    assert [p.where for p in problems] == [str(tmp_path / "gone.py"), str(tmp_path), paths[1]]
    assert "No such file" in problems[0].message and "is a folder" in problems[1].message
    assert f"has the name of {paths[0]}" in problems[2].message


def test_imports_that_would_work_here_alone(tmp_path: Path) -> None:
    write(tmp_path, own_helper="")
    (tmp_path / "own_package").mkdir()
    source = "import json, own_helper\ndef f():\n    from own_package.x import y\nfrom . import z\n"
    [path] = write(tmp_path, own_parts=source)
    _, problems = read_plugins([path])
    assert [p.where for p in problems] == [f"{path} line {line}" for line in (1, 3, 4)]
    assert "'own_helper'" in problems[0].message and "Add own_helper.py" in problems[0].message
    assert "'own_package'" in problems[1].message and "relative import" in problems[2].message


@pytest.mark.parametrize(
    ("source", "line", "message"),
    [
        ("x = 1\ndef f(:\n", 2, "SyntaxError: invalid syntax"),
        ("import math\n\nmath.sqrt(-1)\n", 3, "ValueError: "),
        ("import own_missing\n", 1, "ModuleNotFoundError: No module named 'own_missing'"),
        ("import sys\nsys.exit(0)\n", 2, "SystemExit: 0"),
        ("open(__file__)\n", 1, "NameError: name '__file__' is not defined"),
    ],
)
def test_a_file_that_cannot_be_run(tmp_path: Path, source: str, line: int, message: str) -> None:
    [path] = write(tmp_path, own_parts=source)
    [problem] = imported([path])
    assert isinstance(problem, Problem) and problem.where == f"{path} line {line}"
    assert "cannot be imported" in problem.message and message in problem.message


def test_the_innermost_plugin_line_is_named(tmp_path: Path) -> None:
    paths = write(
        tmp_path,
        own_parts="from own_blocks import fail\ndef run():\n    fail()\n",
        own_blocks="\n\ndef fail():\n    int('x')\n",
    )
    module = imported(paths)[1]
    with pytest.raises(ValueError, match="invalid literal") as caught:
        module.run()  # type: ignore[union-attr]
    assert place_of(caught.value) == f"{paths[1]} line 4"
    text = "".join(traceback.format_exception(caught.value))
    assert place_of(RuntimeError(f"in a worker process:\n{text}")) == f"{paths[1]} line 4"
    assert place_of(ValueError("of our own")) is None
    try:
        raise RuntimeError("wrapped") from caught.value
    except RuntimeError as error:
        assert place_of(error) == f"{paths[1]} line 4"


@pytest.mark.parametrize("source", ["-" * 20_000 + "1", "(" * 300, "x = " + "[" * 150 + "]" * 150])
def test_a_file_too_deep_for_the_parser_is_told_or_runs(tmp_path: Path, source: str) -> None:
    [found] = imported(write(tmp_path, deep=source))
    fails = source[0] != "x"
    assert isinstance(found, Problem) == fails
    assert not fails or "the plugin cannot be imported: " in str(found)
