"""The house's walls: who may import whom, what is packaged, and how soon `--help` answers."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))

MAY_IMPORT: dict[str, set[str]] = {
    "experiment": set(),
    "search_spaces": {"experiment"},
    "trainables": {"experiment", "search_spaces"},
    "ensemble": {"experiment"},
    "scheduling": {"experiment", "search_spaces", "trainables", "ensemble"},
    "inference": {"experiment", "trainables", "ensemble"},
    "reporting": {"experiment", "search_spaces", "trainables", "ensemble", "inference"},
    "commands": set(PACKAGES),
    "sweep": {"commands", "experiment"},
}
NEVER: dict[str, set[str]] = {
    "experiment": {"torch", "torchvision", "timm", "ray", "optuna"},
    "search_spaces": {"torch", "torchvision", "timm", "ray"},
    "trainables": {"ray", "optuna"},
    "ensemble": {"torch", "torchvision", "timm", "ray", "optuna"},
    "scheduling": set(),
    "inference": {"ray", "optuna"},
    "reporting": {"ray", "torch", "torchvision", "timm"},
    "commands": set(),
    "sweep": {"ray", "torch", "torchvision", "timm", "optuna", "numpy", "pandas", "sklearn"},
}
HEAVY = ("torch", "ray", "pandas", "optuna", "sklearn", "matplotlib", "numpy", "scipy")


def imported(file: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it and for whatever reason."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} line {node.lineno}: a relative import"
            yield node.module or ""
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            argument = node.args[0]
            yield argument.value if isinstance(argument, ast.Constant) else "?"


def _called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def files_of(package: str) -> list[Path]:
    return [ROOT / "sweep.py"] if package == "sweep" else sorted((ROOT / package).rglob("*.py"))


def test_every_package_has_its_rule() -> None:
    assert {*PACKAGES, "sweep"} == MAY_IMPORT.keys() == NEVER.keys()


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_who_imports_whom(package: str) -> None:
    ours = {*PACKAGES, "sweep"}
    for file in files_of(package):
        for module in imported(file):
            top = module.split(".")[0]
            where = f"{file.relative_to(ROOT)} imports {module}"
            assert top not in ours or top == package or top in MAY_IMPORT[package], where
            assert top not in NEVER[package], where


def test_the_command_line_takes_only_the_errors_from_experiment() -> None:
    found = {m for m in imported(ROOT / "sweep.py") if m.split(".")[0] == "experiment"}
    assert found == {"foldrace.core.errors"}


def test_every_package_is_packaged_and_says_what_it_is() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        setuptools = tomllib.load(file)["tool"]["setuptools"]
    assert setuptools["py-modules"] == ["sweep"]
    assert sorted(setuptools["packages"]) == PACKAGES
    for package in PACKAGES:
        assert ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text())), package


def test_every_file_says_what_it_owns() -> None:
    for package in MAY_IMPORT:
        for file in files_of(package):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            assert ast.get_docstring(tree), f"{file.relative_to(ROOT)} has no docstring"


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["no-such-command"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys, sweep\n"
        f"sys.argv = ['foldrace', *{arguments!r}]\n"
        "try:\n    sweep.main()\n"
        "except SystemExit:\n    pass\n"
        f"print('heavy:', [m for m in {HEAVY!r} if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "heavy: []", done.stdout + done.stderr
