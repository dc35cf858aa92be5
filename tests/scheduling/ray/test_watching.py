"""What is to be seen of a sweep while it runs: trials by name, metrics on Ray's endpoint and in a
real Prometheus, what the dashboard file asks it, and what a webhook is told in the end."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from foldrace.scheduling.ray.metrics import GAUGES
from foldrace.scheduling.ray.trial_names import trial_name
from tests.scheduling.ray.running_cluster import free_port
from tests.scheduling.webhooks import SECRET, Hook

ROOT = Path(__file__).resolve().parents[3]
DEADLINE = 300.0  # seconds; only a fault takes so long
RUN = "watched"
NAME = re.compile(r"c\d{4}/f[01] test_resnet")
TOKEN = secrets.token_hex(32)
WEB = urllib.request.build_opener(urllib.request.ProxyHandler({}))
WEB.addheaders = [("Authorization", f"Bearer {TOKEN}")]


@pytest.mark.parametrize(
    ("backbone", "name"),
    [
        ("torchvision/convnext_tiny", "c0007/f2 convnext_tiny"),
        ("timm/tf_efficientnetv2_s.in21k_ft_in1k", "c0007/f2 tf_efficientnetv2_s"),
        ("stack(timm/vit_b.augreg,torchvision/resnet50)", "c0007/f2 stack(vit_b,resnet50)"),
    ],
)
def test_a_trials_name(backbone: str, name: str) -> None:
    assert trial_name("c0007", 2, backbone) == name


@dataclass
class Watched:
    """A sweep that goes on until it is interrupted."""

    driver: subprocess.Popen[str]
    folder: Path
    """The temporary folder of its Ray."""
    dashboard: str
    hook: Hook

    @property
    def discovery(self) -> Path:
        """The file that lists the nodes for Prometheus."""
        own = self.folder / f"foldrace-{os.geteuid()}" / "ray"
        return own / "prom_metrics_service_discovery.json"

    def ask(self, path: str) -> Any:
        """What the dashboard's own API answers."""
        return json.load(WEB.open(self.dashboard + path, timeout=30))

    def metrics(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Name and own labels -> value, of our metrics on every node's endpoint."""
        found = {}
        for target in json.loads(self.discovery.read_text())[0]["targets"]:
            text = WEB.open(f"http://{target}/metrics", timeout=10).read().decode()
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    if sample.name.startswith("ray_foldrace_"):
                        own = {
                            k: sample.labels[k]
                            for k in ("run", "state", "trial")
                            if k in sample.labels
                        }
                        found[sample.name.removeprefix("ray_"), tuple(own.items())] = sample.value
        return found


def until(condition: Callable[[], Any], what: str, driver: subprocess.Popen[str]) -> Any:
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        assert driver.poll() is None, f"the sweep ended before: {what}"
        time.sleep(0.2)
    raise AssertionError(f"not within {DEADLINE} s: {what}")


@pytest.fixture(scope="module")
def watched(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    root, folder = tmp_path_factory.mktemp("watched"), Path(tempfile.mkdtemp(prefix="fr-"))
    hook = Hook()
    raw = {
        "name": RUN,
        "data": {"train": str(tiny_images)},
        "folds": {"k": 2},
        "search": {"backbones": ["timm/test_resnet"], "candidates": 1000, "sampler": "random"},
        "training": {"epochs": 12, "image_size": 32, "pretrained": False},
        "augment": {"policy": "light"},
        "resources": {"cpus_per_trial": 1, "max_concurrent": 2},
        "notify": {"webhook": "env:HOOK"},
    }
    (root / "sweep.json").write_text(json.dumps(raw), encoding="utf-8")
    environment = os.environ | {
        "HOOK": hook.url,
        "FOLDRACE_CACHE": str(root / "cache"),
        "RAY_TMPDIR": str(folder),
        "RAY_metrics_report_interval_ms": "1000",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
    }
    command = [sys.executable, ROOT / "sweep.py", "run", root / "sweep.json", "--out", root / "run"]
    with (root / "output").open("w") as output:
        driver = subprocess.Popen(
            command, stdout=output, stderr=output, text=True, env=environment,
            start_new_session=True,
        )  # fmt: skip
    try:
        said = until(
            lambda: re.search(r"Ray dashboard: (http\S+)", (root / "output").read_text()),
            "the address of the dashboard", driver,
        )  # fmt: skip
        yield Watched(driver, folder, said[1], hook)
    finally:
        if driver.poll() is None:
            family = psutil.Process(driver.pid).children(recursive=True)
            for process in (driver, *family):
                process.kill()
        driver.wait()
        hook.close()
        shutil.rmtree(folder, ignore_errors=True)


pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.full]


def test_the_list_of_tasks_has_the_trials_names(watched: Watched) -> None:
    def trials_of_processes() -> dict[str, set[str]]:
        found = defaultdict(set)
        for task in watched.ask("/api/v0/tasks?limit=5000")["data"]["result"]["result"]:
            if NAME.fullmatch(task["name"]):
                found[task["actor_id"]].add(task["name"])
        return found

    until(
        lambda: any(len(names) > 1 for names in trials_of_processes().values()),
        "names of two trials of one process",
        watched.driver,
    )
    jobs = json.dumps(watched.ask("/api/jobs/"))
    assert RUN in jobs and SECRET not in jobs


def test_the_process_list_and_the_dashboards_workers_have_the_names(watched: Watched) -> None:
    def titles() -> set[str]:
        found = set()
        for process in psutil.Process(watched.driver.pid).children(recursive=True):
            try:
                found.add(" ".join(process.cmdline()).strip())
            except psutil.NoSuchProcess:
                continue
        return {title for title in found if re.fullmatch(rf"ray::{NAME.pattern}", title)}

    until(titles, "a process with a trial's name", watched.driver)

    def on_the_dashboard() -> bool:
        [node] = watched.ask("/nodes?view=summary")["data"]["summary"]
        detail = watched.ask(f"/nodes/{node['raylet']['nodeId']}")["data"]["detail"]
        commands = (" ".join(worker.get("cmdline") or ()) for worker in detail["workers"])
        return any(NAME.search(command) for command in commands)

    until(on_the_dashboard, "a worker with a trial's name", watched.driver)


def test_every_metric_is_on_rays_endpoint(watched: Watched) -> None:
    def all_there() -> dict[Any, float] | None:
        try:
            found = watched.metrics()
        except OSError:  # the endpoint starts
            return None
        return found if {name for name, _ in found} == GAUGES.keys() else None

    found = until(all_there, "all metrics", watched.driver)
    assert all(dict(labels)["run"] == RUN for _, labels in found)
    by_name: dict[str, list[float]] = {}
    for (name, _), value in found.items():
        by_name.setdefault(name, []).append(value)
    assert sum(by_name["foldrace_candidates"]) >= 1
    assert all(value > 0 for value in by_name["foldrace_images_per_second"])
    assert all(0 <= value < 1 for value in by_name["foldrace_data_wait_ratio"])
    for name in ("best_logloss", "device_hours", "eta_seconds", "fold_trials_expected"):
        assert by_name[f"foldrace_{name}"][0] > 0
    trials = {dict(labels)["trial"] for name, labels in found if name.endswith("per_second")}
    assert all(NAME.fullmatch(trial) for trial in trials)

    def all_gone() -> bool:  # it has ended long ago
        with suppress(OSError):
            found = {dict(labels).get("trial") for _, labels in watched.metrics()}
            return len(found) > 1 and not trials & found
        return False

    until(all_gone, "other trials in their place", watched.driver)


def test_prometheus_answers_every_query_of_the_dashboard(watched: Watched, tmp_path: Path) -> None:
    """With the configuration that comes along, of another place."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no prometheus here: apt-get install prometheus")
    config = (ROOT / "cluster" / "prometheus.yml").read_text(encoding="utf-8")
    known = "/tmp/ray/prom_metrics_service_discovery.json"
    assert known in config
    config = config.replace(known, str(watched.discovery)).replace("10s", "1s")
    (tmp_path / "prometheus.yml").write_text(config, encoding="utf-8")
    port = free_port()
    options = {
        "config.file": tmp_path / "prometheus.yml",
        "web.listen-address": f"127.0.0.1:{port}",
        "storage.tsdb.path": tmp_path / "data",
    }
    server = subprocess.Popen(
        [program, *(f"--{name}={value}" for name, value in options.items())],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        queries = dashboard_queries()
        assert len(queries) > 10
        own = [f'ray_foldrace_{name}{{run="{RUN}"}}' for name in ("best_logloss", "device_hours")]
        found = {
            query: until(lambda query=query: values(port, query), query, watched.driver)  # type: ignore[misc]
            for query in (*queries, *own)
        }
        assert all(math.isfinite(value) for answer in found.values() for value in answer)
        [[loss], [hours]] = (found[query] for query in own)
        assert 0 < loss < 10 and 0 < hours < 1
    finally:
        server.kill()
        server.wait()


def dashboard_queries() -> list[str]:
    """The queries of all panels, for every run, and of the variable's list of runs."""
    dashboard = json.loads((ROOT / "cluster" / "grafana.json").read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert {name for name in GAUGES if not any(f"ray_{name}{{" in q for q in asked)} == set()
    [listed] = re.findall(
        r"label_values\((\w+), run\)", json.dumps(dashboard["templating"], ensure_ascii=False)
    )
    return [*(query.replace("$run", ".*") for query in asked), listed]


def values(port: int, query: str) -> list[float]:
    """What Prometheus answers; [] while it has nothing."""
    url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    try:
        answer = json.load(WEB.open(url, timeout=10))
    except OSError as error:  # it starts
        assert getattr(error, "code", 503) == 503, (query, error)
        return []
    assert answer["status"] == "success"
    return [float(one["value"][1]) for one in answer["data"]["result"]]


def test_the_end_is_told_when_it_is_interrupted(watched: Watched) -> None:
    """Comes last."""
    os.kill(watched.driver.pid, signal.SIGINT)
    assert watched.driver.wait(DEADLINE) == 130
    last = watched.hook.events[-1]
    assert (last["event"], last["state"], last["run"]) == ("ended", "interrupted", RUN)
    assert "blend" in {event["event"] for event in watched.hook.events}
