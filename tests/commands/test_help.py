"""What `foldrace --help`, `--version` and the help of each command say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

import foldrace
from foldrace.commands.distill import KINDS
from foldrace.core.metrics import METRICS
from foldrace.ensemble.methods import AUTO
from foldrace.ensemble.methods import METHODS as METHOD_TABLE
from foldrace.inference.tta import TTAS as TTA_TABLE
from foldrace.sweep import CHOSEN_METRICS, METHODS, TEACHERS, TTAS, app

_COMMANDS = sorted(typer.main.get_group(app).commands)


def _help(*command: str) -> str:
    done = CliRunner().invoke(app, [*command, "--help"], terminal_width=200)
    assert done.exit_code == 0
    return " ".join(re.sub("[│╭╰─╮╯]", " ", done.stdout).split())


def test_each_command_is_the_file_of_its_name() -> None:
    folder = Path(foldrace.__file__).parent / "commands"
    assert all((folder / f"{name}.py").is_file() for name in _COMMANDS)


@pytest.mark.parametrize("command", _COMMANDS)
def test_each_command_has_an_example_that_its_options_allow(command: str) -> None:
    shown = _help(command)
    example = shown.partition("Example: ")[2]
    assert example.startswith(f"foldrace {command} ") or example == f"foldrace {command}"
    for option in re.findall(r"--[a-z-]+", example):
        assert option in shown.partition("Example: ")[0]


def test_help_names_what_is_allowed() -> None:
    assert METHODS in _help("ensemble") and CHOSEN_METRICS in _help("ensemble")
    assert f"{', '.join(METRICS)}, or a plugin's" == CHOSEN_METRICS
    assert f"{', '.join([*METHOD_TABLE, AUTO])}, or a plugin's" == METHODS
    assert TTAS in _help("submit")
    assert TEACHERS in _help("distill") and ", ".join(KINDS) == TEACHERS
    assert f"{', '.join(TTA_TABLE)}, or a plugin's" == TTAS


def test_version_is_that_of_the_package() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.stdout) == (0, f"foldrace {foldrace.__version__}\n")


def test_completion_can_be_installed() -> None:
    assert "--install-completion" in _help()
