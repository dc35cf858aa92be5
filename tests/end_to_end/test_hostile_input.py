"""What people are sent may be anything: pipes, devices, bombs, names that command a terminal. Each
is named with exit code 2 at once, or shown as what it is."""

from __future__ import annotations

import json
import os
import signal
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from PIL import Image

from tests.end_to_end.test_bad_input import Cli, edit, edit_csv, refused, rename

_SECONDS = 240  # of a machine that does much else; what hangs would never end
_ALLOWED = "allowed: a regular file of at most"


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pipe(name: str, *changes: Callable[[Any], None]) -> Callable[[Any], None]:
    """A named pipe of that name in the project, in place of whatever is there."""

    def change(project: Any) -> None:
        (project.folder / name).unlink(missing_ok=True)
        os.mkfifo(project.folder / name)
        for one in changes:
            one(project)

    return change


def image(path: str) -> Callable[[Any], None]:
    return edit_csv("train.csv", rename(4, 0, path))


SPECIAL: dict[str, tuple[Callable[[Any], None], tuple[str, ...]]] = {
    "image: pipe": (
        pipe("사진 들/no 3.png"),
        ("train.csv line 5: 사진 들/no 3.png: unreadable; it is a pipe", _ALLOWED),
    ),
    "image: zero": (image("/dev/zero"), ("/dev/zero", "it is a device", _ALLOWED)),
    "image: random": (image("/dev/random"), ("/dev/random", "it is a device", _ALLOWED)),
    "image: proc": (image("/proc/self/status"), ("/proc/self/status", "holds more than its size")),
    "image: folder": (image("/proc"), ("/proc", "it is a folder", _ALLOWED)),
    "test image": (pipe("test/t 2.png"), ("test.csv line 4: test/t 2.png: unreadable; it is a",)),
    "table": (pipe("train.csv"), ("data.train", "train.csv is a pipe; allowed: a .csv")),
    "Parquet": (
        pipe("t.parquet", edit("data", train="t.parquet")),
        ("data.train", "t.parquet is a pipe; allowed: a .csv"),
    ),
    "zip": (pipe("t.zip", edit("data", train="t.zip")), ("t.zip: is a pipe", _ALLOWED)),
    "zero as a table": (edit("data", train="/dev/zero"), ("/dev/zero is a device; allowed: a",)),
    "sample": (pipe("sample submission.csv"), ("sample submission.csv is a pipe; needed: a",)),
    "exclude": (pipe("e.csv", edit("data", exclude="e.csv")), ("e.csv is a pipe; needed: a",)),
    "fixes": (pipe("f.csv", edit("data", fixes="f.csv")), ("f.csv is a pipe; needed: a",)),
    "plugin": (
        pipe("p.py", lambda project: project.config.update(plugins=["p.py"])),
        ("p.py: the plugin is a pipe", _ALLOWED),
    ),
    "weights": (
        pipe("w.safetensors", edit("training", pretrained="w.safetensors")),
        ("w.safetensors: is a pipe", _ALLOWED),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SPECIAL)
def test_what_is_no_regular_file_is_named_at_once(project: Any, cli: Cli, case: str) -> None:
    spoil, texts = SPECIAL[case]
    spoil(project)
    refused(cli("check", project.write()), *texts)


@pytest.mark.parametrize("command", ["check", "split", "run"])
def test_a_config_that_is_a_pipe(tmp_path: Path, cli: Cli, command: str) -> None:
    os.mkfifo(tmp_path / "c.yaml")
    refused(cli(command, tmp_path / "c.yaml"), "c.yaml: is a pipe; " + _ALLOWED + " 1 MB")
    refused(cli(command, "/dev/zero"), "/dev/zero: is a device; " + _ALLOWED + " 1 MB")


def test_a_folder_with_a_pipe_and_a_link_to_itself(project: Any, cli: Cli) -> None:
    for name in ("a", "b"):
        for i in range(4):
            path = project.folder / "folders" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), (i * 60, len(name), 9)).save(path)
    os.mkfifo(project.folder / "folders/a/x.png")
    project.config["data"] = {"train": "folders"}
    refused(cli("check", project.write()), "a/x.png: unreadable; it is a pipe")
    (project.folder / "folders/b/again").symlink_to("..")
    refused(cli("check", project.write()), "folders/b/again: is a link to a folder that it lies in")


def test_too_many_pixels(project: Any, cli: Cli) -> None:
    """Few bytes stand for many pixels: the header alone is read."""
    Image.new("1", (20_000, 6_000)).save(project.folder / "사진 들/no 3.png")
    arguments = ("check", project.write())
    refused(cli(*arguments), "it has 120,000,000 pixels (20000 x 6000); allowed: 100,000,000")
    less = cli(*arguments, "--set", "data.max_pixels=100")
    refused(less, "pixels", "allowed: 100 (data.max_pixels)")
    refused(cli(*arguments, "--set", "data.max_pixels=1000000000000"), "500000000")


@pytest.mark.parametrize(
    "value",
    [
        "2001-13-45", "!!bool x", "!!int ''", "!!float ''", "!!timestamp x", "!!set [a]",
        "&a [*a]", "59:" * 3000 + "59", "[" * 3000, "'\\", '"\\0"', "*x", "{a: 1, a: 2}",
    ],
)  # fmt: skip
def test_a_value_that_no_parser_takes(project: Any, cli: Cli, value: str) -> None:
    refused(cli("check", project.write(), "--set", f"name={value}"), "--set name=")
    text = json.dumps(project.config)[:-1] + f', "name": {value}}}'
    (project.folder / "c.yaml").write_text(text, encoding="utf-8")
    refused(cli("check", project.folder / "c.yaml"), "c.yaml: is not valid YAML")


@pytest.mark.parametrize("path", ["~nobody-of-that-name/t.csv", "x" * 5000])
def test_paths_that_lead_nowhere(project: Any, cli: Cli, path: str) -> None:
    edit("data", train=path)(project)
    refused(cli("check", project.write()), path[:50])
    refused(cli("status", path), path[:50])


def test_a_bomb_in_a_zip(project: Any, cli: Cli) -> None:
    bomb = project.folder / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a/1.png", "b/2.png"):
            with archive.open(name, "w") as file:
                for _ in range(150):
                    file.write(bytes(10**6))
    deep = project.folder / "deep.zip"
    with zipfile.ZipFile(deep, "w") as archive:
        archive.writestr("d/" * 1200 + "1.png", b"x")
    for path, text in ((bomb, "times its size; allowed: 200 times"), (deep, "50 folders deep")):
        edit("data", train=path.name)(project)
        refused(cli("check", project.write()), path.name, text)


_NAMES = ("[/]", "[red]x", "a\x1b[2Jb", "c\u202ed")


def _unharmed(result: Result) -> None:
    shown = result.stdout + result.stderr
    assert [c for c in shown if not c.isprintable() and c != "\n"] == [], shown


def test_names_on_the_terminal_are_shown_as_they_are(project: Any, cli: Cli) -> None:
    """Classes, files and the run's own name, in what goes well and in what does not."""
    rows = project.rows("train.csv")
    for row, (path, *_) in enumerate(rows[1:], start=1):
        new = f"사진 들/{_NAMES[row % 4].replace('/', '-')} {row}.png"
        (project.folder / path).rename(project.folder / new)
        rows[row][0], rows[row][1] = new, _NAMES[row % 4]
    rows.append([rows[1][0].replace("1.png", "2.png"), "rare\x1b[1m", ""])
    project.save_rows("train.csv", rows)
    for key in ("test", "sample_submission"):
        del project.config["data"][key]
    project.config["name"] = "[/]\x1b[2J"
    config = project.write()
    wrong = cli("check", config, "--set", "data.merge_classes={m: ['[/]', none]}")
    _unharmed(wrong)
    refused(wrong, "none", "[/]", r"a\x1b[2Jb")
    project.save_rows("train.csv", rows[:-1])
    good = cli("check", config)
    _unharmed(good)
    assert good.exit_code == 0, good.stderr
    assert r"[/]\x1b[2J: 60 images, 4 classes" in good.stdout
    folds = cli("split", config, "--out", project.folder / "[b]folds\x1b.csv")
    _unharmed(folds)
    assert folds.exit_code == 0 and r"[b]folds\x1b.csv: 60 rows" in folds.stdout
