"""Lost nodes and a dead Ray: real raylets, killed as a machine kills them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from foldrace.run_folder.store import RunStore
from tests.scheduling.ray.running_cluster import running_cluster
from tests.scheduling.ray.test_sweep_faults import saved_epochs

pytestmark = [pytest.mark.slow, pytest.mark.ray]
ROOT = Path(__file__).resolve().parents[3]
DEADLINE = 300.0  # seconds


@pytest.fixture
def config(tiny_images: Path, tmp_path: Path) -> Path:
    """Two fold trials of some seconds; no failure is forgiven."""
    raw = {
        "data": {"train": str(tiny_images)},
        "folds": {"k": 2},
        "search": {"backbones": ["timm/test_resnet"], "candidates": 1, "sampler": "random"},
        "training": {
            "epochs": 40, "image_size": 24, "pretrained": False, "save_every": 0.001,
        },
        "augment": {"policy": "none"},
        "race": {"rule": "none"},
        "resources": {"max_failures": 0, "node_timeout": 200},
    }  # fmt: skip
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


class Driver:
    """The command line in a session of its own."""

    def __init__(self, folder: Path, environment: dict[str, str], *words: object) -> None:
        self._out = folder / "out.txt"
        with self._out.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "sweep.py"), *map(str, words)],
                stdout=out, stderr=out, env=environment, start_new_session=True,
            )  # fmt: skip

    def until(self, moment: Callable[[], object], what: str) -> None:
        ends = time.monotonic() + DEADLINE
        while not moment():
            assert self.process.poll() is None, f"ended before: {what}\n{self.text}"
            assert time.monotonic() < ends, f"{what}: not within {DEADLINE} s\n{self.text}"
            time.sleep(0.05)

    def end(self) -> int:
        return self.process.wait(DEADLINE)

    @property
    def text(self) -> str:
        return self._out.read_text(encoding="utf-8", errors="replace")

    def stop(self) -> None:
        for process in [*psutil.Process(self.process.pid).children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    """Starts command lines, and ends what is left of them."""
    drivers: list[Driver] = []

    def start(environment: dict[str, str], *words: object) -> Driver:
        drivers.append(Driver(tmp_path, environment, *words))
        return drivers[-1]

    yield start
    for driver in drivers:
        if driver.process.poll() is None:
            driver.stop()


def trains(run: Path) -> bool:
    """True once a fold trial has saved its state after some epochs."""
    return saved_epochs(run) >= 3


def test_a_sweep_outlives_all_of_its_nodes(
    config: Path, tmp_path: Path, started: Callable[..., Driver]
) -> None:
    """The only node is killed; the sweep says so, waits for another one, and goes on there from the
    saved states, though no failure is forgiven."""
    run = tmp_path / "run"
    with running_cluster(FOLDRACE_CACHE=str(tmp_path / "cache")) as cluster:
        cluster.start_head(cpus=0, gpus=0)
        node = cluster.add_node(cpus=2, gpus=0)
        place = ("--address", cluster.address)
        driver = started(cluster.environment, "run", config, "--out", run, *place)
        driver.until(lambda: trains(run), "a state")
        for process in [node, *node.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        driver.until(lambda: "no node of the cluster has room" in driver.text, "a word of it")
        cluster.add_node(cpus=2, gpus=0)
        assert driver.end() == 0, driver.text
    assert [s.status for s in RunStore.open(run).summaries()] == ["complete"]
    assert "the cluster has room again" in driver.text
    log = (run / "logs" / "application.log").read_text(encoding="utf-8")
    assert "goes on later" in log and "goes on from epoch" in log and "ERROR" not in log


def test_a_dead_ray_and_a_signal_to_everybody(
    config: Path, tmp_path: Path, started: Callable[..., Driver]
) -> None:
    """First SIGTERM to the whole process group, as `scancel` sends it: Ray's processes are gone,
    and the driver ends all the same. Then the raylet dies in mid-training."""
    run = tmp_path / "run"
    driver = started(dict(os.environ), "run", config, "--out", run)
    driver.until(lambda: trains(run), "a state")
    began = time.monotonic()
    os.killpg(driver.process.pid, signal.SIGTERM)
    assert driver.end() == 130, driver.text
    assert time.monotonic() - began < 30
    assert f"go on with: foldrace resume {run}" in driver.text and "Traceback" not in driver.text
    assert (run / "leaderboard.csv").exists()

    driver = started(dict(os.environ), "resume", run)
    driver.until(lambda: "fold trials at a time" in driver.text, "Ray")
    before = saved(run)
    driver.until(lambda: saved(run) != before, "another epoch")
    for process in psutil.Process(driver.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name() == "raylet":
                process.kill()
    assert driver.end() == 1, driver.text
    last = driver.text.strip().splitlines()[-1]
    assert "raylet" in last and f"go on with: foldrace resume {run}" in last
    states = {s.status for s in RunStore.open(run).summaries()}
    assert states <= {"unfinished", "complete"}, "the candidate was blamed"


def saved(run: Path) -> set[tuple[str, int]]:
    """The states that lie there, and when they were written."""
    found = set()
    for path in run.glob("trials/*/fold*/*"):
        if path.name in ("resume.pt", "trial.json"):
            with contextlib.suppress(FileNotFoundError):
                found.add((str(path), path.stat().st_mtime_ns))
    return found
