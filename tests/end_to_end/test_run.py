"""Real sweeps on tiny images, from the command line to the submission, checked with other
packages' arithmetic."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import yaml
from click.testing import Result
from numpy.typing import NDArray
from safetensors.torch import save_file
from sklearn.metrics import accuracy_score, log_loss

from foldrace.config.schema import ResourcesConfig
from foldrace.scheduling.ray.cluster import connect

Cli = Callable[..., Result]
pytestmark = [pytest.mark.slow, pytest.mark.ray]

LEADERBOARD = [
    "candidate",
    "backbone",
    "status",
    "folds_done",
    "variant",
    "oof_logloss",
    "oof_accuracy",
    "last_fold_logloss",
    "gain",
    "gain_se",
    "epochs_trained",
    "seconds",
]
TRIALS = [
    "candidate",
    "fold",
    "status",
    "variant",
    "val_logloss",
    "best_epoch",
    "epochs_trained",
    "seconds",
    "node",
    "device",
]
TRAIN_LOG = ["epoch", "train_loss", "train_acc", "val_loss", "val_acc", "val_logloss", "lr"]


@pytest.fixture(scope="module", autouse=True)
def one_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A local cluster for all sweeps of this file: a run uses a connection that is there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOLDRACE_CACHE", str(tmp_path_factory.mktemp("cache")))
        with connect(None, ResourcesConfig()):
            yield


def succeeded(result: Result) -> Result:
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result


@dataclass(frozen=True)
class Run:
    folder: Path
    project: Any

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def table(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.folder / name)

    @property
    def classes(self) -> list[str]:
        return list(self.json("classes.json"))

    def labels(self) -> NDArray[np.int64]:
        """(n,) of the rows of folds.csv."""
        return np.array([self.classes.index(t) for t in self.table("folds.csv")["target"]])

    def oof(self, candidate: str, variant: str) -> NDArray[np.float64]:
        """(n, C) from the trial folders; rows without a prediction are NaN."""
        prob = np.full((len(self.labels()), len(self.classes)), np.nan)
        suffix = "" if variant == "raw" else f"_{variant}"
        for folder in sorted((self.folder / "trials" / candidate).glob("fold*")):
            log_prob = np.load(folder / f"oof{suffix}.npy", allow_pickle=False)
            assert log_prob.dtype == np.float16
            rows = np.load(folder / "rows.npy", allow_pickle=False)
            assert np.isnan(prob[rows]).all()  # no row twice
            prob[rows] = np.exp(log_prob.astype(np.float64))
        return prob / prob.sum(axis=1, keepdims=True)

    def trial_files(self) -> dict[str, tuple[int, int]]:
        """What tells whether a finished trial was written again."""
        found = sorted(self.folder.glob("trials/*/*/trial.json"))
        stats = {str(path.relative_to(self.folder)): path.stat() for path in found}
        return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, make_project: Callable[[Path], Any], cli: Cli
) -> Run:
    """A whole run, typed in another folder than the config's."""
    root = tmp_path_factory.mktemp("finished")
    project = make_project(root / "my project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        config = project.write().relative_to(root)
        succeeded(cli("run", config, "--out", "some runs/first"))
    return Run(root / "some runs" / "first", project)


@pytest.fixture
def copied(finished: Run, tmp_path: Path) -> Run:
    """A copy that a test may change."""
    shutil.copytree(finished.folder, tmp_path / "copy", copy_function=shutil.copy2)
    return Run(tmp_path / "copy", finished.project)


def test_the_files_of_the_contract(finished: Run) -> None:
    names = {
        "sweep.yaml", "folds.csv", "classes.json", "study.journal", "leaderboard.csv", "trials.csv",
        "ensemble/ensemble.json", "ensemble/trajectory.csv", "ensemble/oof.npy", "submission.csv",
        "submission.receipt.json", "report/index.html", "logs/application.log",
    }  # fmt: skip
    for candidate in ("c0000", "c0001"):
        for fold in (0, 1):
            names |= {
                f"trials/{candidate}/fold{fold}/{name}"
                for name in ("trial.json", "train_log.csv", "rows.npy", "oof.npy", "oof_ema.npy",
                             "true_prob.npy", "true_prob_ema.npy", "best.safetensors",
                             "best_ema.safetensors")
            }  # fmt: skip
    there = {str(p.relative_to(finished.folder)) for p in finished.folder.rglob("*") if p.is_file()}
    assert names <= there
    assert not [name for name in there if ".part-" in name or name.endswith((".pkl", ".pt"))]
    assert list(finished.folder.glob("report/*.png"))


def test_the_columns_of_the_contract(finished: Run) -> None:
    leaderboard, trials = finished.table("leaderboard.csv"), finished.table("trials.csv")
    columns = list(leaderboard.columns)
    assert columns[: len(LEADERBOARD)] == LEADERBOARD
    assert all(name.startswith("hp.") for name in columns[len(LEADERBOARD) :])
    assert "hp.lr" in columns
    assert list(trials.columns) == TRIALS and len(trials) == 4
    assert list(finished.table("folds.csv").columns) == ["image_path", "target", "group", "fold"]
    log = pd.read_csv(finished.folder / "trials/c0000/fold0/train_log.csv")
    assert [*TRAIN_LOG, "seconds"] == [c for c in log.columns if not c.startswith("ema")]
    trajectory = finished.table("ensemble/trajectory.csv")
    assert list(trajectory.columns) == ["round", "candidate", "variant", "oof_logloss", "run"]


def test_the_config_is_stored_resolved(finished: Run) -> None:
    stored = yaml.safe_load((finished.folder / "sweep.yaml").read_text(encoding="utf-8"))
    assert stored["data"]["train"] == str(finished.project.folder / "train.csv")
    assert stored["ensemble"]["method"] == "greedy" and stored["name"] == "sweep config"


def test_folds_are_stratified_and_whole(finished: Run) -> None:
    folds = finished.table("folds.csv")
    assert folds.groupby(["target", "fold"]).size().tolist() == [10] * 6
    written = [row[0] for row in finished.project.rows("train.csv")[1:]]
    assert folds["image_path"].tolist() == written
    for candidate in ("c0000", "c0001"):
        assert np.isfinite(finished.oof(candidate, "raw")).all()


def test_the_leaderboard_is_scikit_learns_arithmetic(finished: Run) -> None:
    labels, fold = finished.labels(), finished.table("folds.csv")["fold"].to_numpy()
    leaderboard = finished.table("leaderboard.csv")
    assert leaderboard["status"].tolist() == ["complete"] * 2
    assert leaderboard["oof_logloss"].is_monotonic_increasing
    for row in leaderboard.itertuples():
        losses = {v: log_loss(labels, finished.oof(row.candidate, v)) for v in ("raw", "ema")}
        assert row.oof_logloss == pytest.approx(min(losses.values()), abs=2e-4)  # float16 files
        assert row.oof_logloss == pytest.approx(losses[row.variant], abs=2e-4)
        prob = finished.oof(row.candidate, row.variant)
        # The files are float16: of classes that are equal there, either was the larger one.
        tied = (np.sort(prob, axis=1)[:, -1] == np.sort(prob, axis=1)[:, -2]).mean()
        accuracy = accuracy_score(labels, prob.argmax(axis=1))
        assert row.oof_accuracy == pytest.approx(accuracy, abs=tied + 1e-6)
        last = fold == 1
        assert row.last_fold_logloss == pytest.approx(log_loss(labels[last], prob[last]), abs=2e-4)
        assert row.folds_done == 2 and row.epochs_trained == 4


def test_true_probabilities_are_those_of_the_oof(finished: Run) -> None:
    labels = finished.labels()
    for folder in sorted(finished.folder.glob("trials/*/fold*")):
        rows, true = np.load(folder / "rows.npy"), np.load(folder / "true_prob.npy")
        assert true.dtype == np.float32 and rows.dtype == np.int64
        prob = np.exp(np.load(folder / "oof.npy").astype(np.float64))
        np.testing.assert_allclose(true, prob[np.arange(len(rows)), labels[rows]], rtol=2e-3)
        score = json.loads((folder / "trial.json").read_text())["variants"]["raw"]
        assert score["val_logloss"] == pytest.approx(-np.log(true.astype(np.float64)).mean())


def test_the_blend_is_what_it_says(finished: Run) -> None:
    record, labels = finished.json("ensemble/ensemble.json"), finished.labels()
    weights = [member["weight"] for member in record["members"]]
    assert sum(weights) == pytest.approx(1) and min(weights) > 0
    powered = [
        finished.oof(m["candidate"], m["variant"]) ** (1 / m["temperature"])
        for m in record["members"]
    ]
    parts = [p / p.sum(axis=1, keepdims=True) for p in powered]
    mixed = np.sum([w * p for w, p in zip(weights, parts, strict=True)], axis=0)
    assert record["mixture_logloss"] == pytest.approx(log_loss(labels, mixed), abs=2e-4)
    blend = mixed ** (1 / record["blend_temperature"])
    blend /= blend.sum(axis=1, keepdims=True)
    assert record["oof_logloss"] == pytest.approx(log_loss(labels, blend), abs=2e-4)
    assert record["oof_accuracy"] == pytest.approx((blend.argmax(axis=1) == labels).mean())
    assert record["mixture_logloss"] <= record["best_single_oof_logloss"] + 1e-12
    assert record["certificate"] >= 0 and record["members_considered"] == 4
    best = finished.table("leaderboard.csv")["oof_logloss"].min()
    assert record["best_single_oof_logloss"] == pytest.approx(best, abs=1e-5)
    stored = np.exp(np.load(finished.folder / "ensemble/oof.npy").astype(np.float64))
    np.testing.assert_allclose(stored, blend, atol=2e-3)


def test_the_submission_has_the_form_of_the_sample(finished: Run) -> None:
    sample = pd.read_csv(finished.project.folder / "sample submission.csv")
    submission = finished.table("submission.csv")
    assert list(submission.columns) == list(sample.columns)
    assert submission["id"].tolist() == sample["id"].tolist()
    values = submission.drop(columns="id").to_numpy()
    assert np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1
    np.testing.assert_allclose(values.sum(axis=1), 1, atol=1e-6)
    assert not np.allclose(values, 1 / 3)
    receipt = finished.json("submission.receipt.json")
    assert receipt["rows"] == 9 and receipt["columns"] == list(sample.columns)
    assert len(receipt["checks"]) >= 5


def test_submit_and_predict_agree_with_the_run(finished: Run, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "new folder" / "again.csv"
    succeeded(cli("submit", finished.folder, "--out", out))
    assert out.read_bytes() == (finished.folder / "submission.csv").read_bytes()
    assert out.with_name("again.receipt.json").exists()

    broken = tmp_path / "broken, image.png"
    broken.write_bytes(b"\x89PNG\r\n nothing else")
    absent = tmp_path / "absent.png"
    test_folder = finished.project.folder / "test"
    result = succeeded(cli("predict", finished.folder, test_folder, broken, absent))
    table = pd.read_csv(io.StringIO(result.stdout), keep_default_na=False)
    assert list(table.columns) == ["image_path", "class", "confidence", *finished.classes, "error"]
    assert len(table) == 11
    errors = table[table["class"] == "ERROR"]
    assert errors["image_path"].tolist() == [str(broken), str(absent)]
    assert "not an image" in errors["error"].iloc[0] and "not exist" in errors["error"].iloc[1]
    submission = finished.table("submission.csv").set_index("id")
    for row in table[table["class"] != "ERROR"].to_dict("records"):
        expected = submission.loc[Path(row["image_path"]).stem]
        got = {name: float(row[name]) for name in finished.classes}
        assert got == pytest.approx({n: expected[n] for n in finished.classes}, abs=2e-5)
        assert row["class"] == max(got, key=lambda name: got[name])
        assert float(row["confidence"]) == max(got.values()) and row["error"] == ""


def test_predict_from_a_table(finished: Run, tmp_path: Path, cli: Cli) -> None:
    """Paths relative to the table; bytes of Korean Excel; a file as output."""
    table = finished.project.folder / "목록.csv"
    table.write_bytes("이름,image_path\n가,test/t 3.png\n나,사진 들/no 1.png\n".encode("cp949"))
    out = tmp_path / "somewhere" / "prediction.csv"
    result = succeeded(cli("predict", finished.folder, "--csv", table, "--out", out))
    assert "2 images predicted, 0 unreadable" in " ".join(result.stdout.split())
    rows = list(csv.DictReader(io.StringIO(out.read_text(encoding="utf-8"))))
    assert [row["image_path"] for row in rows] == [
        str(table.parent / "test/t 3.png"), str(table.parent / "사진 들/no 1.png"),
    ]  # fmt: skip


def test_predict_where_nothing_can_be_read(finished: Run, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    result = cli("predict", finished.folder, tmp_path)
    assert result.exit_code == 1 and "none of the images" in result.stderr
    assert result.stdout.count("ERROR") == 1 and "Traceback" not in result.stderr


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
    oof = set(copied.folder.rglob("*.npy"))
    succeeded(cli("resume", copied.folder, *keep))
    [member] = copied.json("ensemble/ensemble.json")["members"]
    assert weights_of(copied) == weights_of_member(member)
    assert set(copied.folder.rglob("*.npy")) == oof

    result = succeeded(cli("ensemble", copied.folder, "--max-members", "4"))
    assert "their weights are not there: 3 members" in " ".join(result.stdout.split())
    assert copied.json("ensemble/ensemble.json")["members"] == [member]
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
    assert len(run.table("submission.csv")) == 9
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
        log_loss(labels, prob / prob.sum(axis=1, keepdims=True)), abs=1e-4
    )
    assert scored["accuracy"] == pytest.approx((prob.argmax(axis=1) == labels).mean())
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
