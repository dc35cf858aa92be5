"""What is damaged, changed by hand, moved or comes later, after a run: what each command says, and
that no finished trial is lost by it."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from click.testing import Result

from tests.end_to_end.runs import KEPT, Cli, Run, succeeded

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("any_ray")]


@pytest.fixture(scope="module")
def finished(
    any_ray: object,
    tmp_path_factory: pytest.TempPathFactory,
    make_project: Callable[[Path], Any],
    cli: Cli,
) -> Run:
    """Two candidates of two folds; never changed. Its data are gone: each test has its own."""
    root = tmp_path_factory.mktemp("finished")
    project = make_project(root / "data")
    del project.config["data"]["test"], project.config["data"]["sample_submission"]
    succeeded(cli("run", project.write(), "--out", root / "run"))
    shutil.move(root / "data", root / "kept")
    project.folder = root / "kept"
    return Run(root / "run", project)


@pytest.fixture
def moved(finished: Run, tmp_path: Path) -> Run:
    """A copy of run and data that a test may change; sweep.yaml knows only the old place."""
    shutil.copytree(finished.folder, tmp_path / "run", copy_function=shutil.copy2)
    shutil.copytree(finished.project.folder, tmp_path / "data", copy_function=shutil.copy2)
    project = type(finished.project)(tmp_path / "data", finished.project.config)
    return Run(tmp_path / "run", project)


@pytest.fixture
def run(moved: Run) -> Run:
    """The same with the data where sweep.yaml says."""
    change_config(moved, "data", train=str(moved.project.folder / "train.csv"))
    return moved


def change_config(run: Run, section: str, **values: object) -> None:
    path = run.folder / "sweep.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    config[section] |= values
    path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")


def said(result: Result) -> str:
    """All that was printed, without the line ends of the terminal."""
    return " ".join((result.stdout + result.stderr).split())


def refused(result: Result, *texts: str) -> None:
    assert result.exit_code == 2, f"{result.output}\n{result.exception!r}"
    for text in texts:
        assert text in said(result)


def trained(run: Run) -> dict[str, bytes]:
    """All that the fold trials have written."""
    files = (p for p in (run.folder / "trials").glob("*/fold*/*") if not p.name.startswith("test"))
    return {str(path.relative_to(run.folder)): path.read_bytes() for path in files}


# -- what belongs together


def test_every_trial_says_what_it_belongs_to(finished: Run) -> None:
    folds = hashlib.sha256((finished.folder / "folds.csv").read_bytes()).hexdigest()
    attempts = set()
    for path in finished.folder.glob("trials/*/fold*/trial.json"):
        record = json.loads(path.read_text())
        assert record["folds_hash"] == folds
        assert record["settings"]["training.image_size"] == 32
        attempts.add(record["attempt"])
        written = {p.name for p in path.parent.iterdir()} - {
            "trial.json", "train_log.csv", "decision.json"
        }  # fmt: skip
        assert {p for p in written if not p.startswith("test")} == set(record["digests"])
        for name, digest in record["digests"].items():
            assert hashlib.sha256((path.parent / name).read_bytes()).hexdigest() == digest
    assert len(attempts) == 4 and all(len(name) == 32 for name in attempts)


def test_changed_folds_are_refused(run: Run, cli: Cli) -> None:
    path = run.folder / "folds.csv"
    head, first, *rest = path.read_text(encoding="utf-8").splitlines(keepends=True)
    fold = first.rstrip("\n")[-1]
    path.write_text(head + first[:-2] + str(1 - int(fold)) + "\n" + "".join(rest), "utf-8")
    before = trained(run)
    text = "folds.csv: is not the one that 4 fold trials that ended (c0000 fold0, c0000 fold1,"
    result = succeeded(cli("status", run.folder))
    assert text in said(result) and "warning: " in said(result)
    refused(cli("resume", run.folder), text, "put that one back, or start a new run")
    refused(cli("ensemble", run.folder), text)
    assert trained(run) == before


def test_changed_settings_are_refused_with_both_values(run: Run, cli: Cli) -> None:
    change_config(run, "training", clip_grad=0.01, image_size=48)
    shutil.rmtree(run.folder / "trials/c0001/fold1")
    before = trained(run)
    result = cli("resume", run.folder)
    refused(
        result,
        "training.image_size is 48, but 3 fold trials that ended (c0000 fold0, c0000 fold1, c0001",
        "were trained with 32; put that back, or start a new run",
        "training.clip_grad is 0.01",
    )
    assert trained(run) == before
    assert "training.image_size is 48" in said(succeeded(cli("status", run.folder)))


def test_a_damaged_trial_is_named_and_run_again(run: Run, cli: Cli) -> None:
    path = run.folder / "trials/c0001/fold0/trial.json"
    before = trained(run)
    path.write_bytes(path.read_bytes()[:100])
    line = f"warning {path} is ignored: "
    assert line in said(succeeded(cli("status", run.folder)))
    assert line in said(succeeded(cli("ensemble", run.folder)))
    assert run.blend["candidates_considered"] == 1
    assert line in said(succeeded(cli("resume", run.folder)))
    assert run.blend["candidates_considered"] == 2
    after = trained(run)
    same = {name for name in before if not name.startswith("trials/c0001/fold0/")}
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    arrays = [name for name in before if name.endswith((".npy", ".safetensors"))]
    assert {name: after[name] for name in arrays} == {name: before[name] for name in arrays}


def test_an_array_of_another_trial_is_refused(run: Run, cli: Cli) -> None:
    """It has the right rows and shape: only its digest tells."""
    ours, others = (run.folder / f"trials/{c}/fold0/oof_ema.npy" for c in ("c0000", "c0001"))
    shutil.copyfile(others, ours)
    result = cli("ensemble", run.folder)
    refused(
        result,
        f"{ours}: c0000, fold 0: it does not belong to the trial.json beside it",
        "delete this fold's folder and resume",
    )


def test_weights_of_another_trial_are_refused(run: Run, cli: Cli) -> None:
    member = run.blend["members"][0]
    end = "" if member["variant"] == "raw" else f"_{member['variant']}"
    one, two = (
        run.folder / f"trials/{member['candidate']}/fold{k}/best{end}.safetensors" for k in (0, 1)
    )
    shutil.copyfile(two, one)
    result = cli("predict", run.folder, run.project.folder / "test")
    refused(result, f"{one}: cannot be read as weights: it does not belong", "resume")


def test_damaged_small_files_cost_a_line(run: Run, cli: Cli) -> None:
    candidate, classes = run.folder / "trials/c0000/candidate.json", run.folder / "classes.json"
    before = candidate.read_bytes(), classes.read_bytes()
    for path in (candidate, classes):
        path.write_bytes(path.read_bytes()[:20])
    lines = (f"warning {candidate} is ignored: it is damaged", f"warning {classes} is ignored: it")
    assert lines[0] in said(succeeded(cli("status", run.folder)))
    result = said(succeeded(cli("ensemble", run.folder)))
    assert all(line in result for line in lines)
    result = said(succeeded(cli("resume", run.folder)))
    assert all(line in result for line in lines)
    assert (candidate.read_bytes(), classes.read_bytes()) == before
    assert "is ignored" not in said(succeeded(cli("status", run.folder)))


@pytest.mark.parametrize("command", ["status", "ensemble", "resume"])
def test_damaged_folds_are_named_with_their_path(run: Run, cli: Cli, command: str) -> None:
    path = run.folder / "folds.csv"
    path.write_bytes(path.read_bytes()[:333])
    refused(cli(command, run.folder), f"{path}: is damaged: row ", "foldrace split")


def test_folds_are_made_anew_as_they_were(run: Run, cli: Cli) -> None:
    """As the message advises."""
    path = run.folder / "folds.csv"
    before = path.read_bytes()
    path.unlink()
    succeeded(cli("split", run.folder / "sweep.yaml"))
    assert path.read_bytes() == before


# -- data that have changed


def test_corrected_labels_are_named_on_resume(run: Run, cli: Cli) -> None:
    rows = run.project.rows("train.csv")
    first, second = rows[1][1], rows[2][1]
    rows[1][1] = second
    run.project.save_rows("train.csv", rows)
    result = cli("resume", run.folder, "--set", "search.candidates=3")
    refused(result, f"line 2: {rows[1][0]}: the label is '{second}', was '{first}'", "1 of 60 rows")
    assert len(run.trial_files()) == 4


# -- data that have moved


@pytest.mark.parametrize("command", ["resume", "ensemble"])
def test_gone_data_name_the_option(moved: Run, cli: Cli, command: str) -> None:
    more = ("--method", "soup") if command == "ensemble" else ()
    result = cli(command, moved.folder, *more)
    refused(result, "does not exist", "`--data-root DIR` names the folder", "--set data.train=PATH")


def test_a_run_is_extended_where_its_data_are_now(moved: Run, cli: Cli) -> None:
    before = trained(moved)
    root = moved.project.folder
    more = ("--set", "search.candidates=3")
    succeeded(cli("resume", moved.folder, "--data-root", root, *more))
    after = trained(moved)
    assert {name: after[name] for name in before} == before and len(after) > len(before)
    config = yaml.safe_load((moved.folder / "sweep.yaml").read_text(encoding="utf-8"))
    assert config["data"]["train"] == str(root / "train.csv")
    succeeded(cli("resume", moved.folder))  # the place is known now


def test_single_places_and_other_rows(
    moved: Run, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative to where the user types; a table with other rows is refused, and nothing saved."""
    monkeypatch.chdir(moved.project.folder)
    before = (moved.folder / "sweep.yaml").read_bytes()
    rows = moved.project.rows("train.csv")
    moved.project.save_rows("fewer.csv", rows[:-1])
    refused(
        cli("resume", moved.folder, "--set", "data.train=fewer.csv"), "lists 60 images", "gives 59"
    )
    image = moved.project.folder / rows[5][0]
    image.write_bytes(image.read_bytes() + b"more")
    place = ("--set", "data.train=train.csv")
    refused(cli("resume", moved.folder, *place), f"{rows[5][0]}: gone, or of another size")
    refused(cli("resume", moved.folder, "--data-root", tmp_path / "nowhere"), "is no folder")
    refused(cli("resume", moved.folder, "--set", "data.label_column=farm"), "cannot change")
    refused(cli("submit", moved.folder, "--set", "folds.k=3"), "--set folds.k", "data.train")
    assert (moved.folder / "sweep.yaml").read_bytes() == before


# -- test sets that come later


def test_a_run_without_a_test_set_has_nothing_to_submit(finished: Run, cli: Cli) -> None:
    refused(cli("submit", finished.folder), "data.test is not set", "submit --test T")


def test_a_test_set_that_comes_later(
    moved: Run, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as `predict` says of its images; paths are relative to where the user types."""
    data = moved.project.folder
    monkeypatch.chdir(data)
    out = tmp_path / "later.csv"
    config = (moved.folder / "sweep.yaml").read_bytes()
    form = ("--sample-submission", "sample submission.csv")
    succeeded(cli("submit", moved.folder, "--test", "test.csv", *form, "--out", out))
    assert not (moved.folder / "submission.csv").exists()
    assert (moved.folder / "sweep.yaml").read_bytes() == config
    written, sample = pd.read_csv(out), pd.read_csv("sample submission.csv")
    assert list(written.columns) == list(sample.columns)
    assert list(written["id"]) == list(sample["id"])
    receipt = json.loads((tmp_path / "later.receipt.json").read_text(encoding="utf-8"))
    assert receipt["test"] == str(data / "test.csv")
    table = pd.read_csv("test.csv").set_index("id").loc[written["id"]]
    files = [data / path for path in table["image_path"]]
    succeeded(cli("predict", moved.folder, *files, "--out", tmp_path / "predicted.csv"))
    predicted = pd.read_csv(tmp_path / "predicted.csv")
    names = moved.classes
    np.testing.assert_allclose(written[names], predicted[names], atol=KEPT)


def test_test_sets_are_not_mixed(moved: Run, cli: Cli, tmp_path: Path) -> None:
    """What models said of one set is kept; another one, with the same ids, is predicted anew."""
    data = moved.project.folder
    other = tmp_path / "other"
    shutil.copytree(data / "test", other)
    names = sorted(path.name for path in other.iterdir())
    (other / names[0]).rename(other / "x.png")
    (other / names[1]).rename(other / names[0])
    (other / "x.png").rename(other / names[1])
    found = []
    for folder in (data / "test", other, data / "test"):
        out = tmp_path / f"out{len(found)}.csv"
        succeeded(cli("submit", moved.folder, "--test", folder, "--out", out))
        found.append(pd.read_csv(out).set_index("id"))
    assert list(found[0].columns) == moved.classes
    pd.testing.assert_frame_equal(found[0], found[2])
    first, second = found[0].loc[names[0]], found[0].loc[names[1]]
    np.testing.assert_allclose(found[1].loc[names[0]], second, atol=KEPT)
    np.testing.assert_allclose(found[1].loc[names[1]], first, atol=KEPT)
    assert np.abs(first - second).max() > KEPT


def test_wrong_test_sets_are_named_as_the_config_s_are(moved: Run, cli: Cli) -> None:
    data = moved.project.folder
    result = cli("submit", moved.folder, "--test", data / "nix.csv")
    refused(result, "1 problem: - data.test: ", "does not exist")
    with (data / "short.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(moved.project.rows("sample submission.csv")[:-1])
    refused(
        cli(
            "submit", moved.folder, "--test", data / "test.csv",
            "--sample-submission", data / "short.csv",
        ),
        "test images without an id in it",
    )  # fmt: skip
    empty = data / "empty"
    empty.mkdir()
    refused(cli("submit", moved.folder, "--test", empty), "holds no images")
