"""Trials on two devices under Ray Train: a sweep from the command line, a killed device, a device
without memory, and stops. Real Ray, real processes; the devices are cores."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from click.testing import Result
from ray import train, tune
from ray.util import placement_group_table
from typer.testing import CliRunner

from foldrace.run_folder.store import RunStore
from foldrace.scheduling.ray import device_group
from foldrace.sweep import app
from foldrace.trainables.spec import TrialSpec, TrialStopped
from tests.scheduling.ray.saved_states import saved_epochs
from tests.trainables.written_trials import written_trial

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.usefixtures("real_ray")]
DEADLINE = 600.0  # seconds; only a fault takes so long


@pytest.fixture
def config(tiny_images: Path, tmp_path: Path) -> Path:
    path = tmp_path / "two.json"
    raw = {
        "data": {"train": str(tiny_images)},
        "folds": {"k": 2},
        "search": {
            "backbones": ["timm/test_resnet"],
            "candidates": 1,
            "space": {"batch_size": 15},
        },
        "training": {"epochs": 2, "image_size": 40, "pretrained": False},
        "augment": {"policy": "light"},
        "resources": {"devices_per_trial": 2, "max_failures": 1},
    }
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def until(condition: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"not within {DEADLINE} s: {what}")


def device_processes() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def nothing_left() -> bool:
    """No process of a group, and every core given back."""
    groups = placement_group_table().values()
    return not device_processes() and all(group["state"] == "REMOVED" for group in groups)


def spec_for(run: Any, **changes: Any) -> TrialSpec:
    params = {
        "precision": "fp32", "pretrained": False, "epochs": 1, "image_size": 32, "batch_size": 16,
        "policy": "none",
    }  # fmt: skip
    return written_trial(run, "c0000", "timm/test_resnet", params | changes, use_gpu=False)


def test_a_sweep_whose_device_is_killed_once(config: Path, tmp_path: Path) -> None:
    """The fold trial goes on from a saved epoch, and every row has its probabilities once."""
    run, killed = tmp_path / "run", list[int]()

    def kill_one() -> None:
        until(lambda: saved_epochs(run) >= 2, "the state after two epochs")
        one = device_processes()[0]
        one.kill()
        killed.append(one.pid)

    thread = threading.Thread(target=kill_one)
    thread.start()
    settings = (
        "training.epochs=20", "training.save_every=0.001", "folds.k=1", "folds.valid_fraction=0.5",
        "resources.max_failures=2",  # the last attempt would begin anew
    )  # fmt: skip
    result = cli("run", config, "--out", run, *(part for s in settings for part in ("--set", s)))
    thread.join()
    assert killed and result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    assert "is tried again" in (run / "logs" / "error.log").read_text()
    assert "c0000 fold0 goes on from epoch" in (run / "logs" / "application.log").read_text()
    store = RunStore.open(run)
    assert [s.status for s in store.summaries()] == ["complete"]
    (record,) = store.trials().values()
    assert record.micro_batch == 8  # of 15, on two devices
    log = store.train_log("c0000", 0)
    assert log is not None and len(log.splitlines()) == 1 + 20
    rows = np.load(run / "trials/c0000/fold0/rows.npy")
    assert sorted(rows) == np.flatnonzero(store.folds().fold == 0).tolist()
    assert (run / "ensemble" / "ensemble.json").exists()
    until(nothing_left, "the groups are gone")


@pytest.mark.full
def test_ctrl_c_ends_a_group(config: Path, tmp_path: Path, real_ray: Path) -> None:
    run, known = tmp_path / "run", set(real_ray.glob("pixels/*/index.npy"))

    def interrupt() -> None:
        try:
            until(lambda: set(real_ray.glob("pixels/*/index.npy")) - known, "the images")
            time.sleep(3)  # some of its epochs
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    long = ("--set", "training.epochs=5000")
    result = cli("run", config, "--out", run, *long, "--set", "training.image_size=48")
    thread.join()
    assert result.exit_code == 130, f"{result.output}\n{result.exception!r}"
    assert not list(run.glob("trials/*/*/trial.json"))
    until(nothing_left, "the group is gone")


@pytest.mark.full
def test_a_stopped_group_gives_its_devices_back(make_tiny_run: Any, tmp_path: Path) -> None:
    """As when a sweep stops one trial and goes on: Tune waits 2 seconds for the process to leave
    it, and uses it again."""
    spec = spec_for(make_tiny_run(), epochs=5000)
    began, seconds = tmp_path / "began", tmp_path / "seconds"

    def trial(config: dict[str, Any]) -> None:
        asked: list[float] = []

        def stop() -> bool:
            if began.exists():
                asked.append(time.monotonic())
            return bool(asked)

        with pytest.raises(TrialStopped):
            device_group.run_on_devices(spec, 2, stop)
        seconds.write_text(str(time.monotonic() - asked[0]))

    def training() -> None:
        try:
            until(device_processes, "the devices")
            time.sleep(10)  # they train, or are about to: either must end
        finally:
            began.touch()

    threading.Thread(target=training).start()
    resources = tune.PlacementGroupFactory([device_group.NO_DEVICE])
    results = tune.Tuner(
        tune.with_resources(trial, resources),
        run_config=tune.RunConfig(storage_path=str(tmp_path / "tune"), verbose=0),
    ).fit()
    assert not results.errors
    assert float(seconds.read_text()) < 2
    until(nothing_left, "the group is gone")


@pytest.mark.full
def test_a_device_without_memory_starts_the_group_again(
    make_tiny_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second device has room for 2 images at a time, of a share of 8: 8, 4, then 2."""
    run = make_tiny_run()
    _full_above(2, monkeypatch)
    device_group._train(spec_for(run), 2, train.UserCallback())
    record = run.store.trial("c0000", 0)
    assert record is not None and (record.status, record.micro_batch) == ("finished", 2)
    assert [note.split()[-1] for note in record.notes] == ["4", "2"]

    _full_above(0, monkeypatch)
    small = spec_for(run, micro_batch=1)
    with pytest.raises(train.WorkerGroupError, match="OutOfMemoryError"):
        device_group._train(small, 2, train.UserCallback())
    until(nothing_left, "the groups are gone")


def _full_above(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices that run out of memory; only the second one. Made here, so that it travels."""
    real = device_group._one_device

    def device(config: dict[str, Any]) -> None:
        import torch

        from foldrace.trainables import step

        gradients = step._gradients

        def with_little_memory(state: Any, *arguments: Any) -> Any:
            if state.accelerator.process_index == 1 and state.micro_batch > images:
                raise torch.OutOfMemoryError("no memory left")
            return gradients(state, *arguments)

        step._gradients = with_little_memory
        real(config)

    monkeypatch.setattr(device_group, "_one_device", device)
