"""`gpus_per_trial: auto` on a real cluster: two nodes with GPUs of two kinds, only promised to Ray.

The measurement is given from outside; trials train on the CPU, and note where they do.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import pytest

from foldrace.config.schema import SweepConfig
from foldrace.core.plugin_files import PluginFile
from foldrace.dataset.folds import folds_csv, make_folds
from foldrace.dataset.manifest import read_manifest
from foldrace.run_folder.gpu_memory import GpuMemory
from foldrace.run_folder.store import RunStore
from tests.scheduling.ray.running_cluster import DEADLINE, running_cluster

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.full]

VIT, RESNET, ODD = "timm/test_vit", "timm/test_resnet", "timm/test_efficientnet"
NEEDS = {VIT: 3.0, RESNET: 20.0, ODD: 16.0}
"""GB; the last one cannot be measured."""
MEMORY = {"SMALL": 16.0, "LARGE": 80.0}
K = 2
# Each trial notes at each batch where it is. The first four wait for each other.
PLUGIN = """
import os
import time
from pathlib import Path
from foldrace.trainables.losses import Loss
from torch.nn import functional

seen, met = Path({seen!r}), []

def note(text):
    with (seen / f"{{os.getpid()}}").open("a") as file:
        file.write(text + chr(10))

def own(logits, targets, settings):
    if logits.requires_grad:
        import ray
        from ray import tune
        gpus = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        where = [time.time(), os.environ["KIND"], *gpus, tune.get_context().get_trial_name()]
        note(" ".join(map(str, where)))
        end = time.monotonic() + {deadline}
        while not met and time.monotonic() < end and len(list(seen.iterdir())) < 4:
            time.sleep(0.05)
        met.append(True)
        time.sleep(0.02)
        note(" ".join(map(str, [time.time(), *where[1:]])))
    return functional.cross_entropy(logits, targets, reduction="none")

PARTS = [Loss("own", "", "", own)]
"""
DRIVER = """
import json, os, sys, time
from pathlib import Path
import ray
from foldrace.core.errors import EnvironmentProblem
from foldrace.run_folder.gpu_memory import GpuReading, TrialMemory
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.ray.cluster import connect
from foldrace.scheduling.ray.gpu_measuring import measure_trial, shared_room
from foldrace.scheduling.ray.tuner import run_sweep
from foldrace.search_spaces.space import build_space

address, run, other, third, images, asked, needs, memory = sys.argv[1:]
needs, memory = json.loads(needs), json.loads(memory)

def measure(run, backbone, params):
    kind, gpus = os.environ["KIND"], ray.get_runtime_context().get_accelerator_ids()["GPU"]
    (Path(asked) / f"{os.getpid()} {kind} {len(gpus)} {Path(run).name}").write_text(str(backbone))
    if backbone == "timm/test_efficientnet":
        os._exit(1)
    total = memory[kind] * 1e9
    taken = TrialMemory(
        params=params, bytes=min(needs[backbone] * 1e9, total), whole=needs[backbone] < memory[kind]
    )
    return GpuReading(memory=total, trial=taken)

def nothing_fits(run, backbone, params):
    reading = measure(run, "timm/test_vit", params)
    return reading.model_copy(update={"trial": TrialMemory(params=params, bytes=None)})

def hangs(run, backbone, params):
    time.sleep(600)

def ask(run, measure, **more):
    store, lines = RunStore.open(run), []
    config = store.config()
    space, _ = build_space(config, "")
    try:
        cluster.room = shared_room(store, space, cluster, lines.append, measure, **more)
    except EnvironmentProblem as error:
        lines.append(str(error))
    print(json.dumps(lines), flush=True)
    return store, config, space

with connect(address, RunStore.open(run).config().resources) as cluster:
    ask(other, nothing_fits)
    ask(third, hangs, limit=1)
    ask(third, measure_trial)
    ask(run, measure)
    run_sweep(*ask(run, measure), images, cluster, lambda progress: None)
"""


def write_run(root: Path, images: Path, *backbones: str, plugin: str = "") -> RunStore:
    """A candidate of each backbone; how many trials run is known beforehand."""
    raw = {
        "name": root.name,
        "data": {"train": str(images)},
        "folds": {"k": K},
        "search": {
            "backbones": backbones, "candidates": len(backbones), "min_share": 1.0,
            "sampler": "random",
        },
        "training": {
            "epochs": 8, "image_size": 32, "pretrained": False,
            "loss": "own" if plugin else "cross_entropy",
        },
        "augment": {"policy": "none"},
        "race": {"rule": "none"},
        "resources": {"gpus_per_trial": "auto"},
    }  # fmt: skip
    config, store = SweepConfig.model_validate_json(json.dumps(raw)), RunStore(root)
    manifest = read_manifest(config.data)
    folds = folds_csv(manifest, make_folds(manifest, config.folds))
    plugins = [PluginFile("own_loss", plugin.encode(), "/gone/own_loss.py")] if plugin else []
    store.create(config, folds, manifest.classes, plugins)
    return store


@dataclass(frozen=True)
class Span:
    """When and where a fold trial trained."""

    start: float
    end: float
    kind: str
    gpus: tuple[str, ...]
    backbone: str

    def meets(self, other: Span) -> bool:
        """True where both were on a GPU of one node at the same time."""
        at_once = self.start < other.end and other.start < self.end
        return at_once and self.kind == other.kind and bool({*self.gpus} & {*other.gpus})


@dataclass(frozen=True)
class Shared:
    """What the driver said, what was measured, and the trials of its sweep."""

    store: RunStore
    lines: list[list[str]]
    asked: list[tuple[str, str, str, str]]
    """Kind, number of GPUs, run folder and backbone of each measurement."""
    spans: dict[str, Span]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path) -> Shared:
    root = tmp_path_factory.mktemp("shared")
    seen, asked = root / "seen", root / "asked"
    seen.mkdir()
    asked.mkdir()
    plugin = PLUGIN.format(seen=str(seen), deadline=DEADLINE / 10)
    store = write_run(root / "run", tiny_images, VIT, RESNET, ODD, plugin=plugin)
    write_run(root / "other", tiny_images, VIT, RESNET)
    write_run(root / "third", tiny_images, VIT)
    with running_cluster(FOLDRACE_CACHE=str(root / "cache")) as cluster:
        cluster.environment["KIND"] = "SMALL"
        cluster.start_head(2, 1, '--resources={"accelerator_type:SMALL": 1}')
        cluster.add_node(2, 1, '--resources={"accelerator_type:LARGE": 1}', KIND="LARGE")
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, cluster.address, store.root, root / "other",
             root / "third", tiny_images, asked, json.dumps(NEEDS), json.dumps(MEMORY)],
            env=cluster.environment, capture_output=True, text=True, timeout=DEADLINE,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = [(*note.name.split()[1:], note.read_text()) for note in asked.iterdir()]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line[:1] == "["]  # not Ray's
    return Shared(store, lines, sorted(found), spans(seen))  # type: ignore[arg-type]


def spans(seen: Path) -> dict[str, Span]:
    """Trial -> where it was, by its own notes."""
    notes = [line.split() for file in seen.iterdir() for line in file.read_text().splitlines()]
    by_trial: defaultdict[str, list[list[str]]] = defaultdict(list)
    for note in notes:
        by_trial[note[-2]].append(note)
    found = {}
    for name, own in by_trial.items():
        times, (_, kind, *gpus, _, backbone) = [float(note[0]) for note in own], own[0]
        assert {tuple(note[1:]) for note in own} == {tuple(own[0][1:])}, "it stayed where it was"
        found[name] = Span(min(times), max(times), kind, tuple(gpus), f"timm/{backbone}")
    return found


def test_each_backbone_is_measured_once_on_a_whole_gpu_of_each_kind(shared: Shared) -> None:
    of_run = sorted((kind, gpus, name) for kind, gpus, run, name in shared.asked if run == "run")
    names = [*NEEDS, ODD]  # what could not be measured is tried again
    assert of_run == sorted((kind, "1", name) for kind in MEMORY for name in names)
    known = {kind.name: kind for kind in shared.store.gpu_memory().kinds}
    assert {name: kind.memory for name, kind in known.items()} == {"SMALL": 16e9, "LARGE": 80e9}
    assert all(kind.backbones.keys() == {VIT, RESNET} for kind in known.values())


def test_what_is_said_before_the_sweep(shared: Shared) -> None:
    """Two cores a node allow for two trials at a time."""
    first, again = shared.lines[3:]
    kinds = first[0].split()[2:4]
    kinds = " ".join(kinds).rstrip(":")
    assert sorted(kinds.split(", ")) == ["LARGE", "SMALL"]
    assert first[0] == f"Measuring on {kinds}: {VIT}, {RESNET}, {ODD}"
    crashed = sorted(first[1:3])
    assert [line.split(":")[:2] for line in crashed] == [
        ["LARGE", f" {ODD} could not be measured"], ["SMALL", f" {ODD} could not be measured"],
    ]  # fmt: skip
    table = [
        f"{VIT}: 3.0 of the 16.0 GB of SMALL with 32 images of 32 px, 2 trials share one; 3.0 of "
        "the 80.0 GB of LARGE with 32 images of 32 px, 2 trials share one",
        f"{RESNET}: 20.0 of the 80.0 GB of LARGE with 32 images of 32 px, 2 trials share one",
        f"{ODD}: not measured on SMALL, a whole GPU each; not measured on LARGE, a whole GPU each",
    ]
    assert first[3:] == table
    assert again[-3:] == table and again[0] == f"Measuring on {kinds}: {ODD}"


def test_trials_share_gpus_as_far_as_their_memory_allows(shared: Shared) -> None:
    summaries = shared.store.summaries()
    assert [s.status for s in summaries] == ["complete"] * 3
    assert len(shared.spans) == 3 * K
    for span in shared.spans.values():
        others = [o for o in shared.spans.values() if o is not span and o.meets(span)]
        started = [o for o in others if o.start <= span.start < o.end]
        assert NEEDS[span.backbone] + sum(NEEDS[o.backbone] for o in started) <= MEMORY[span.kind]
        assert len(started) <= 1
        if span.backbone == ODD:
            assert not others
        if span.backbone == RESNET:
            assert span.kind == "LARGE"
    pairs = [
        (one.backbone, other.backbone, one.kind)
        for one, other in combinations(shared.spans.values(), 2)
        if one.meets(other)
    ]
    assert (VIT, VIT, "SMALL") in pairs and (RESNET, RESNET, "LARGE") in pairs


def test_a_trial_is_charged_with_its_share(shared: Shared) -> None:
    devices = {trial.backbone: trial.devices for trial in shared.store.trials().values()}
    assert devices == {VIT: 0.5, RESNET: 0.5, ODD: 1.0}


def test_backbones_that_fit_nowhere_end_the_command_together(shared: Shared) -> None:
    error = shared.lines[0][-1].splitlines()
    assert [line.split()[1] for line in error] == [VIT, RESNET]
    assert all("fits on no GPU of the cluster: SMALL (16.0 GB), LARGE" in line for line in error)


def test_what_takes_too_long_or_has_no_gpu_is_not_measured(shared: Shared) -> None:
    """GPUs that are only promised to Ray are none to torch."""
    late, absent = shared.lines[1:3]
    for lines, reason in ((late, "not within 1 s"), (absent, "torch sees no GPU there")):
        assert len([line for line in lines if line.endswith(reason)]) == 2, lines
        assert lines[-1].startswith(f"{VIT}: not measured on ") and "a whole GPU each" in lines[-1]
    assert RunStore(Path(shared.store.root).parent / "third").gpu_memory() == GpuMemory()
