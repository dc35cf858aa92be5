"""A sweep whose limit ends it while candidates are parked, as people type it, and a `resume` with a
larger one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.runs import Cli, Run, succeeded

pytestmark = pytest.mark.slow


def test_parked_candidates_wait_for_a_larger_limit(
    project: Any, tmp_path: Path, cli: Cli, capfd: pytest.CaptureFixture[str]
) -> None:
    """The second candidate hardly learns: it is parked at half of its first fold, and a third one
    could not be complete. Without a race all get all their folds."""
    params = [{"lr": 5e-3, "batch_size": 3}, {"lr": 1e-7}, {"lr": 1e-3}]
    points = [{"backbone": "timm/test_resnet", "params": values} for values in params]
    project.config["search"] |= {
        "backbones": ["timm/test_resnet"], "sampler": "list", "points": points, "candidates": 3,
        "fold_trials": 4, "space": {"batch_size": 10},
    }  # fmt: skip
    project.config["race"] = {"z": 0.0, "grace": 0.5, "reduction": 2}
    project.config["training"] |= {"epochs": 4}
    del project.config["data"]["test"], project.config["data"]["sample_submission"]
    succeeded(cli("run", project.write(), "--out", tmp_path / "run"))
    run = Run(tmp_path / "run", project)
    told = " ".join(capfd.readouterr().out.split())  # past the runner, as Ray's own lines are
    assert "2 candidates: 1 complete, 1 parked" in told
    assert "the budget ended the sweep: search.fold_trials: 3 of 4 started" in told
    assert "1 candidate parked by the race" in told and "not in the blend" not in told
    assert _statuses(run) == {"c0000": "complete", "c0001": "parked"}
    assert {member["candidate"] for member in run.blend["members"]} == {"c0000"}
    fold = run.folder / "trials" / "c0001" / "fold0"
    names = {path.name for path in fold.iterdir()}
    assert names == {"resume.pt", "train_log.csv", "rung2.safetensors", "decision.json"}
    began = json.loads((run.folder / "trials/c0000/fold0/trial.json").read_text())["started_at"]
    before = run.trial_files()

    shown = succeeded(cli("status", run.folder)).output
    assert "2 candidates: 1 complete, 1 parked" in shown
    assert "c0001 parked after epoch 2 of fold 0: gain -" in shown
    assert "budget: 2 of 3 candidates, 3 of 4 fold trials" in shown
    page = (run.folder / "report" / "index.html").read_text(encoding="utf-8")
    assert "2 candidates: 1 complete, 1 parked" in page

    more = ("--set", "search.fold_trials=6", "--set", "race.rule=none")
    succeeded(cli("resume", run.folder, *more))
    assert _statuses(run) == dict.fromkeys(("c0000", "c0001", "c0002"), "complete")
    log = (run.folder / "logs" / "application.log").read_text(encoding="utf-8")
    assert "c0001 fold0 goes on from epoch 2" in log
    assert log.count("goes on from epoch") == 1
    assert before.items() <= run.trial_files().items() and len(run.trial_files()) == 6
    resumed = json.loads((fold / "trial.json").read_text())
    assert resumed["epochs_trained"] == 4 and resumed["started_at"] > began
    assert len((fold / "train_log.csv").read_text().splitlines()) == 1 + 4
    assert not list(run.folder.glob("trials/**/resume.pt"))


def _statuses(run: Run) -> dict[str, str]:
    table = run.table("leaderboard.csv")
    return dict(sorted(zip(table["candidate"], table["status"], strict=True)))
