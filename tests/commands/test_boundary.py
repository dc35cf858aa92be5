"""Every error ends in a line and an exit code; a traceback is shown on demand alone."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from foldrace.console.boundary import exit_codes
from foldrace.core.errors import DataError, Interrupted, Problem, RunFailure
from foldrace.core.opening import read_regular
from foldrace.sweep import _debug_first

ROOT = Path(__file__).resolve().parents[2]
_FAULT = "this is a fault of Foldrace, not of what you gave it; --debug shows where"


def _deep() -> None:
    _deep()


CASES: dict[str, tuple[BaseException, int, str]] = {
    "user": (
        DataError([Problem("a[/]\n.csv", "x\x1b"), Problem("b", "y")]),
        2,
        "2 problems:\n- a[/]\\n.csv: x\\x1b\n- b: y\n",
    ),
    "failure": (RunFailure("first\nsecond"), 1, "first\nsecond\n"),
    "interrupted": (Interrupted("one\ntwo"), 130, "one\ntwo\n"),
    "Ctrl-C": (KeyboardInterrupt(), 130, "stopped\n"),
    "full": (OSError(errno.ENOSPC, "No space left on device", "/d/x"), 1,
             "/d/x: No space left on device\n"),
    "denied": (PermissionError(errno.EACCES, "Permission denied", "/d/x"), 1,
               "/d/x: Permission denied\n"),
    "long": (OSError(errno.ENAMETOOLONG, "File name too long", "xx"), 2,
             "xx: File name too long\n"),
    "pipe": (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "nobody reads what is written\n"),
    "memory": (MemoryError(), 1,
               "out of memory: it needs more than there is, or than is allowed\n"),
    "deep": (RecursionError("maximum"), 1,
             f"internal error: it is nested too deeply; {_FAULT}\n"),
    "ours": (KeyError("a\nb"), 1, f"internal error: KeyError: 'a\\nb'; {_FAULT}\n"),
    "secret": (ValueError("postgresql://u:PW@h/d"), 1,
               f"internal error: postgresql://***@h/d; {_FAULT}\n"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_kind_of_error(capsys: pytest.CaptureFixture[str], case: str) -> None:
    error, code, text = CASES[case]
    with pytest.raises(typer.Exit) as left, exit_codes(False, "stopped"):
        raise error
    assert (left.value.exit_code, capsys.readouterr().err) == (code, text)


def test_a_pipe_of_which_no_reader_spoke(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as left, exit_codes(False, ""):
        read_regular(Path("/dev/zero"), 10)
    assert left.value.exit_code == 2
    assert "/dev/zero: is a device; allowed: a regular file" in capsys.readouterr().err


def test_an_exit_is_left_alone() -> None:
    with pytest.raises(typer.Exit) as left, exit_codes(False, ""):
        raise typer.Exit(5)
    assert left.value.exit_code == 5


def test_the_traceback_is_shown_with_debug(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), exit_codes(True, ""):
        raise KeyError("x\x1b")
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "test_boundary.py" in shown and "\x1b" not in shown
    assert shown.splitlines()[-1].startswith("internal error: KeyError")


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (["check", "a", "--debug"], ["--debug", "check", "a"]),
        (["--debug", "check", "a"], ["--debug", "check", "a"]),
        (["check", "a"], ["check", "a"]),
        (["predict", "r", "--", "--debug"], ["predict", "r", "--", "--debug"]),
    ],
)
def test_debug_stands_anywhere(given: list[str], taken: list[str]) -> None:
    assert _debug_first(given) == taken


def test_a_whole_command(tmp_path: Path) -> None:
    """The real process: without a traceback, and with one."""
    command = [sys.executable, "-m", "foldrace.sweep", "status", str(tmp_path / "[red]\x1b")]
    plain = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / ".venv/checkout")
    assert plain.returncode == 2 and "Traceback" not in plain.stderr
    assert r"[red]\x1b: is no run folder" in plain.stderr
    debug = subprocess.run(
        [*command, "--debug"], capture_output=True, text=True, cwd=ROOT / ".venv/checkout"
    )
    assert debug.returncode == 2 and "Traceback" in debug.stderr
