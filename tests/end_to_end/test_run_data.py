"""`run FOLDER` without a config, from a competition's files to its submission."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from foldrace.commands.no_config import guess as guessing
from foldrace.commands.no_config import guess_length
from foldrace.search_spaces.sweep_length import Speed
from foldrace.trainables.speeds import MeasuredSpeeds
from tests.end_to_end.conftest import CLASSES, TEST, TRAIN
from tests.end_to_end.runs import Cli, Run, succeeded

BACKBONE = "timm/test_resnet"


def check_run(run: Run) -> None:
    """Every training row is scored once; the submission is in the form of the sample."""
    config = yaml.safe_load((run.folder / "sweep.yaml").read_text(encoding="utf-8"))
    data = config["data"]
    assert (data["image_column"], data["label_column"]) == ("image_path", "target")
    assert data["test"] == str(run.project.folder / "test.csv")
    assert len(run.labels()) == TRAIN
    assert set(run.classes) == set(CLASSES)
    sample = run.project.rows("sample submission.csv")
    submission = run.table("submission.csv")
    assert list(submission.columns) == sample[0]
    assert submission["id"].tolist() == [row[0] for row in sample[1:]]
    prob = run.submission()
    assert prob.shape == (TEST, len(CLASSES))
    assert np.allclose(prob.sum(axis=1), 1)
    assert (run.folder / "report" / "index.html").is_file()


def test_a_competition_s_folder(
    project: Any, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained in this process, with speeds that are given."""
    speeds = MeasuredSpeeds({BACKBONE: Speed(0.01, 0.01)}, {})
    monkeypatch.setattr(guess_length, "measure_speeds", lambda _: speeds)
    monkeypatch.setattr(guessing, "weights_at_hand", lambda _: False)
    out = tmp_path / "run"
    settings = [f"search.backbones=[{BACKBONE}]", "search.candidates=1", "training.epochs=1"]
    arguments = [part for setting in settings for part in ("--set", setting)]
    done = succeeded(cli("run", project.folder, "--out", out, "--time", "1h", *arguments))
    assert "training images: train.csv, images in column image_path" in done.output
    assert f"config: {out}/sweep.yaml" in done.output.replace("\n", "")
    check_run(Run(out, project))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.full
@pytest.mark.usefixtures("real_ray")
def test_a_competition_s_folder_on_a_real_cluster(project: Any, tmp_path: Path, cli: Cli) -> None:
    """Speeds are measured, and two candidates trained, in a time that does not end them."""
    out = tmp_path / "run"
    done = succeeded(
        cli("run", project.folder, "--out", out, "--time", "20m", "--set", "search.candidates=2",
            "--set", "training.pretrained=false", "--set", "training.epochs=8",
            "--set", "folds.k=2")
    )  # fmt: skip
    assert f"{BACKBONE}: about " in done.output
    check_run(Run(out, project))
