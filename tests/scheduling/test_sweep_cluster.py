"""A sweep on a cluster that runs already: whole GPUs, shared GPUs, several nodes.

The GPUs are only promised to Ray, so that the trials train on the CPU with the ids they were given.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import psutil
import pytest

from experiment.records import TrialRecord
from experiment.store import RunStore

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 240.0  # seconds


@dataclass
class RunningCluster:
    """`ray start` in processes of our own, all ended by `stop`."""

    folder: Path
    environment: dict[str, str]
    address: str = ""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start_head(self, cpus: int, gpus: int) -> None:
        port, client_port = free_port(), free_port()
        self.address = f"127.0.0.1:{port}"
        self._start(
            "--head", f"--port={port}", f"--ray-client-server-port={client_port}",
            "--node-ip-address=127.0.0.1", "--include-dashboard=false",
            f"--temp-dir={self.folder}", f"--num-cpus={cpus}", f"--num-gpus={gpus}",
        )  # fmt: skip
        until(lambda: answers(port), "the head answers")

    def add_node(self, cpus: int, gpus: int) -> None:
        self._start(
            f"--address={self.address}", "--node-ip-address=127.0.0.1", f"--num-cpus={cpus}",
            f"--num-gpus={gpus}",
        )  # fmt: skip
        joined = self.folder / f"start{len(self.processes) - 1}.log"
        until(lambda: b"Ray runtime started" in joined.read_bytes(), "the node has joined")

    def _start(self, *options: str) -> None:
        script = Path(sys.executable).with_name("ray")
        with (self.folder / f"start{len(self.processes)}.log").open("wb") as log:
            self.processes.append(
                subprocess.Popen(
                    [script, "start", "--block", "--disable-usage-stats", *options],
                    stdout=log, stderr=log, start_new_session=True, cwd=self.folder,
                    env=self.environment,
                )
            )  # fmt: skip

    def stop(self) -> None:
        """At once: told to end, Ray would first drain for half a minute."""
        for process in self.processes:
            if process.poll() is None:
                family = psutil.Process(process.pid).children(recursive=True)
                process.kill()
                for child in family:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
                process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"not within {DEADLINE} s: {what}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """One node with 2 cores and 2 GPUs. Its processes start in an empty folder: the code comes
    with the sweep."""
    folder = Path(tempfile.mkdtemp(prefix="fr-"))  # short: it holds the names of sockets
    environment = dict(
        os.environ,
        FOLDRACE_CACHE=str(tmp_path_factory.mktemp("cache")),
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=secrets.token_hex(32),
    )
    found = RunningCluster(folder, environment)
    try:
        found.start_head(cpus=2, gpus=2)
        yield found
    finally:
        found.stop()
        shutil.rmtree(folder, ignore_errors=True)


def sweep(
    folder: Path,
    images: Path,
    cluster: RunningCluster,
    gpus: float,
    candidates: int = 3,
    **more: int,
) -> list[TrialRecord]:
    """Two fold trials a candidate; gives their records. `more`: of the resources."""
    raw = {
        "data": {"train": str(images)},
        "folds": {"k": 2},
        "search": {
            "backbones": ["timm/test_resnet"],
            "candidates": candidates,
            "sampler": "random",
        },
        "training": {"epochs": 15, "patience": 15, "image_size": 32, "pretrained": False},
        "augment": {"policy": "none"},
        "resources": {"gpus_per_trial": gpus, **more},
    }
    folder.mkdir()
    (folder / "sweep.json").write_text(json.dumps(raw), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, ROOT / "sweep.py", "run", folder / "sweep.json", "--out", folder / "run",
         "--address", cluster.address],
        env=cluster.environment, capture_output=True, text=True, timeout=2 * DEADLINE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    store = RunStore.open(folder / "run")
    assert [s.status for s in store.summaries()] == ["complete"] * candidates
    return list(store.trials().values())


def spans(folder: Path, trials: list[TrialRecord]) -> list[tuple[float, float, TrialRecord]]:
    """From when to when each trial ran."""
    found = []
    for trial in trials:
        path = folder / "run" / RunStore.trial_folder(trial.candidate, trial.fold) / "trial.json"
        end = path.stat().st_mtime
        found.append((end - trial.seconds, end - 0.2, trial))
    return found


def together(folder: Path, trials: list[TrialRecord]) -> list[tuple[TrialRecord, TrialRecord]]:
    """Pairs of trials that ran at the same time."""
    pairs = combinations(spans(folder, trials), 2)
    return [(a[2], b[2]) for a, b in pairs if a[0] < b[1] and b[0] < a[1]]


def test_whole_gpus_are_not_shared(
    cluster: RunningCluster, tmp_path: Path, tiny_images: Path
) -> None:
    trials = sweep(tmp_path / "whole", tiny_images, cluster, gpus=1)
    pairs = together(tmp_path / "whole", trials)
    assert pairs, "no two trials ran at the same time"
    for one, other in pairs:
        assert sorted([*one.accelerators, *other.accelerators]) == ["0", "1"]


def test_halves_of_gpus_on_two_nodes(
    cluster: RunningCluster, tmp_path: Path, tiny_images: Path
) -> None:
    """Three at once are more than the first node's two cores: the third is on the second node.
    The two on the first node have one GPU together, though there is another."""
    cluster.add_node(cpus=1, gpus=1)
    folder = tmp_path / "halves"
    trials = sweep(folder, tiny_images, cluster, gpus=0.5)
    moments = [start for start, _, _ in spans(folder, trials)]
    at_once = [sum(a <= m < b for a, b, _ in spans(folder, trials)) for m in moments]
    assert max(at_once) == 3
    assert {trial.accelerators for trial in trials} == {("0",)}


def test_the_devices_of_a_trial_on_two_nodes(
    cluster: RunningCluster, tmp_path: Path, tiny_images: Path
) -> None:
    """Three devices are more than the first node's two cores."""
    cluster.add_node(cpus=1, gpus=0)
    folder = tmp_path / "spread"
    trials = sweep(folder, tiny_images, cluster, gpus=0, candidates=1, devices_per_trial=3)
    assert [trial.micro_batch for trial in trials] == [11, 11]  # of 32, shared by three
