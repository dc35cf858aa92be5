"""What is done with a run afterwards, and runs of other forms: blended again, extended, from a zip,
with one split, without any complete candidate."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file
from sklearn.metrics import log_loss

from foldrace.commands import finish
from tests.end_to_end.runs import SAME, Cli, Run, succeeded, undecided

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("any_ray")]


@pytest.fixture(scope="module")
def finished(
    any_ray: object,
    tmp_path_factory: pytest.TempPathFactory,
    make_project: Callable[[Path], Any],
    cli: Cli,
    request: pytest.FixtureRequest,
) -> Run:
    """Two candidates of two folds; never changed."""
    if any_ray is not None:
        run: Run = request.getfixturevalue("finished_run")
        return run
    root = tmp_path_factory.mktemp("finished")
    project = make_project(root / "my project")
    succeeded(cli("run", project.write(), "--out", root / "run"))
    return Run(root / "run", project)


@pytest.fixture
def copied(finished: Run, tmp_path: Path) -> Run:
    """A copy that a test may change."""
    shutil.copytree(finished.folder, tmp_path / "copy", copy_function=shutil.copy2)
    return Run(tmp_path / "copy", finished.project)


def test_blending_again(copied: Run, cli: Cli) -> None:
    result = succeeded(cli("ensemble", copied.folder, "--max-members", "1"))
    record = copied.json("ensemble/ensemble.json")
    assert [m["weight"] for m in record["members"]] == [1.0]
    name = "{candidate} {variant}".format(**record["members"][0])
    if record["blend_temperature"] == record["members"][0]["temperature"] == 1:
        assert name == record["best_single"]
        assert record["oof_logloss"] == pytest.approx(record["best_single_oof_logloss"])
    assert record["mixture_logloss"] <= record["best_single_oof_logloss"] + 1e-12
    assert f"{record['oof_logloss']:.4f}" in result.stdout
    succeeded(cli("submit", copied.folder))
    single = record["members"][0]
    assert copied.json("submission.receipt.json")["members"] == [single]
    assert cli("ensemble", copied.folder, "--method", "gready").exit_code == 2
    assert cli("ensemble", copied.folder, "--max-members", "0").exit_code == 2


def test_only_the_weights_of_the_blend_are_kept(copied: Run, tmp_path: Path, cli: Cli) -> None:
    """Then blend, extend, submit and predict go on with the members that are left."""
    keep = ("--set", "ensemble.keep=blend", "--set", "ensemble.max_members=1")
    arrays = set(copied.folder.glob("trials/**/*.npy"))
    oof = {path for path in arrays if not path.name.startswith("test")}
    succeeded(cli("resume", copied.folder, *keep))
    [member] = copied.json("ensemble/ensemble.json")["members"]
    assert weights_of(copied) == weights_of_member(member)
    left = set(copied.folder.glob("trials/**/*.npy"))
    assert oof < left
    assert {path.parts[-3] for path in left - oof} == {member["candidate"]}  # of the test set

    result = succeeded(cli("ensemble", copied.folder, "--max-members", "4"))
    assert "their weight files are not there: 3 members" in " ".join(result.stdout.split())
    [again] = copied.json("ensemble/ensemble.json")["members"]
    measured = {"ms_per_image": None}  # once more where other work disturbed the machine
    assert again | measured == member | measured
    out = tmp_path / "again.csv"
    succeeded(cli("submit", copied.folder, "--out", out))
    assert out.read_bytes() == (copied.folder / "submission.csv").read_bytes()
    succeeded(cli("predict", copied.folder, copied.project.folder / "test"))
    succeeded(cli("report", copied.folder))

    succeeded(cli("resume", copied.folder, "--set", "search.candidates=3"))
    record = copied.json("ensemble/ensemble.json")
    assert (record["members_considered"], record["members_without_weights"]) == (3, 3)
    assert weights_of(copied) == weights_of_member(record["members"][0])


def weights_of(run: Run) -> set[str]:
    found = run.folder.glob("trials/*/*/best*.safetensors")
    return {str(path.relative_to(run.folder)) for path in found}


def weights_of_member(member: dict[str, Any]) -> set[str]:
    suffix = "" if member["variant"] == "raw" else f"_{member['variant']}"
    folder = f"trials/{member['candidate']}"
    return {f"{folder}/fold{fold}/best{suffix}.safetensors" for fold in (0, 1)}


def test_status_and_report(copied: Run, cli: Cli) -> None:
    result = succeeded(cli("status", copied.folder))
    for text in ("c0000", "timm/test_resnet", "2 candidates: 2 complete", "4 of 4 fold trials"):
        assert text in result.stdout
    shutil.rmtree(copied.folder / "report")
    succeeded(cli("report", copied.folder))
    page = (copied.folder / "report" / "index.html").read_text(encoding="utf-8")
    assert "timm/test_resnet" in page and "빨간 사과" in page


def test_resume_writes_no_wish_that_no_blend_can_meet(copied: Run, cli: Cli) -> None:
    before = (copied.folder / "sweep.yaml").read_bytes()
    result = cli("resume", copied.folder, "--set", "ensemble.include=[c0099]")
    assert result.exit_code == 2 and "'c0099' is neither a candidate nor" in result.stderr
    assert (copied.folder / "sweep.yaml").read_bytes() == before


def test_a_finished_run_is_left_as_it_is(copied: Run, cli: Cli) -> None:
    """Without Ray, and with every file as it was; what is missing of its end is made again."""

    def stamps() -> dict[str, int]:
        files = (path for path in copied.folder.rglob("*") if path.is_file())
        kept = {str(path.relative_to(copied.folder)): path.stat().st_mtime_ns for path in files}
        return {name: at for name, at in kept.items() if not name.startswith(("logs", "sweep"))}

    before = stamps()
    with patch.object(finish, "connect", side_effect=AssertionError("Ray was asked for")):
        result = succeeded(cli("resume", copied.folder))
        assert "Nothing is left to do" in result.stdout and "c0000" in result.stdout
        assert stamps() == before
        shutil.rmtree(copied.folder / "report")
        succeeded(cli("resume", copied.folder))
    assert "report/index.html" in stamps()


def test_a_finished_run_is_extended(copied: Run, cli: Cli) -> None:
    """Nothing that has finished runs again."""
    before = copied.trial_files()
    assert len(before) == 4
    succeeded(cli("resume", copied.folder, "--set", "search.candidates=3"))
    after = copied.trial_files()
    assert {name: after[name] for name in before} == before
    assert sorted(set(after) - set(before)) == [f"trials/c0002/fold{k}/trial.json" for k in (0, 1)]
    assert len(copied.table("leaderboard.csv")) == 3
    assert copied.json("ensemble/ensemble.json")["candidates_considered"] == 3
    stored = yaml.safe_load((copied.folder / "sweep.yaml").read_text(encoding="utf-8"))
    assert stored["search"]["candidates"] == 3
    refused = cli("resume", copied.folder, "--set", "training.epochs=9")
    assert refused.exit_code == 2 and "training.epochs" in refused.stderr


def test_a_zip_of_class_folders_and_a_smoke_section(project: Any, tmp_path: Path, cli: Cli) -> None:
    rows = project.rows("train.csv")[1:]
    with zipfile.ZipFile(tmp_path / "사진.zip", "w") as archive:
        for path, target, _ in rows:
            archive.write(project.folder / path, f"images/{target}/{Path(path).name}")
    with zipfile.ZipFile(tmp_path / "test.zip", "w") as archive:
        for i in range(9):
            archive.write(project.folder / f"test/t {i}.png", f"t {i}.png")
    project.config["data"].update(train=str(tmp_path / "사진.zip"), test=str(tmp_path / "test.zip"))
    project.config["search"].update(candidates=50, backbones=["timm/resnet152"])
    project.config["smoke"] = {
        "search": {"backbones": ["timm/test_resnet"], "candidates": 1},
        "augment": {"policy": "medium"},
    }
    shutil.rmtree(project.folder / "test")
    succeeded(cli("run", project.write(), "--out", tmp_path / "run", "--smoke"))
    run = Run(tmp_path / "run", project)
    assert sorted(run.classes) == sorted({row[1] for row in rows})
    assert run.table("folds.csv")["image_path"].iloc[0].count("/") == 1
    assert (
        len(run.table("submission.smoke.csv")) == 9 == len(run.table("submissions/0001.smoke.csv"))
    )
    assert not (run.folder / "submission.csv").exists()
    assert "-smoke: Foldrace" in (run.folder / "report" / "index.html").read_text(encoding="utf-8")
    assert list(run.trial_files()) == [f"trials/c0000/fold{k}/trial.json" for k in (0, 1)]


def test_one_fixed_split_of_groups_with_held_out_rows(
    project: Any, tmp_path: Path, cli: Cli
) -> None:
    project.config["folds"] = {"k": 1, "valid_fraction": 0.25, "test_fraction": 0.25}
    project.config["data"] |= {"group_column": "farm"}
    project.config["data"].pop("test")
    project.config["data"].pop("sample_submission")
    project.config["search"] |= {"candidates": 1, "backbones": ["timm/test_resnet"]}
    succeeded(cli("run", project.write(), "--out", tmp_path / "run"))
    run = Run(tmp_path / "run", project)
    folds = run.table("folds.csv")
    assert set(folds["fold"]) == {-2, -1, 0}
    assert (folds.groupby("group")["fold"].nunique() == 1).all() and folds["group"].nunique() == 8
    held_out = np.flatnonzero(folds["fold"] == -2)
    for path in run.folder.glob("trials/*/*/rows.npy"):
        assert set(np.load(path)) == set(np.flatnonzero(folds["fold"] == 0))
    scored = run.json("ensemble/ensemble.json")["held_out"]
    assert scored["rows"] == len(held_out) > 0
    assert not (run.folder / "submission.csv").exists()

    files = [project.folder / folds["image_path"][row] for row in held_out]
    result = succeeded(cli("predict", run.folder, *files))
    table = pd.read_csv(io.StringIO(result.stdout))
    labels = run.labels()[held_out]
    prob = table[run.classes].to_numpy()
    assert scored["logloss"] == pytest.approx(
        log_loss(labels, prob / prob.sum(axis=1, keepdims=True)), abs=SAME
    )
    right = (prob.argmax(axis=1) == labels).mean()
    assert scored["accuracy"] == pytest.approx(right, abs=undecided(prob) + 1e-6)
    nothing = cli("submit", run.folder)
    assert nothing.exit_code == 2 and "data.test" in nothing.stderr


def test_no_complete_candidate(project: Any, tmp_path: Path, cli: Cli) -> None:
    """Weights that are not finite: every candidate diverges."""
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    spoiled = {
        k: torch.full_like(v, torch.nan) if v.is_floating_point() else v for k, v in state.items()
    }
    save_file(spoiled, tmp_path / "spoiled.safetensors")
    project.config["training"]["pretrained"] = str(tmp_path / "spoiled.safetensors")
    project.config["search"] |= {"candidates": 2, "backbones": ["timm/test_resnet"]}
    result = cli("run", project.write(), "--out", tmp_path / "run")
    assert result.exit_code == 1, result.output
    assert "no complete candidate" in result.stderr and "c0000 diverged" in result.stderr
    assert "Traceback" not in result.stderr
    run = Run(tmp_path / "run", project)
    leaderboard = run.table("leaderboard.csv")
    assert leaderboard["status"].tolist() == ["diverged"] * 2
    assert leaderboard["oof_logloss"].isna().all()
    assert not (run.folder / "ensemble").exists() and os.listdir(run.folder / "logs")
