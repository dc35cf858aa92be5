"""Fuzz targets of whole command lines, in this process and in processes of their own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from benchmarks.sides.fuzz_config import yaml_text
from benchmarks.sides.fuzz_guard import Box, Call, Target, Wrong
from benchmarks.sides.fuzz_mutations import WORDS, changed
from benchmarks.sides.fuzz_runs import RunTargets
from benchmarks.sides.fuzz_scene import Examples
from foldrace import sweep
from foldrace.search_spaces.sweep_length import Speed
from foldrace.trainables import speeds
from foldrace.trainables.models import hub

_ROOT = Path(__file__).resolve().parents[2]
_CODES = (0, 1, 2, 130)
_ON_DATA = ("check", "check", "check", "split", "augment", "trial", "init", "run", "any")
_ON_RUNS = ("status", "report", "ensemble", "submit", "predict", "predict", "resume")
_SOCKETS = ("socket.connect", "socket.getaddrinfo", "socket.sendto")
_TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
"""What shows the letters after it in another order."""
_LINES = 200_000  # letters that a command may print


class CommandTargets:
    """The targets, over sound data, configs and run folders."""

    def __init__(self, examples: Examples, folder: Path) -> None:
        self._examples, self._folder = examples, folder
        self._runs = RunTargets(examples, folder)

    def targets(self) -> tuple[Target, ...]:
        return (
            # A config may name a database.
            Target("commands on data", 10, self._on_data, never_but=_SOCKETS),
            Target("commands on runs", 10, self._on_runs),
            Target("processes", 1, self._in_another, never_but=("subprocess.Popen", "os.fork")),
        )

    def _on_data(self, rng: random.Random, box: Box) -> Call:
        arguments = self._arguments(rng, box, rng.choice(_ON_DATA))
        return lambda: _judge(*_called(arguments), arguments)

    def _on_runs(self, rng: random.Random, box: Box) -> Call:
        arguments = self._arguments(rng, box, rng.choice(_ON_RUNS))
        return lambda: _judge(*_called(arguments), arguments)

    def _in_another(self, rng: random.Random, box: Box) -> Call:
        arguments = self._arguments(rng, box, rng.choice((*_ON_DATA, *_ON_RUNS)))

        def call() -> None:
            done = subprocess.run(
                [sys.executable, str(_ROOT / "sweep.py"), *arguments],
                stdin=subprocess.DEVNULL, capture_output=True, timeout=300,
                env=os.environ | {"PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
            _judge(done.returncode, done.stdout + done.stderr, arguments)

        return call

    def _arguments(self, rng: random.Random, box: Box, command: str) -> list[str]:
        """A command line, with files in the box that it reads."""
        if command == "any":
            known = ("check", "--set", "--out", "predict", "status", "--debug", "--csv")
            words = [rng.choice((*WORDS, *known)) for _ in range(rng.randrange(4))]
            return [_argument(word) for word in words]
        if command in ("check", "split", "augment", "trial", "init", "run"):
            words = [command, self._source(rng, box, command)]
            words += {"run": ["--dry-run"], "trial": ["--backbone", _word(rng, "timm/none")]}.get(
                command, []
            )
            if rng.random() < 0.3 and command != "augment":
                words += ["--set", f"{_word(rng, 'search.candidates')}={_word(rng, '3')}"]
        else:
            self._runs.mutate(rng, box, self._readable(rng))
            words = [command, str(box.run) if rng.random() < 0.95 else _word(rng, "x")]
            words += self._run_options(rng, box, command)
        takes_out = command in ("augment", "submit", "predict") and rng.random() < 0.7
        if takes_out or command == "split":  # which would write beside the config
            suffix = ".png" if command == "augment" else ".csv"
            name = rng.choice(("out", "a[/b]x", "[red]x", "x\x1b[2Jy", "é", "x" * 250, "a b"))
            words += ["--out", f"{name}{suffix}"]
        return [_argument(word) for word in words]

    def _readable(self, rng: random.Random) -> list[str]:
        if rng.random() < 0.3:
            return ["submission.csv"]  # which no command but `submit` looks at
        return [n for n in self._examples.run if n.endswith((".json", ".yaml", ".csv", ".npy"))]

    def _source(self, rng: random.Random, box: Box, command: str) -> str:
        """A config, or data for the commands that take some."""
        keys = dict(self._examples.config)
        keys["data"] = {
            key: str(self._folder / value) if value in self._examples.data else value
            for key, value in keys["data"].items()
        }
        if command in ("init", "check", "run") and rng.random() < 0.3:
            return str(self._folder / rng.choice(("train", "test", "data.zip", "train.csv", ".")))
        if rng.random() < 0.05:
            return _word(rng, str(self._folder))
        tree = changed(rng, keys, rng.choice((0, 1, 1, 2)))
        if isinstance(tree, dict) and rng.random() < 0.3:
            self._strange_data(rng, box, tree)
        return str(box.write("sweep.yaml", yaml_text(rng, tree)))

    def _strange_data(self, rng: random.Random, box: Box, tree: dict[str, object]) -> None:
        """Names of classes and files that no terminal should get as they are."""
        names = ["\x1b[2Jcat", "[/]", "[red]dog", "\u202egod", "<b>x</b>", "=1+1", "a\x07", *WORDS]
        classes = rng.sample([n for n in names if "\n" not in n and "\r" not in n], 2)
        lines = ["image_path,label"]
        for i, (name, data) in enumerate(list(self._examples.images.items())[:8]):
            place = f"{rng.choice(('', '[x]', 'é'))}{i}{Path(name).suffix}"
            box.write(place, data)
            label = classes[i % 2].replace('"', '""')
            lines.append(f'{place if rng.random() < 0.9 else rng.choice(names)},"{label}"')
        table = box.write("strange.csv", "\n".join(lines).encode("utf-8", "surrogatepass"))
        tree["data"] = {"train": str(table), "label_column": "label"}
        tree["name"] = rng.choice(("x", *WORDS))

    def _run_options(self, rng: random.Random, box: Box, command: str) -> list[str]:
        if command == "predict":
            image = box.write(rng.choice(("a.png", "x\x1b[1m.png", "[a].png")), b"no image")
            sound = str(self._folder / "test" / "t0.png")
            return [rng.choice((sound, str(image), *WORDS[:40])), sound]
        if command == "submit" and rng.random() < 0.5:
            return ["--tta", _word(rng, "flip")]
        if command == "ensemble" and rng.random() < 0.7:
            return rng.choice(
                (
                    ["--method", _word(rng, "uniform")],
                    ["--exclude", _word(rng, "c0000")],
                    ["--include", _word(rng, "c0001 raw")],
                    ["--add", f"{_word(rng, 'x')}={_word(rng, 'a.csv')}"],
                    ["--run", str(box.run)],
                )
            )
        if command == "resume":
            return ["--set", "folds.k=9"]  # which no resume may change
        return []


def _word(rng: random.Random, usual: str) -> str:
    return usual if rng.random() < 0.5 else rng.choice(WORDS)


def _argument(word: str) -> str:
    """As a shell can give it: bytes without NUL."""
    data = word.encode("utf-8", "surrogateescape" if "\udcff" in word else "replace")
    return os.fsdecode(data.replace(b"\0", b""))


@contextlib.contextmanager
def _streams() -> Iterator[io.BytesIO]:
    """Standard output and error as strict UTF-8."""
    taken = io.BytesIO()
    text = io.TextIOWrapper(taken, "utf-8", errors="strict", write_through=True)
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        yield taken
        text.detach()  # else it closes what it has written to


def _called(arguments: list[str]) -> tuple[int, bytes]:
    """Exit code and output of the command line in this process."""
    with (
        _streams() as taken,
        mock.patch.object(hub, "_in_time", lambda ask, seconds: False),  # no network is there
        mock.patch.object(sys, "argv", ["foldrace", *arguments]),
        mock.patch.object(speeds, "subprocess", _NO_PROCESS),  # it takes half a minute
    ):
        try:
            sweep.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return code, taken.getvalue()


def _timed(command: list[str], input: bytes, **_: object) -> subprocess.CompletedProcess[bytes]:
    """The answers of the process that measures speeds."""
    config = json.loads(json.loads(input)["config"])
    speed = asdict(Speed(1e-3, 1e-3, 1.0, 10**6))
    answers = [
        json.dumps({"backbone": name, "speed": speed, "seconds": 0.1})
        for name in config["search"]["backbones"]
    ]
    return subprocess.CompletedProcess(command, 0, "\n".join(answers).encode(), b"")


_NO_PROCESS = SimpleNamespace(run=_timed, TimeoutExpired=subprocess.TimeoutExpired)


def _judge(code: int, output: bytes, arguments: list[str]) -> None:
    if code not in _CODES:
        raise Wrong(f"exit code {code} of {arguments}")
    text = output.decode("utf-8", "surrogateescape")
    traced = "Traceback (most recent call last)" in text and "--debug" not in arguments
    if traced or "internal error" in text:
        last = [line for line in text.splitlines() if line.strip()][-1:]
        raise Wrong(f"a traceback of {arguments[:1]}: {last}")
    strange = {c for c in text if unicodedata.category(c) == "Cc" and c not in "\n\r\t"}
    strange |= {c for c in text if unicodedata.bidirectional(c) in _TURNS}
    # Its table has the exact names where it goes into a pipe or a file.
    is_table = arguments[:1] == ["predict"] and "--out" not in arguments
    if strange and not is_table:
        raise Wrong(f"control characters {sorted(map(ord, strange))} of {arguments[:1]}")
    if len(text) > _LINES:
        raise Wrong(f"{len(text):,} letters of output of {arguments[:1]}")
