"""`check`, `run` and `init` of data sets as competitions and tools hand them out, untouched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foldrace.commands.no_config import guess as guessing
from foldrace.commands.no_config import guess_length
from foldrace.search_spaces.sweep_length import Speed
from foldrace.sweep import app
from foldrace.trainables.speeds import MeasuredSpeeds, TimingRequest
from tests.dataset.layouts import LAYOUTS


@pytest.fixture(autouse=True)
def nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub is asked, and every backbone is quick."""

    def measured(request: TimingRequest) -> MeasuredSpeeds:
        names = json.loads(request.config)["search"]["backbones"]
        return MeasuredSpeeds(dict.fromkeys(names, Speed(0.001, 0.0005, 1.0, 1000)), {})

    monkeypatch.setattr(guess_length, "measure_speeds", measured)
    monkeypatch.setattr(guessing, "weights_at_hand", lambda _: False)


def told(*words: object) -> str:
    """What a command prints that goes well, in one line."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return " ".join(result.output.split())


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_config_with_no_key_but_the_paths(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    layout.write(tmp_path)
    raw = {
        "data": layout.paths,
        "search": {"backbones": ["timm/test_resnet"], "candidates": 1},
        "training": {"pretrained": False, "image_size": 32},
    }
    (tmp_path / "c.json").write_text(json.dumps(raw), encoding="utf-8")
    text = told("check", tmp_path / "c.json")
    assert f"submission: {layout.form}" in text
    assert f"{layout.images} images, {len(layout.classes)} classes, {layout.tests} test" in text


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_folder_alone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = LAYOUTS[name]
    folder = tmp_path / "data"
    folder.mkdir()
    layout.write(folder)
    monkeypatch.chdir(tmp_path)
    found = f"{layout.images} images, {len(layout.classes)} classes, {layout.tests} test images"
    assert found in told("run", folder, "--dry-run")
    written = told("init", folder, "--out", tmp_path / "sweep.yaml")
    text = told("check", tmp_path / "sweep.yaml")
    assert f"submission: {layout.form}" in text and found in text
    assert f"{layout.images} images, {len(layout.classes)} classes" in written
