"""A real sweep to hurt: starts the command line, waits for a moment, and compares what is left.

Thirty small pictures a class, some to predict, three candidates of two folds with a fixed list, no
race, a state after each epoch: what an undisturbed sweep leaves is known to the bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from harness import ROOT
from PIL import Image

from foldrace.core.files import open_files

TRIALS = 6
_CLASSES, _PER_CLASS, _EPOCHS = 3, 30, 40
_LIMIT = 300.0  # seconds; only a fault of ours takes longer
_COMPARED = re.compile(r"trials/.*/fold\d+/(oof.*\.npy|true_prob.*\.npy|.*\.safetensors)")


class Hangs(Exception):
    """It did not end, or did not come to the moment, within the limit."""


def write_data(folder: Path) -> None:
    """Noisy pictures, coloured by class."""
    rng = np.random.default_rng(0)
    (folder / "test").mkdir(parents=True)
    for label in range(_CLASSES):
        (folder / "train" / f"class{label}").mkdir(parents=True)
        for number in range(_PER_CLASS + 2):
            pixels = rng.integers(0, 160, size=(24, 24, 3))
            pixels[..., label] += 60
            image = Image.fromarray(pixels.astype(np.uint8))
            of_test = number >= _PER_CLASS
            to = folder / "test" if of_test else folder / "train" / f"class{label}"
            image.save(to / f"{label}_{number}.png")


def write_config(path: Path, data: Path, storage: str | None = None, **resources: object) -> Path:
    """The sweep, as JSON."""
    points = [
        {"backbone": "timm/test_resnet", "params": {"lr": rate}} for rate in (1e-3, 2e-3, 4e-3)
    ]
    config = {
        "name": "faults",
        "data": {"train": str(data / "train"), "test": str(data / "test")},
        "folds": {"k": 2},
        "search": {
            "backbones": ["timm/test_resnet"], "candidates": 3, "sampler": "list",
            "points": points, "storage": storage,
        },
        "training": {
            "epochs": _EPOCHS, "image_size": 24, "pretrained": False, "save_every": 0.001,
        },
        "augment": {"policy": "light"},
        "race": {"rule": "none"},
        "resources": {"max_concurrent": 2, "max_failures": 2} | resources,
    }  # fmt: skip
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def digests(place: object) -> dict[str, str]:
    """What a finished run comes to: every array and weight of its fold trials."""
    files = open_files(str(place))
    names = (name for name in files.stamps("trials") if _COMPARED.fullmatch(name))
    return {name: hashlib.sha256(files.read(name)).hexdigest() for name in names}


@dataclass
class Scene:
    """One run folder, and the process that works on it."""

    folder: Path
    config: Path
    env: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    output: str = ""
    """What all its processes have printed."""
    within: tuple[str, ...] = ()
    """A command that starts the one that is given to it."""
    url: str | None = None
    """Where the run is, if it is in an object store."""

    @property
    def run(self) -> Path:
        """The run folder, where it is on a disk."""
        return self.folder / "run"

    @property
    def place(self) -> str:
        """The run folder, as the command line takes it."""
        return str(self.run) if self.url is None else self.url

    def start(self, *words: object, stdout: int | None = None) -> None:
        """Start the command line, in a session of its own; its output goes to a file."""
        command = [*self.within, sys.executable, str(ROOT / "sweep.py"), *map(str, words)]
        with (self.folder / "out.txt").open("wb") as file:
            self.process = subprocess.Popen(
                command,
                stdout=file if stdout is None else stdout, stderr=file, start_new_session=True,
                cwd=self.folder, env=os.environ | dict(self.env),
            )  # fmt: skip

    def begin(self, *more: object) -> None:
        """Start the sweep."""
        self.start("run", self.config, "--out", self.place, *more)

    def until(self, moment: Callable[[], object], limit: float = _LIMIT) -> None:
        """Wait for a moment in the sweep's life."""
        ends = time.monotonic() + limit
        while not moment():
            if time.monotonic() > ends or (self.process and self.process.poll() is not None):
                raise Hangs(self.text())
            time.sleep(0.05)

    def finished(self) -> dict[str, str]:
        """Fold trials that have ended, with what changes when one is written again.

        Size and time alone: the inode after them also changes when the run folder is copied.
        """
        ended = ((name, stamp) for name, stamp in self._trials() if name.endswith("/trial.json"))
        return {name: " ".join(stamp.split()[:2]) for name, stamp in ended}

    def in_the_middle(self) -> bool:
        """True where a trial has ended, and another one is under way."""
        names = [name for name, _ in self._trials()]
        return all(any(n.endswith(end) for n in names) for end in ("/trial.json", "/resume.pt"))

    def _trials(self) -> list[tuple[str, str]]:
        with contextlib.suppress(FileNotFoundError):  # one has gone while they were listed
            return list(open_files(self.place).stamps("trials").items())
        return []

    def end(self, limit: float = _LIMIT) -> int:
        """Wait for the process's end; gives its exit code."""
        assert self.process is not None
        try:
            code = self.process.wait(limit)
        except subprocess.TimeoutExpired as error:
            self.kill()
            raise Hangs(self.text()) from error
        self.output += self.text()
        return code

    def text(self) -> str:
        """What the last process has printed."""
        return (self.folder / "out.txt").read_text(encoding="utf-8", errors="replace")

    def kill(self) -> None:
        """The process and all below it."""
        assert self.process is not None
        for process in self.family():
            with_suppressed(process.kill)
        with_suppressed(self.process.kill)
        self.process.wait()

    def family(self) -> list[psutil.Process]:
        """All processes below the driver."""
        assert self.process is not None
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def named(self, pattern: str) -> list[psutil.Process]:
        """Those whose command line or name matches."""
        return [p for p in self.family() if re.search(pattern, _words(p))]

    def signal(self, number: signal.Signals, group: bool = False) -> None:
        """Send one to the driver, or to its whole group."""
        assert self.process is not None
        (os.killpg if group else os.kill)(self.process.pid, number)

    def trained(self) -> Counter[str]:
        """Fold trial -> times that it ended well, by the log."""
        logs = [*self.run.glob("logs/application.log"), *self.folder.glob("tmp/*/application.log")]
        text = "".join(log.read_text(encoding="utf-8") for log in logs)
        return Counter(re.findall(r"(c\d+ fold\d+) finished", text))


def with_suppressed(call: Callable[[], object]) -> None:
    """Call it; a process that is gone already is no error."""
    try:
        call()
    except (psutil.NoSuchProcess, ProcessLookupError):
        return


def _words(process: psutil.Process) -> str:
    try:
        return " ".join([process.name(), *process.cmdline()])
    except psutil.NoSuchProcess:
        return ""
