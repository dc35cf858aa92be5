"""Whatever is printed appears, and does nothing else."""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from foldrace.console.machine import logging_to
from foldrace.console.terminal import Terminal, screen, visible

HOSTILE = {
    "[/]": "[/]",
    "[red]x[/red]": "[red]x[/red]",
    ":smile:": ":smile:",
    "a\x1b[2Jb": r"a\x1b[2Jb",
    "a\x1b]0;title\x07b": r"a\x1b]0;title\x07b",
    "a\nb": r"a\nb",
    "a\r\tb": r"a\r\tb",
    "a\x9b31mb": r"a\x9b31mb",
    "a\u202eb": r"a\u202eb",
    "a\u2066b\u2069": r"a\u2066b\u2069",
    "a\u2028b": r"a\u2028b",
    "caf\udce9": r"caf\udce9",
    "고양이 ü – ×": "고양이 ü – ×",
    "می\u200cخواهم": "می\u200cخواهم",  # a word of Persian
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_shown_escaped(name: str) -> None:
    out = io.StringIO()
    terminal = Terminal(out, width=60)
    table = Table("head")
    table.add_row(name)
    terminal.print(name)
    terminal.print(table)
    terminal.print(Text.assemble(("bold", "bold"), name.replace("\n", "")))
    lines = out.getvalue().splitlines()
    assert lines[0] == HOSTILE[name] == visible(name)
    assert HOSTILE[name] in lines[4]
    assert "\x1b" not in out.getvalue() and "\u202e" not in out.getvalue()


def test_a_line_is_not_broken_and_has_no_colours_of_its_own() -> None:
    out = io.StringIO()
    Terminal(out, width=20).print(f"warning /a/{'long ' * 20}[bold]path[/bold]")
    assert out.getvalue() == f"warning /a/{'long ' * 20}[bold]path[/bold]\n"


def test_our_own_words_have_colours_on_a_terminal() -> None:
    leader, follower = os.openpty()
    with os.fdopen(follower, "w", encoding="utf-8") as file:
        Terminal(file, width=80).print("warning \x1b[31m[red]x")
        file.flush()
        shown = os.read(leader, 1000).decode()
    os.close(leader)
    assert shown == "\x1b[33mwarning\x1b[0m \\x1b[31m[red]x\r\n"


def test_what_an_encoding_lacks_is_shown_as_its_code(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w", encoding="ascii") as file:
        Terminal(screen(file), width=80).print("고 \udce9")
    assert (tmp_path / "out").read_text(encoding="ascii") == "\\uace0 \\udce9\n"


def test_a_message_is_one_line_of_a_log(tmp_path: Path) -> None:
    with logging_to(tmp_path):
        logging.getLogger("foldrace").warning("%s is bad", "a\n2026-01-01 INFO x\x1b[2J")
    [line] = (tmp_path / "error.log").read_text(encoding="utf-8").splitlines()
    assert line.endswith(r"WARNING a\n2026-01-01 INFO x\x1b[2J is bad")
