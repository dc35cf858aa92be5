"""A small competition as people have it: Korean class names, spaces in file names, a sample
submission in an order of its own; and the command line in this process."""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from foldrace.sweep import app
from tests.end_to_end.runs import Run, succeeded
from tests.pretend_tune import pretend_ray

CLASSES = ("빨간 사과", "green pear", "blue, plum")
TRAIN, TEST = 60, 9


@dataclass
class Project:
    """A folder with data; `config` is written as JSON by `write`."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)

    def write(self) -> Path:
        path = self.folder / "sweep config.json"
        path.write_text(json.dumps(self.config, ensure_ascii=False), encoding="utf-8")
        return path

    def rows(self, name: str) -> list[list[str]]:
        """A CSV's lines, the header first."""
        with (self.folder / name).open(encoding="utf-8", newline="") as file:
            return list(csv.reader(file))

    def save_rows(self, name: str, rows: Sequence[Sequence[object]]) -> None:
        with (self.folder / name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(rows)


def _config() -> dict[str, Any]:
    return {
        "data": {
            "train": "train.csv",
            "test": "test.csv",
            "sample_submission": "sample submission.csv",
        },
        "folds": {"k": 2},
        "search": {
            "backbones": ["timm/test_resnet", "timm/test_efficientnet"],
            "candidates": 2,
            "sampler": "random",
            "space": {"lr": {"low": 2e-3, "high": 1e-2}, "batch_size": 16},
        },
        "training": {"epochs": 2, "image_size": 32, "pretrained": False},
        "augment": {"policy": "none"},
        "race": {"rule": "none"},  # which fold trials there are is known beforehand
    }


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data, written once; copied for each test that may change it."""
    folder = tmp_path_factory.mktemp("competition")
    project = Project(folder)
    rng = np.random.default_rng(5)
    train: list[list[object]] = [["image_path", "target", "farm"]]
    for i in range(TRAIN):
        name = f"사진 들/no {i}.png"
        _write_blob(folder / name, i % 3, rng)
        train.append([name, CLASSES[i % 3], f"farm {i // 3 % 8}"])
    project.save_rows("train.csv", train)
    test = [[f"t {i}", f"test/t {i}.png"] for i in range(TEST)]
    for i, (_, name) in enumerate(test):
        _write_blob(folder / name, i % 3, rng)
    project.save_rows("test.csv", [["id", "image_path"], *test])
    columns = [CLASSES[2], CLASSES[0], CLASSES[1]]
    order = rng.permutation(TEST)
    sample = [["id", *columns], *([test[i][0], 0.4, 0.3, 0.3] for i in order)]
    project.save_rows("sample submission.csv", sample)
    return folder


def _write_blob(path: Path, label: int, rng: np.random.Generator) -> None:
    """Noise of 16 to 24 pixels, coloured by class."""
    path.parent.mkdir(exist_ok=True)
    height, width = rng.integers(16, 25, size=2)
    pixels = rng.integers(0, 160, size=(height, width, 3))
    pixels[..., label] += 90
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture(scope="session")
def make_project(template: Path) -> Callable[[Path], Project]:
    """A copy of the data, at a path that must not exist."""

    def make(folder: Path) -> Project:
        shutil.copytree(template, folder)
        return Project(folder, _config())

    return make


@pytest.fixture
def project(tmp_path: Path, make_project: Callable[[Path], Project]) -> Project:
    return make_project(tmp_path / "my project")


@pytest.fixture(autouse=True, scope="module")
def reports_take_little(quick_charts: None) -> None:
    """Every sweep here ends with one."""


@pytest.fixture(autouse=True)
def no_ray_starts(request: pytest.FixtureRequest) -> Iterator[None]:
    """`run` starts Ray while it checks its input; here only the tests marked so start it."""
    real = request.node.get_closest_marker("ray") is not None
    with contextlib.nullcontext() if real else pretend_ray():
        yield


@pytest.fixture(scope="session")
def cli() -> Callable[..., Result]:
    """Runs a command line in this process."""

    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return invoke


@pytest.fixture(scope="session")
def finished_run(
    tmp_path_factory: pytest.TempPathFactory,
    make_project: Callable[[Path], Project],
    cli: Callable[..., Result],
) -> Run:
    """Two candidates of two folds, trained in this process; tests take copies."""
    root = tmp_path_factory.mktemp("finished")
    project = make_project(root / "my project")
    with pytest.MonkeyPatch.context() as patch, pretend_ray():
        patch.setenv("FOLDRACE_CACHE", str(root / "cache"))
        succeeded(cli("run", project.write(), "--out", root / "run"))
    return Run(root / "run", project)
