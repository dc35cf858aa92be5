"""One sweep on tiny images, from the command line to the submission, checked with other packages'
arithmetic: trained in this process, and once more in the workers of a real Ray."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from numpy.typing import NDArray
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score, log_loss

from tests.end_to_end.runs import KEPT, Cli, Run, succeeded, undecided
from tests.ensemble.temperature_reference import smoothed_temperature

Floats, Ints = NDArray[np.float64], NDArray[np.int64]

pytestmark = pytest.mark.usefixtures("both_rays")

LEADERBOARD = [
    "candidate",
    "backbone",
    "status",
    "folds_done",
    "variant",
    "oof_logloss",
    "oof_calibrated_logloss",
    "oof_accuracy",
    "gain",
    "gain_se",
    "epochs_trained",
    "seconds",
    "teacher",
]
TRIALS = [
    "candidate",
    "fold",
    "status",
    "variant",
    "val_logloss",
    "val_calibrated_logloss",
    "epoch",
    "epochs_trained",
    "seconds",
    "node",
    "device",
]
TRAIN_LOG = [
    "epoch",
    "train_loss",
    "train_acc",
    "val_loss",
    "val_acc",
    "val_logloss",
    "val_calibrated_logloss",
    "lr",
]


@pytest.fixture(scope="module")
def quick_charts() -> None:
    """The report is drawn as users have it."""


@pytest.fixture(scope="module")
def finished(
    both_rays: object,
    tmp_path_factory: pytest.TempPathFactory,
    make_project: Callable[[Path], Any],
    cli: Cli,
) -> Run:
    """A whole run, typed in another folder than the config's."""
    root = tmp_path_factory.mktemp("finished")
    project = make_project(root / "my project")
    project.config["resources"] = {"gpus_per_trial": "auto"}  # of which there are none
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        config = project.write().relative_to(root)
        succeeded(cli("run", config, "--out", "some runs/first"))
    return Run(root / "some runs" / "first", project)


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_gpus_by_memory_where_there_are_none(finished: Run, cli: Cli) -> None:
    """`auto` is as if the key were not set; `check` says so."""
    trials = finished.folder.glob("trials/*/fold*/trial.json")
    assert [json.loads(path.read_text())["devices"] for path in trials] == [1.0] * 4
    assert not (finished.folder / "logs" / "gpu_memory.json").exists()
    said = succeeded(cli("check", finished.project.write())).output
    assert "gpus_per_trial auto: this machine has no GPU" in " ".join(said.split())


def test_folds_are_stratified_and_whole(finished: Run) -> None:
    folds = finished.table("folds.csv")
    assert folds.groupby(["target", "fold"]).size().tolist() == [10] * 6
    written = [row[0] for row in finished.project.rows("train.csv")[1:]]
    assert folds["image_path"].tolist() == written
    for candidate in ("c0000", "c0001"):
        assert np.isfinite(finished.oof(candidate, "raw")).all()


def calibrated_loss(prob: Floats, labels: Ints) -> float:
    """By scipy: at the fitted temperature, or without one where that is better."""
    log_prob = np.log(prob)
    scaled = log_softmax(log_prob / smoothed_temperature(log_prob, labels), axis=1)
    return min(log_loss(labels, prob), log_loss(labels, np.exp(scaled)))


def rounding(prob: Floats, labels: Ints, fold: Ints) -> float:
    """What float16 log-probabilities may change of a calibrated loss: a low temperature multiplies
    their rounding."""
    least = min(
        smoothed_temperature(np.log(prob[fold == k]), labels[fold == k])
        for k in range(fold.max() + 1)
    )
    return float(2**-11 * np.abs(np.log(prob)).mean() / min(least, 1.0))


def pooled_calibrated(prob: Floats, labels: Ints, fold: Ints) -> float:
    parts = [fold == k for k in range(fold.max() + 1)]
    losses = [calibrated_loss(prob[rows], labels[rows]) for rows in parts]
    return float(np.average(losses, weights=[rows.sum() for rows in parts]))


def test_the_leaderboard_is_scikit_learns_arithmetic(finished: Run) -> None:
    labels, fold = finished.labels(), finished.table("folds.csv")["fold"].to_numpy()
    leaderboard = finished.table("leaderboard.csv")
    assert leaderboard["status"].tolist() == ["complete"] * 2
    assert leaderboard["oof_calibrated_logloss"].is_monotonic_increasing
    for row in leaderboard.itertuples():
        oof = {v: finished.oof(row.candidate, v) for v in ("raw", "ema")}
        calibrated = {v: pooled_calibrated(prob, labels, fold) for v, prob in oof.items()}
        off = rounding(oof[row.variant], labels, fold)
        assert row.oof_calibrated_logloss == pytest.approx(min(calibrated.values()), abs=off)
        assert row.oof_calibrated_logloss == pytest.approx(calibrated[row.variant], abs=off)
        prob = oof[row.variant]
        assert row.oof_logloss == pytest.approx(log_loss(labels, prob), abs=2e-4)  # float16
        # The files are float16: of classes that are equal there, either was the larger one.
        tied = (np.sort(prob, axis=1)[:, -1] == np.sort(prob, axis=1)[:, -2]).mean()
        accuracy = accuracy_score(labels, prob.argmax(axis=1))
        assert row.oof_accuracy == pytest.approx(accuracy, abs=tied + 1e-6)
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
    right = (blend.argmax(axis=1) == labels).mean()
    assert record["oof_accuracy"] == pytest.approx(right, abs=undecided(blend) + 1e-6)
    assert record["mixture_logloss"] <= record["best_single_oof_logloss"] + 1e-12
    assert record["certificate"] >= 0 and record["members_considered"] == 4
    trials = [json.loads(f.read_text()) for f in finished.folder.glob("trials/*/fold*/trial.json")]
    pooled = [
        sum(s["rows"] * s["val_logloss"] for s in scores) / sum(s["rows"] for s in scores)
        for candidate in {trial["candidate"] for trial in trials}
        for variant in ("raw", "ema")
        if (scores := [t["variants"][variant] for t in trials if t["candidate"] == candidate])
    ]
    assert record["best_single_oof_logloss"] == pytest.approx(min(pooled), abs=1e-5)
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
    before = out.read_bytes()
    again = cli("submit", finished.folder, "--out", out)
    assert again.exit_code == 2 and "again.csv exists; remove it or give another" in again.stderr
    folder = cli("submit", finished.folder, "--out", out.parent)
    assert folder.exit_code == 2 and "is a folder; name a file in it" in folder.stderr
    assert out.read_bytes() == before
    log = finished.table("submissions/log.csv")
    assert log["file"].tolist() == ["submissions/0001.csv", str(out)]
    assert log["number"].tolist() == [1, 2] and log["public_score"].isna().all()
    assert log["sha256"].tolist() == [hashlib.sha256(before).hexdigest()] * 2

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
        assert got == pytest.approx({n: expected[n] for n in finished.classes}, abs=KEPT)
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
