"""A result at any time: what a sweep writes while it goes on, `submit` and `ensemble` on it, and
fold models that predict the test set once."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from foldrace.commands import finish
from foldrace.commands.update import write_so_far
from foldrace.console.machine import only_driver
from foldrace.inference.run_models import RunModels
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.ray import tuner
from tests.conftest import REAL
from tests.end_to_end.runs import Cli, Run, succeeded

pytestmark = pytest.mark.slow
SHORT = ("--set", "training.epochs=1", "--set", "resources.max_concurrent=2")


@pytest.fixture
def copied(finished_run: Run, tmp_path: Path) -> Run:
    """Without a blend and what comes after it, as in mid-sweep."""
    folder = tmp_path / "copy"
    shutil.copytree(finished_run.folder, folder)
    shutil.rmtree(folder / "submissions")
    for path in (*folder.glob("submission.*"), *folder.glob("trials/*/fold*/test*.npy")):
        path.unlink()
    shutil.rmtree(folder / "ensemble")
    return Run(folder, finished_run.project)


@contextmanager
def sweeping(run: Run) -> Iterator[None]:
    """A driver is at work on the run folder."""
    store = RunStore.open(run.folder)
    with only_driver(store, "run"):
        yield


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """Fold models whose weights are loaded."""
    found: list[tuple[str, str, int]] = []
    real = RunModels.open

    def counting(self: RunModels, candidate: str, variant: str, fold: int) -> Any:
        found.append((candidate, variant, fold))
        return real(self, candidate, variant, fold)

    monkeypatch.setattr(RunModels, "open", counting)
    return found


def kept(run: Run) -> set[Path]:
    """The kept predictions of the test set."""
    return {p.relative_to(run.folder) for p in run.folder.glob("trials/*/fold*/test*.npy")}


def log_of(folder: Path) -> str:
    return (folder / "logs" / "application.log").read_text(encoding="utf-8")


def test_a_second_submit_opens_no_model_and_gives_the_same_bytes(
    copied: Run, cli: Cli, opened: list[tuple[str, str, int]]
) -> None:
    succeeded(cli("ensemble", copied.folder))
    members = {
        (m["candidate"], m["variant"]) for m in copied.json("ensemble/ensemble.json")["members"]
    }
    opened.clear()  # those whose time was measured
    succeeded(cli("submit", copied.folder))
    assert sorted(opened) == sorted((c, v, fold) for c, v in members for fold in (0, 1))
    assert len(kept(copied)) == len(opened)
    first = (copied.folder / "submission.csv").read_bytes()
    opened.clear()
    succeeded(cli("submit", copied.folder))
    assert opened == [] and (copied.folder / "submission.csv").read_bytes() == first


@pytest.mark.parametrize("change", ["image", "weights", "damaged", "other views"])
def test_what_has_changed_is_predicted_again(
    copied: Run, cli: Cli, opened: list[tuple[str, str, int]], change: str, tmp_path: Path
) -> None:
    succeeded(cli("ensemble", copied.folder, "--method", "top-k", "--max-members", "1"))
    succeeded(cli("submit", copied.folder))
    before, [first, second] = copied.submission(), sorted(kept(copied))
    opened.clear()
    options: tuple[str, ...] = ()
    if change == "image":
        [image] = copied.project.folder.glob("test/t 3.png")
        os.utime(image, (1.0, 1.0))
    elif change == "weights":
        [member] = copied.json("ensemble/ensemble.json")["members"]
        suffix = "" if member["variant"] == "raw" else f"_{member['variant']}"
        weights = copied.folder / first.parent / f"best{suffix}.safetensors"
        shutil.copy(weights, tmp_path / "weights")
        os.replace(tmp_path / "weights", weights)
    elif change == "damaged":
        (copied.folder / first).write_bytes(b"no array")
    else:
        options = ("--tta", "flip")
    succeeded(cli("submit", copied.folder, *options))
    one = change in ("weights", "damaged")
    assert [fold for _, _, fold in opened] == ([0] if one else [0, 1])
    if change == "other views":  # both are kept
        assert len(kept(copied)) == 4 and {first, second} < kept(copied)
        assert np.abs(copied.submission() - before).max() > 1e-6
    else:  # in place of the old ones
        assert len(kept(copied)) == 2
        np.testing.assert_array_equal(copied.submission(), before)


def test_submit_on_a_sweep_that_goes_on(copied: Run, cli: Cli) -> None:
    """What is complete is blended, once; the driver's lock stays with the driver."""
    shutil.rmtree(copied.folder / "trials" / "c0001" / "fold1")
    with sweeping(copied):
        succeeded(cli("submit", copied.folder))
        blend = copied.json("ensemble/ensemble.json")
        assert blend["candidates_considered"] == 1
        assert {m["candidate"] for m in blend["members"]} == {"c0000"}
        succeeded(cli("ensemble", copied.folder, "--method", "uniform"))
        succeeded(cli("submit", copied.folder))  # the user's own blend of the same candidates
        assert copied.json("ensemble/ensemble.json")["method"] == "uniform"
    text = succeeded(cli("status", copied.folder)).output
    loss = copied.json("submission.receipt.json")["crossfit_logloss"]
    assert re.search(rf"submission of \d{{4}}-\d\d-\d\d [\d:]{{8}}: .* {loss:.4f}", text)


def test_one_more_candidate_is_blended_where_it_helps(
    copied: Run, finished_run: Run, cli: Cli
) -> None:
    """A blend with a lower cross-fitted loss takes the other's place, and never a worse one."""
    fold = "trials/c0001/fold1"
    shutil.rmtree(copied.folder / fold)
    with sweeping(copied):
        succeeded(cli("submit", copied.folder))
        alone = copied.json("ensemble/ensemble.json")["crossfit_logloss"]
        shutil.copytree(finished_run.folder / fold, copied.folder / fold)
        succeeded(cli("submit", copied.folder))
    both = copied.json("ensemble/ensemble.json")["crossfit_logloss"]
    whole = finished_run.json("ensemble/ensemble.json")["crossfit_logloss"]
    assert both == pytest.approx(min(alone, whole))


@pytest.mark.parametrize("command", ["submit", "ensemble"])
def test_before_any_candidate_is_complete(copied: Run, cli: Cli, command: str) -> None:
    for candidate in ("c0000", "c0001"):
        shutil.rmtree(copied.folder / "trials" / candidate / "fold1")
    shutil.rmtree(copied.folder / "trials" / "c0001" / "fold0")
    with sweeping(copied):
        result = cli(command, copied.folder)
    assert result.exit_code == 2
    text = " ".join(result.stderr.split())
    assert "no complete candidate to blend yet: 1 fold trial of 2 candidates ended" in text
    assert "c0000 is ahead with 1 of its 2 folds" in text and "goes on, try again later" in text
    assert not (copied.folder / "ensemble").exists()


def test_names_of_what_is_not_complete_yet_are_left_out(copied: Run) -> None:
    """The config may name what comes later; a method that tries many is greedy meanwhile."""
    store = RunStore.open(copied.folder)
    config = store.config()
    later = config.ensemble.model_copy(
        update={"exclude": ("c0007",), "include": ("c0001", "c0009"), "method": "auto"}
    )
    store.save_config(config.model_copy(update={"ensemble": later}))
    write_so_far(store.root, 1, False)
    blend = copied.json("ensemble/ensemble.json")
    assert blend["method"] == "greedy"
    assert "c0001" in {m["candidate"] for m in blend["members"]}
    assert len(pd.read_csv(copied.folder / "submission.csv")) == 9


@pytest.mark.parametrize("any_ray", ["pretended", REAL], indirect=True)
def test_the_result_follows_the_sweep(
    project: Any, cli: Cli, any_ray: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right after the first complete candidate; what it has predicted serves the end, too."""
    seen: list[dict[str, Any]] = []
    run = Run(project.folder / "run", project)
    real = finish._finish

    def spy(*arguments: Any) -> None:
        seen.append(run.json("submission.receipt.json"))
        seen.append(run.json("ensemble/update.json"))
        real(*arguments)

    monkeypatch.setattr(finish, "_finish", spy)
    succeeded(cli("run", project.write(), "--out", run.folder, *SHORT))
    receipt, update = seen
    assert {m["candidate"] for m in receipt["members"]} == {"c0000"}
    assert 0 < update["seconds"] < 60 and 0 < update["blend_logloss"] < np.log(3) + 0.01
    log = log_of(run.folder)
    first = log.index("blend and submission so far written")
    assert log.index("c0000 complete") < first < log.index("sweep: ended")
    members = {
        (m["candidate"], m["variant"]) for m in run.json("ensemble/ensemble.json")["members"]
    }
    assert len(kept(run)) == 2 * len(members)  # others were removed at the end


def test_an_update_that_fails_ends_nothing(
    project: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(run: str, cpus: int, use_gpu: bool) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(finish, "write_so_far", full)
    folder = project.folder / "run"
    succeeded(cli("run", project.write(), "--out", folder, *SHORT))
    [warning] = [line for line in log_of(folder).splitlines() if " WARNING " in line]
    assert "so far were not written: [Errno 28] No space left" in warning
    assert (folder / "submission.csv").exists()


def test_an_interrupted_sweep_keeps_its_submission(
    project: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says where it is; the next session does not write it again without need."""
    factory = tuner.trainable

    def interrupted(job: Any) -> Callable[[dict[str, Any]], None]:
        real = factory(job)

        def trial(values: dict[str, Any]) -> None:
            if values.get("candidate") == "c0001" and values["fold"] == 1:
                os.kill(os.getpid(), signal.SIGINT)
            real(values)

        return trial

    folder = project.folder / "run"
    with monkeypatch.context() as patch:
        patch.setattr(tuner, "trainable", interrupted)
        one = ("--set", "resources.max_concurrent=1")
        result = cli("run", project.write(), "--out", folder, *SHORT, *one)
    assert result.exit_code == 130
    assert len(pd.read_csv(folder / "submission.csv")) == 9
    text = " ".join(result.stderr.split())
    assert f"resume {folder}" in text and f"{folder}/submission.csv: submission of" in text
    receipt = json.loads((folder / "submission.receipt.json").read_text(encoding="utf-8"))
    assert f"log loss of one fold's models {receipt['crossfit_logloss']:.4f}" in text
    assert f"expected log loss {receipt['submitted_logloss']:.4f} ± " in text
    assert log_of(folder).count("so far written") == 1
    succeeded(cli("resume", folder))
    assert log_of(folder).count("so far written") == 1
    run = Run(folder, project)
    members = [m["candidate"] for m in run.json("submission.receipt.json")["members"]]
    assert members == [m["candidate"] for m in run.json("ensemble/ensemble.json")["members"]]
