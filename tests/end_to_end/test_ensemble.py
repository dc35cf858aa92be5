"""`ensemble DIR` as people type it, on a trained run: every method and option, then what predicts
with the blend, and what happens when something is wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import Result

from foldrace.ensemble.methods import METHODS
from foldrace.run_folder.store import RunStore
from tests.end_to_end.runs import Cli, Run, succeeded
from tests.ensemble.made_runs import rewrite
from tests.pretend_tune import pretend_ray

pytestmark = pytest.mark.slow


def refused(result: Result) -> str:
    """What is told, in one line."""
    assert result.exit_code == 2, f"{result.output}\n{result.exception!r}"
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, make_project: Callable[[Path], Any], cli: Cli
) -> Run:
    """Never changed: two candidates with raw, EMA and snapshot weights, trained in this process."""
    root = tmp_path_factory.mktemp("finished")
    project = make_project(root / "project")
    project.config["search"]["space"] |= {"snapshots": 1, "lr": 5e-3}
    with pytest.MonkeyPatch.context() as patch, pretend_ray():
        patch.setenv("FOLDRACE_CACHE", str(root / "cache"))
        succeeded(cli("run", project.write(), "--out", root / "run"))
    return Run(root / "run", project)


@pytest.fixture(scope="module")
def shared(finished: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """For tests that blend anew and need no particular blend before."""
    folder = tmp_path_factory.mktemp("shared") / "run"
    shutil.copytree(finished.folder, folder)
    return Run(folder, finished.project)


@pytest.fixture
def copied(finished: Run, tmp_path: Path) -> Run:
    shutil.copytree(finished.folder, tmp_path / "copy")
    return Run(tmp_path / "copy", finished.project)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "soup"])
def test_every_method_blends_and_submits(shared: Run, cli: Cli, method: str) -> None:
    result = succeeded(cli("ensemble", shared.folder, "--method", method))
    assert f"({method})" in result.output and "cross-fitted" in result.output
    blend = shared.blend
    assert blend["method"] == method and np.isfinite(blend["oof_logloss"])
    assert blend["ms_per_image"] > 0 and blend["weight_bytes"] > 0
    succeeded(cli("submit", shared.folder))
    prob = shared.submission()
    assert prob.shape == (9, 3) and np.isfinite(prob).all()
    np.testing.assert_allclose(prob.sum(axis=1), 1, atol=1e-6)


def test_soup(shared: Run, cli: Cli) -> None:
    """Kept only where the mean of weights is better than each model."""
    result = cli("ensemble", shared.folder, "--method", "soup")
    if "Soup of" in result.output:
        succeeded(result)
        assert [m["variant"] for m in shared.blend["members"]] == ["soup"]
    else:
        assert "No soup of" in result.output
        assert "'soup' needs soups" in refused(result) and "tries them" in result.stderr


def test_what_is_told_of_equal_weights(shared: Run, cli: Cli) -> None:
    result = succeeded(cli("ensemble", shared.folder, "--method", "uniform"))
    assert "(uniform)" in result.stdout
    weights = [member["weight"] for member in shared.blend["members"]]
    np.testing.assert_allclose(weights, 1 / len(weights))


def test_what_is_wrong_goes_to_stderr(shared: Run, cli: Cli) -> None:
    result = cli("ensemble", shared.folder, "--exclude", "c0042")
    assert "c0042" in refused(result)
    assert "c0042" in result.stderr and "c0042" not in result.stdout


def test_names(shared: Run, cli: Cli) -> None:
    uniform = "ensemble", shared.folder, "--method", "uniform"
    succeeded(cli(*uniform, "--exclude", "c0000", "--exclude", "c0001 ema"))
    members = {(m["candidate"], m["variant"]) for m in shared.blend["members"]}
    assert members and not members & {("c0000", "raw"), ("c0000", "ema"), ("c0001", "ema")}
    for wish in ("c0000", "c0001"):
        succeeded(cli("ensemble", shared.folder, "--include", wish))
        assert wish in {m["candidate"] for m in shared.blend["members"]}


def test_limits(shared: Run, cli: Cli) -> None:
    succeeded(cli("ensemble", shared.folder, "--method", "uniform"))
    free = shared.blend
    every = [m["ms_per_image"] for m in free["members"]]
    limit = 1.001 * min(every)
    succeeded(cli("ensemble", shared.folder, "--max-ms-per-image", limit))
    assert shared.blend["ms_per_image"] <= limit and len(shared.blend["members"]) == 1
    assert shared.blend["curve"] and shared.blend["device"]
    sizes = [m["weight_bytes"] for m in free["members"]]
    folder = shared.folder / "trials" / free["members"][0]["candidate"]
    suffix = {"raw": "", "ema": "_ema"}.get(free["members"][0]["variant"], "_snap1")
    on_disk = sum(f.stat().st_size for f in folder.glob(f"fold*/best{suffix}.safetensors"))
    assert free["members"][0]["weight_bytes"] == on_disk
    succeeded(cli("ensemble", shared.folder, "--max-bytes", min(sizes)))
    assert shared.blend["weight_bytes"] <= min(sizes)
    text = refused(cli("ensemble", shared.folder, "--max-bytes", 10, "--max-ms-per-image", 1e-9))
    assert "ensemble.max_bytes: is 10; the cheapest member" in text
    assert "ensemble.max_ms_per_image: is 1e-09; the cheapest member" in text


def test_another_run_folder(copied: Run, finished: Run, cli: Cli) -> None:
    """A member that only the other folder has; it predicts with the weights there."""
    shutil.rmtree(copied.folder / "trials" / "c0001")
    other = "--run", finished.folder, "--include", "c0001"
    succeeded(cli("ensemble", copied.folder, *other))
    runs = {m["candidate"]: m["run"] for m in copied.blend["members"]}
    assert runs["c0001"] == str(finished.folder)
    assert runs.get("c0000", "") == ""
    succeeded(cli("submit", copied.folder))
    succeeded(cli("predict", copied.folder, copied.project.folder / "test"))
    text = refused(cli("ensemble", copied.folder, "--run", copied.project.folder, *other[:2] * 2))
    assert f"{copied.project.folder}: " in text and "is named twice" in text


@pytest.mark.parametrize("kind", ["csv", "npy"])
def test_predictions_made_elsewhere(copied: Run, tmp_path: Path, cli: Cli, kind: str) -> None:
    run, oof = copied, copied.good(0.5)
    tested = np.random.default_rng(0).dirichlet(np.ones(3), size=9)
    files = tmp_path / f"oof.{kind}", tmp_path / f"test.{kind}"
    if kind == "npy":
        np.save(files[0], oof)
        np.save(files[1], tested)
    else:
        names = run.folds()["image_path"].tolist()
        for file, ids, prob in ((files[0], names, oof), (files[1], run.test_ids(), tested)):
            table = pd.DataFrame(prob, columns=run.classes)
            table.insert(0, "image_path" if ids is names else "id", ids)
            table.sample(frac=1, random_state=3).to_csv(file, index=False)
    add = f"mine={files[0]}:{files[1]}"
    result = succeeded(cli("ensemble", run.folder, "--add", add, "--max-members", 1))
    (member,) = run.blend["members"]
    assert "mine added" in result.output and run.blend["best_single"] == "mine added"
    labels = [run.classes.index(name) for name in run.folds()["target"]]
    expected = -np.log(oof[np.arange(len(oof)), labels]).mean()
    assert run.blend["best_single_oof_logloss"] == pytest.approx(expected, abs=1e-6)
    succeeded(cli("submit", run.folder))
    powered = tested ** (1 / (member["temperature"] * run.blend["blend_temperature"]))
    expected_rows = powered / powered.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(run.submission(), expected_rows, atol=1e-5)
    before = run.contents()
    text = refused(cli("predict", run.folder, run.project.folder / "test"))
    assert "mine" in text and "without --add" in text
    assert run.contents() == before


def test_predictions_of_the_test_set_alone(copied: Run, tmp_path: Path, cli: Cli) -> None:
    """Averaged into the submission, and said to be backed by nothing."""
    succeeded(cli("ensemble", copied.folder))
    succeeded(cli("submit", copied.folder))
    alone = copied.submission()
    tested = np.random.default_rng(0).dirichlet(np.ones(3), size=9)
    np.save(tmp_path / "test.npy", tested)
    result = succeeded(cli("ensemble", copied.folder, "--add", f"theirs=:{tmp_path}/test.npy"))
    assert "Unvalidated: theirs has no OOF predictions" in " ".join(result.output.split())
    assert copied.blend["unvalidated"] == [{"name": "theirs", "weight": 0.5}]
    told = " ".join(succeeded(cli("submit", copied.folder)).output.split())
    assert "predictions in it, backed by no score: theirs (0.500 of each row)" in told
    np.testing.assert_allclose(copied.submission(), 0.5 * alone + 0.5 * tested, atol=1e-5)
    succeeded(cli("predict", copied.folder, copied.project.folder / "test"))


def test_all_that_is_wrong_is_told_and_nothing_lost(copied: Run, tmp_path: Path, cli: Cli) -> None:
    good = tmp_path / "good.npy"
    np.save(good, copied.good(0.5))
    succeeded(cli("ensemble", copied.folder, "--add", f"mine={good}"))
    before = copied.contents()
    assert "ensemble/added/mine/oof.npy" in before
    wishes = "--method", "gredy", "--include", "c0077", "--exclude", "x/y"
    text = refused(cli("ensemble", copied.folder, *wishes))
    assert "did you mean 'greedy'" in text and "'c0077'" in text and "'x/y'" in text
    broken = tmp_path / "broken.csv"
    table = pd.DataFrame(copied.good(0.5), columns=copied.classes)
    table.insert(0, "image_path", copied.folds()["image_path"])
    table.drop(index=5).to_csv(tmp_path / "short.csv", index=False)
    table.loc[3, copied.classes[1]] = 7.0
    table.to_csv(broken, index=False)
    names = {"mine": broken.name, "short": "short.csv", "other": "absent.csv"}
    adds = [word for name, file in names.items() for word in ("--add", f"{name}={tmp_path / file}")]
    text = refused(cli("ensemble", copied.folder, *adds))
    where = f"line 5, column {copied.classes[1]!r}: '7.0'"
    assert f"{broken}: values that are no probability: {where}" in text
    assert "1 of 60 scored rows are not in it" in text and "absent.csv: does not exist" in text
    np.save(good, copied.good(0.9))
    text = refused(cli("ensemble", copied.folder, "--add", f"mine={good}", "--max-bytes", 1))
    assert "the time and size of predictions made elsewhere are unknown" in text
    assert copied.contents() == before


def test_a_nan_in_stored_predictions(copied: Run, cli: Cli) -> None:
    file = copied.folder / "trials" / "c0001" / "fold1" / "oof.npy"
    array = np.load(file)
    array[4, 1] = np.nan
    rewrite(RunStore(copied.folder), "c0001", 1, "oof.npy", array)
    row = int(np.load(file.with_name("rows.npy"))[4])
    before = copied.contents()
    text = refused(cli("ensemble", copied.folder))
    image = copied.folds()["image_path"][row]
    where = f"{file}: c0001 raw, fold 1, line {row + 2} of folds.csv ({image})"
    assert "".join(where.split()) in "".join(text.split())
    assert copied.contents() == before
