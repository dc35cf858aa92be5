"""A sweep on a cluster that runs already: whole GPUs, shared GPUs, several nodes.

The GPUs are only promised to Ray, so that the trials train on the CPU with the ids they were given.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import combinations
from pathlib import Path

import pytest

from foldrace.run_folder.records import TrialRecord
from foldrace.run_folder.store import RunStore
from tests.scheduling.ray.running_cluster import DEADLINE, RunningCluster, running_cluster

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.full]
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """One node with 2 cores and 2 GPUs. Its processes start in an empty folder: the code comes
    with the sweep."""
    with running_cluster(FOLDRACE_CACHE=str(tmp_path_factory.mktemp("cache"))) as found:
        found.start_head(cpus=2, gpus=2)
        yield found


def sweep(
    folder: Path,
    images: Path,
    cluster: RunningCluster,
    resources: dict[str, float],
    candidates: int = 3,
    **more: object,
) -> list[TrialRecord]:
    """Two fold trials a candidate; gives their records. `more` are sections of the config."""
    raw = more | {
        "data": {"train": str(images)},
        "folds": {"k": 2},
        "search": {
            "backbones": ["timm/test_resnet"],
            "candidates": candidates,
            "sampler": "random",
        },
        "training": {
            "epochs": 15, "image_size": 32, "pretrained": False,
            "loss": "own" if "plugins" in more else "cross_entropy",
        },
        "augment": {"policy": "none"},
        "race": {"rule": "none"},  # how many trials run is known beforehand
        "resources": resources,
    }  # fmt: skip
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
    trials = sweep(tmp_path / "whole", tiny_images, cluster, {"gpus_per_trial": 1})
    pairs = together(tmp_path / "whole", trials)
    assert pairs, "no two trials ran at the same time"
    for one, other in pairs:
        assert sorted([*one.accelerators, *other.accelerators]) == ["0", "1"]


PLUGIN = """
from pathlib import Path
import os
import ray
import time
from foldrace.trainables.losses import Loss
from torch.nn import functional

if ray.is_initialized():
    context, seen = ray.get_runtime_context(), Path({seen!r})
    (seen / f"{{context.get_node_id()}} {{os.getpid()}}").write_text(__spec__.origin)
    if context.get_actor_id() is not None:  # a worker waits for those of all slots, then trains
        end = time.monotonic() + {deadline}
        while time.monotonic() < end:
            if [note.read_text() for note in seen.iterdir()].count(__spec__.origin) == 3:
                break
            time.sleep(0.05)

PARTS = [
    Loss("own", "", "", lambda logits, targets, settings:
         functional.cross_entropy(logits, targets, reduction="none")),
]
"""


@dataclass(frozen=True)
class TwoNodes:
    """A sweep with a plugin on two nodes."""

    folder: Path
    trials: list[TrialRecord]
    plugin: str
    seen: Path
    """Where each process notes which file of the plugin it has loaded."""


@pytest.fixture(scope="module")
def two_nodes(
    cluster: RunningCluster, tmp_path_factory: pytest.TempPathFactory, tiny_images: Path
) -> TwoNodes:
    """No process of the cluster has the plugin's folder on its path."""
    cluster.add_node(cpus=1, gpus=1)
    root = tmp_path_factory.mktemp("two nodes")
    seen, own = root / "seen", root / "own"
    seen.mkdir()
    own.mkdir()
    plugin = own / "own_loss.py"
    text = PLUGIN.format(seen=str(seen), deadline=DEADLINE / 10)
    plugin.write_text(text, encoding="utf-8")
    folder, resources = root / "sweep", {"gpus_per_trial": 0.5}
    trials = sweep(folder, tiny_images, cluster, resources, candidates=2, plugins=[str(plugin)])
    return TwoNodes(folder, trials, str(plugin), seen)


def test_doctor_looks_at_each_node(cluster: RunningCluster, two_nodes: TwoNodes) -> None:
    """Both are this machine, but for the GPUs that were promised to Ray."""
    done = subprocess.run(
        [sys.executable, ROOT / "sweep.py", "doctor", "--address", cluster.address],
        env=cluster.environment | {"COLUMNS": "200"},
        capture_output=True, text=True, timeout=DEADLINE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Ray +ok +answers in \d+ s; 3 cores, 3 GPUs for trials", done.stdout)
    for what, value in (("Python", platform.python_version()), ("torch", version("torch"))):
        rows = re.findall(rf"(node|this machine) ?\S* +{what} +ok +(\S+)", done.stdout)
        assert rows == [("this machine", value), ("node", value), ("node", value)]


def test_halves_of_gpus_on_two_nodes(two_nodes: TwoNodes) -> None:
    """Three at once are more than the first node's two cores: the third is on the second node.
    The two on the first node have one GPU together, though there is another. Those that came first
    have waited for the third."""
    moments = spans(two_nodes.folder, two_nodes.trials)
    at_once = [sum(a <= start < b for a, b, _ in moments) for start, _, _ in moments]
    assert max(at_once) == 3
    assert {trial.accelerators for trial in two_nodes.trials} == {("0",)}


def test_a_plugin_reaches_the_nodes_from_the_run_folder(two_nodes: TwoNodes) -> None:
    """Each process notes where it found the plugin."""
    own, notes = f"{two_nodes.folder}/run/plugins/own_loss.py", list(two_nodes.seen.iterdir())
    workers = [note for note in notes if note.read_text() == own]
    assert len({worker.name.split()[0] for worker in workers}) >= 2
    drivers = [note for note in notes if note not in workers]
    assert all(driver.read_text() == two_nodes.plugin for driver in drivers)


def test_the_devices_of_a_trial_on_two_nodes(
    cluster: RunningCluster, tmp_path: Path, tiny_images: Path
) -> None:
    """Three devices are more than the first node's two cores."""
    cluster.add_node(cpus=1, gpus=0)
    folder = tmp_path / "spread"
    resources = {"gpus_per_trial": 0, "devices_per_trial": 3}
    trials = sweep(folder, tiny_images, cluster, resources, candidates=1)
    assert [trial.micro_batch for trial in trials] == [11, 11]  # of 32, shared by three
