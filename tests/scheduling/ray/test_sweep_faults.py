"""What goes wrong in the middle of a sweep: killed drivers and workers, Ctrl-C, the end of the
time. Real Ray, real training, real signals."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import Result
from typer.testing import CliRunner

from foldrace.run_folder.store import RunStore
from foldrace.sweep import app
from tests.pretend_tune import pretend_ray
from tests.scheduling.ray.saved_states import RESUME_STATE, saved_epochs, saved_epochs_of

pytestmark = [pytest.mark.slow, pytest.mark.ray]
ROOT = Path(__file__).resolve().parents[3]
DEADLINE = 600.0  # seconds; only a fault takes so long
CANDIDATES, K = 4, 2
OFTEN = ("--set", "training.save_every=0.001")  # seconds: after each epoch


@pytest.fixture(scope="module")
def config(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight fold trials; suggestions do not depend on who finishes first."""
    path = tmp_path_factory.mktemp("config") / "faults.json"
    raw = {
        "data": {"train": str(tiny_images)},
        "folds": {"k": K},
        "search": {
            "backbones": ["timm/test_resnet"],
            "candidates": CANDIDATES,
            "sampler": "random",
        },
        "training": {"epochs": 8, "image_size": 32, "pretrained": False},
        "augment": {"policy": "light"},
        "race": {"rule": "none"},  # which fold trials there are is known beforehand
        "resources": {"cpus_per_trial": 1, "max_concurrent": 2, "max_failures": 1},
    }
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without Ray that nothing happened to, but that there was no room for its images."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch, pretend_ray():
        patch.setenv("FOLDRACE_CACHE", str(folder.parent / "cache"))
        result = cli("run", config, "--out", folder, "--set", "cache.max_gb=1e-6")
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return folder


def test_a_warning_of_every_trial_is_logged_once(undisturbed: Path) -> None:
    for name in ("application.log", "error.log"):
        log = (undisturbed / "logs" / name).read_text(encoding="utf-8").splitlines()
        (line,) = [line for line in log if "pixel cache" in line]
        assert "WARNING" in line and "cache.max_gb" in line
    trials = RunStore.open(undisturbed).trials().values()
    assert all(line.endswith(trial.notes[0]) for trial in trials)


def oof_files(folder: Path) -> dict[str, bytes]:
    files = sorted(p for p in folder.glob("trials/*/*/*.npy"))
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def finished(folder: Path) -> dict[str, tuple[int, int]]:
    """trial.json -> what changes when it is written again."""
    stats = {p: p.stat() for p in sorted(folder.glob("trials/*/fold*/trial.json"))}
    return {str(p.relative_to(folder)): (s.st_ino, s.st_mtime_ns) for p, s in stats.items()}


def until(condition: Callable[[], object], what: str, process: Any = None) -> Any:
    """Poll; fails after the deadline, or when the process that should bring it about is gone."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        assert process is None or process.poll() is None, f"ended before: {what}"
        time.sleep(0.02)
    raise AssertionError(f"not within {DEADLINE} s: {what}")


def start(*arguments: object) -> subprocess.Popen[str]:
    """A command line in a process group of its own, as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "sweep.py"), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def test_killed_then_interrupted_then_resumed(
    config: Path, tmp_path: Path, real_ray: Path, undisturbed: Path
) -> None:
    """Each trial goes on from its last saved epoch, a killed worker's begins anew, and all come to
    the bits of a run without Ray that nothing happened to."""
    run = tmp_path / "run"
    driver = start("run", config, "--out", run, *OFTEN)
    until(lambda: finished(run), "a finished trial", driver)
    family, alive = kill_in_mid_training(run, driver)
    for process in family:
        _kill(process)
    assert family and not alive, f"left behind: {alive}"
    after_kill = finished(run)
    assert not (run / "report").exists()
    # One after its first epoch reports as a trial that begins.
    states = {path.parent: saved_epochs_of(path) for path in run.glob(f"trials/*/*/{RESUME_STATE}")}
    interrupted = [folder for folder, epochs in states.items() if epochs > 1]
    assert interrupted

    driver = start("resume", run)
    goal = len(after_kill) + 1
    until(lambda: len(finished(run)) >= goal, "one more finished trial", driver)
    os.killpg(driver.pid, signal.SIGINT)  # Ctrl-C reaches the whole group
    _, stderr = driver.communicate(timeout=DEADLINE)
    assert driver.returncode == 130, stderr
    assert f"foldrace resume {run}" in stderr and "Traceback" not in stderr
    after_interrupt = finished(run)
    assert len(after_interrupt) < CANDIDATES * K
    assert {name: after_interrupt[name] for name in after_kill} == after_kill
    assert (run / "leaderboard.csv").exists()

    thread = threading.Thread(target=lose_a_worker, args=(run,))
    thread.start()
    result = cli("resume", run)
    thread.join()
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    assert "is tried again" in (run / "logs" / "error.log").read_text(encoding="utf-8")
    after_all = finished(run)
    assert {name: after_all[name] for name in after_interrupt} == after_interrupt
    assert len(after_all) == CANDIDATES * K
    summaries = RunStore.open(run).summaries()
    assert [s.status for s in summaries] == ["complete"] * CANDIDATES
    assert oof_files(run) == oof_files(undisturbed)
    log = (run / "logs" / "application.log").read_text(encoding="utf-8")
    for fold in interrupted:
        assert re.search(rf"{fold.parent.name} {fold.name} goes on from epoch [1-9]", log), log
    assert not list(run.glob(f"**/*{RESUME_STATE}"))


@pytest.mark.full
def test_a_trial_killed_in_its_middle_goes_on(
    config: Path, tmp_path: Path, undisturbed: Path
) -> None:
    """From its last saved epoch, to the same bits."""
    run = tmp_path / "run"
    driver = start("run", config, "--out", run, *OFTEN, "--set", "search.candidates=1")
    family, _ = kill_in_mid_training(run, driver)
    for process in family:
        _kill(process)
    interrupted = {p.parent.name for p in run.glob(f"trials/c0000/*/{RESUME_STATE}")}
    assert interrupted

    result = cli("resume", run)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    log = (run / "logs" / "application.log").read_text(encoding="utf-8")
    for fold in interrupted:
        assert re.search(rf"c0000 {fold} goes on from epoch [1-9]", log), log
    assert not list(run.glob(f"**/*{RESUME_STATE}"))
    whole = {name: data for name, data in oof_files(undisturbed).items() if "/c0000/" in name}
    assert oof_files(run) == whole


def kill_in_mid_training(
    run: Path, driver: subprocess.Popen[str]
) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """Kill the driver while a trial has trained three epochs or more, and not all of them.

    The processes under it, and those that did not end with it. A trial of milliseconds an epoch
    would end before its driver's death reaches it: the workers stand still until Ray is gone.
    """
    while True:
        until(lambda: saved_epochs(run) >= 3, "a state after three epochs", driver)
        family = psutil.Process(driver.pid).children(recursive=True)
        workers = [process for process in family if _is_worker(process)]
        for process in workers:
            process.suspend()
        if saved_epochs(run) >= 3:
            break
        for process in workers:
            process.resume()
    driver.kill()
    driver.communicate()
    waited = [process for process in family if not _is_agent(process)]
    psutil.wait_procs([process for process in waited if process not in workers], timeout=60)
    for process in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()
    return family, psutil.wait_procs(waited, timeout=60)[1]


def _is_worker(process: psutil.Process) -> bool:
    try:
        return process.name().startswith("ray::")
    except psutil.NoSuchProcess:
        return False


def _is_agent(process: psutil.Process) -> bool:
    """Ray's agents of a node hold no resources, and end by themselves after a minute or two."""
    try:
        return "Agent" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()  # psutil makes sure that it is still the same process


def lose_a_worker(run: Path) -> None:
    """Kill one of two that are both in mid-training."""
    before = states(run)

    def lost_or_over() -> bool:
        workers = training_workers()
        for worker in workers:  # they stand still while one looks
            worker.suspend()
        lost = len(workers) == len(states(run) - before) == 2
        if lost:
            _kill(workers[0])
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.resume()
        return lost or len(finished(run)) == CANDIDATES * K

    until(lost_or_over, "two trials under way")


def states(run: Path) -> set[tuple[Path, int]]:
    """Those of unfinished trials, and what changes when one is written again."""
    found = set()
    for path in run.glob(f"trials/*/*/{RESUME_STATE}"):
        with contextlib.suppress(FileNotFoundError):  # its trial has just ended
            if not path.with_name("trial.json").exists():
                found.add((path, path.stat().st_mtime_ns))
    return found


def training_workers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if re.match(r"ray::c\d+/f\d", " ".join(process.cmdline())):
                found.append(process)
    return found


def test_the_time_budget_ends_the_sweep(config: Path, tmp_path: Path, real_ray: Path) -> None:
    """Exit code 1, as no candidate is complete."""
    run = tmp_path / "run"
    long = ("--set", "training.epochs=3000")
    result = cli("run", config, "--out", run, *long, "--set", "resources.time_budget=2s")
    assert result.exit_code == 1, f"{result.output}\n{result.exception!r}"
    assert "no complete candidate" in result.stderr and "Traceback" not in result.stderr
    assert statuses(run) <= {"unfinished"}
    assert not finished(run)


def statuses(run: Path) -> set[str]:
    """Of the leaderboard's rows."""
    lines = (run / "leaderboard.csv").read_text(encoding="utf-8").splitlines()[1:]
    return {line.split(",")[2] for line in lines}
