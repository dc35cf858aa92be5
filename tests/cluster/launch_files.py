"""The files of `cluster/`, and whether the commands in them are commands that there are."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import typer.main

from foldrace.sweep import app

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "cluster"
FILES = sorted(path.name for path in FOLDER.iterdir())


def text_of(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def header(name: str) -> str:
    """The comment at the top, without its signs."""
    lines = text_of(name).removeprefix("#!/bin/bash\n").splitlines()
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:first])


def header_command(name: str) -> str:
    """The indented part of the comment at the top."""
    lines = [line for line in header(name).splitlines() if line.startswith("  ")]
    return "\n".join(lines)


def commands_in(text: str) -> Iterator[list[str]]:
    """Words of each command of a shell's text, also of the commands that its quotes hold."""
    uncommented = re.sub(r"(?m)(^|\s)#.*$", r"\1", text).replace("\\\n", " ")
    words = shlex.shlex(uncommented, posix=True, punctuation_chars=";&|()\n")
    words.whitespace, words.whitespace_split, words.commenters = " \t", True, ""
    for is_end, command in groupby(words, lambda word: not word.strip(";&|()\n")):
        if is_end:
            continue
        listed = list(command)
        yield listed
        for word in listed:
            if " " in word:
                yield from commands_in(word)


def calls_of(program: str, text: str) -> list[list[str]]:
    """Arguments of each call of a program in a shell's text, wherever in its command it stands."""
    return [
        command[i + 1 :]
        for command in commands_in(text)
        for i, word in enumerate(command)
        if word.rpartition("/")[2] == program
    ]


def parsed(arguments: Sequence[str]) -> dict[str, Any]:
    """Values that `foldrace ARGUMENTS` sets; click.UsageError where it is refused."""
    command = typer.main.get_group(app).commands[arguments[0]]
    return command.make_context(arguments[0], list(arguments[1:])).params


def executable(path: Path, script: str) -> None:
    """Write a bash script that stands in for a command."""
    path.write_text(f"#!/bin/bash\n{script}\n", encoding="utf-8")
    path.chmod(0o755)


def run_or_resume(folder: Path, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command that `run-or-resume.sh ARGUMENTS` becomes, without and with a run folder."""
    executable(folder / "foldrace", '[[ $1 = status ]] && exit "$STATUS"\nprintf "%s\\n" "$@"')
    found = []
    for status in ("2", "0"):
        done = subprocess.run(
            [FOLDER / "run-or-resume.sh", *arguments],
            env=dict(os.environ, PATH=f"{folder}:{os.environ['PATH']}", STATUS=status),
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        found.append(done.stdout.splitlines())
    return found[0], found[1]


def installed_packages(dockerfile: str) -> list[str]:
    """Names of the packages that an image's pip is asked for, beside Foldrace."""
    arguments = chain(*(words for words in calls_of("pip", text_of(dockerfile))))
    return [
        word.lower()
        for word in arguments
        if re.fullmatch(r"[A-Za-z][\w-]*", word) and word not in ("install", "wheel")
    ]
