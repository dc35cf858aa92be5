"""A hopeless candidate is stopped in mid-training: real Ray, from the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from foldrace.run_folder.store import RunStore
from foldrace.scheduling.ray.fold_asha import FoldASHA
from foldrace.scheduling.ray.fold_trial import RUNG
from foldrace.sweep import app

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.usefixtures("real_ray")]
GOOD, HOPELESS = 5e-3, 1e-7


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def processes() -> dict[tuple[str, int], int]:
    """Fold trial -> the process that it ran in."""
    return {}


@pytest.fixture(scope="module")
def run(
    real_ray: Path,
    tiny_images: Path,
    tmp_path_factory: pytest.TempPathFactory,
    processes: dict[Any, int],
) -> Path:
    """Good, hopeless, good, hopeless, one after another; each saves its state after every epoch."""
    root = tmp_path_factory.mktemp("epochs")
    points = [
        {"backbone": "timm/test_resnet", "params": {"lr": lr, "weight_decay": 0.01 + number / 1e3}}
        for number, lr in enumerate([GOOD, HOPELESS, GOOD, HOPELESS])
    ]
    raw = {
        "data": {"train": str(tiny_images)},
        "folds": {"k": 2},
        "search": {
            "backbones": ["timm/test_resnet"],
            "candidates": len(points),
            "sampler": "list",
            "points": points,
            "space": {"batch_size": 10, "mixup_alpha": 0.0},
        },
        "race": {"min_complete": 1, "z": 3.0},
        "training": {
            "epochs": 16, "image_size": 32, "pretrained": False,
            "save_every": 0.001,
        },
        "augment": {"policy": "light"},
        "resources": {"cpus_per_trial": 1, "max_concurrent": 1, "max_failures": 0},
    }  # fmt: skip
    (root / "epochs.json").write_text(json.dumps(raw), encoding="utf-8")
    complete = FoldASHA.on_trial_complete

    def seen(self: FoldASHA, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        processes[trial.config["candidate"], trial.config["fold"]] = trial.last_result["pid"]
        complete(self, tune_controller, trial, result)
        assert RUNG not in trial.last_result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FoldASHA, "on_trial_complete", seen)
        result = cli("run", root / "epochs.json", "--out", root / "run")
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return root / "run"


def test_the_hopeless_are_stopped_at_their_first_rung(run: Path) -> None:
    store = RunStore.open(run)
    ends = {
        candidate: trial.status for (candidate, fold), trial in store.trials().items() if not fold
    }
    assert ends == {
        "c0000": "finished", "c0001": "stopped", "c0002": "finished", "c0003": "stopped"
    }  # fmt: skip
    statuses = {s.candidate.candidate: s.status for s in store.summaries()}
    assert (statuses["c0000"], statuses["c0001"], statuses["c0003"]) == (
        "complete", "stopped", "stopped",
    )  # fmt: skip
    trial = store.trial("c0001", 0)
    assert trial is not None
    assert (trial.status, trial.epochs_trained, trial.variants) == ("stopped", 4, {})
    (decision,) = store.decisions()["c0001"]
    assert (decision.rule, decision.action, decision.epoch) == ("epoch", "stop", 4)
    assert (decision.complete, decision.rows, decision.folds_done) == (1, 30, 0)
    assert decision.gain is not None and decision.gain_se is not None
    assert decision.gain + 3.0 * decision.gain_se <= 0
    assert decision.blend_logloss is not None and decision.epochs_trained == 2 * 16 + 4
    log = (run / "logs" / "application.log").read_text(encoding="utf-8")
    assert decision.line in log
    with (run / "decisions.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["rule"] == "epoch"]
    assert [row["candidate"] for row in rows] == ["c0001", "c0003"]


def test_its_losses_stay_and_nothing_else(run: Path) -> None:
    for candidate in ("c0001", "c0003"):
        folder = run / "trials" / candidate
        assert [path.name for path in folder.glob("fold*")] == ["fold0"]
        left = {path.name for path in (folder / "fold0").iterdir()}
        assert left == {"trial.json", "decision.json", "train_log.csv"}
        lines = (folder / "fold0" / "train_log.csv").read_text().splitlines()
        assert len(lines) == 1 + 4
    record = json.loads((run / "ensemble" / "ensemble.json").read_text())
    assert {member["candidate"] for member in record["members"]} <= {"c0000", "c0002"}


def test_the_next_trial_takes_the_process_over(run: Path, processes: dict[Any, int]) -> None:
    """Tune fails it where the stopped one does not leave in time."""
    trials = RunStore.open(run).trials()
    assert set(processes) == set(trials) and len(set(processes.values())) == 1
    assert all(trial.status in ("finished", "stopped") for trial in trials.values())
    errors = run / "logs" / "error.log"
    assert not errors.exists() or "tried again" not in errors.read_text(encoding="utf-8")


def test_a_resumed_sweep_leaves_it_stopped(run: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.glob("trials/*/*/*")}
    result = cli("resume", run)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    assert {p: p.stat().st_mtime_ns for p in run.glob("trials/*/*/*")} == before
