"""A Ray cluster for the sweep: started here, or one that already runs.

Takes an address and the config's resources, gives a connection that knows how many fold trials
fit; what the cluster cannot do is an EnvironmentProblem before anything trains.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import logging
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import psutil
import ray
from ray.job_config import JobConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import foldrace
from foldrace.config.schema import ResourcesConfig, SweepConfig
from foldrace.core.errors import EnvironmentProblem, Problem
from foldrace.scheduling.nodes import Node, default_gpus, slots, this_machine

T = TypeVar("T")
_PROBE_TIMEOUT = 5.0  # seconds
_SLOTS_EVERY = 5.0  # seconds between looks at the cluster's nodes


@dataclass
class Cluster:
    """A connected cluster. `gpus_per_trial` is the config's, or its default for this cluster."""

    resources: ResourcesConfig
    gpus_per_trial: float
    dashboard: str | None
    """Address of Ray's dashboard, where it runs."""
    _slots: int = field(default=0, repr=False)
    _looked: float = field(default=0.0, repr=False)

    def slots(self) -> int:
        """Fold trials that can run now; nodes may come and go."""
        now = time.monotonic()
        if not self._looked or now - self._looked > _SLOTS_EVERY:
            self._looked = now
            self._slots = slots(alive_nodes(), self.resources, self.gpus_per_trial)
        return self._slots


def alive_nodes() -> list[Node]:
    """The connected cluster's nodes."""
    return [
        Node(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    ]


@contextlib.contextmanager
def connect(address: str | None, resources: ResourcesConfig) -> Iterator[Cluster]:
    """Start a cluster in this machine's cores and GPUs, or join the one at `address`.

    `address` is None, `auto`, or host:port. A connection that the process already has is used and
    left as it is. The caller asks `resource_problems(alive_nodes(), resources)` before it runs
    anything. Raises EnvironmentProblem where no cluster answers.
    """
    own = _background.wait() or not ray.is_initialized()
    if not ray.is_initialized():
        _start() if address is None else _join(address)
    try:
        yield Cluster(resources, default_gpus(alive_nodes(), resources), _dashboard())
    finally:
        if own:
            ray.shutdown()


@contextlib.contextmanager
def nodes_for_checks(
    config: SweepConfig | None, address: str | None, sweep: bool
) -> Iterator[list[Node]]:
    """The nodes that a sweep would have, to check a config against.

    A cluster at `address` must be asked, and stays connected. This machine is known without Ray,
    which starts meanwhile where a `sweep` will follow.
    """
    resources = config.resources if config else ResourcesConfig()
    if sweep:
        require_startable_python()
    if address is not None:
        with connect(address, resources):
            yield alive_nodes()
    elif not sweep or config is None:
        yield this_machine()
    else:
        with starting():
            yield this_machine()


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Start this machine's cluster in the background, while the caller checks its input.

    `connect` within the block waits for it; a cluster that nobody connects to ends with the block.
    """
    if ray.is_initialized():
        yield
        return
    # Ray's processes are killed when the thread that started them ends: it lives as long as they.
    with ThreadPoolExecutor(1, "start of Ray") as thread:
        _background.start = thread.submit(_start)
        try:
            yield
        finally:
            if _background.start is not None:  # nobody has connected: its errors are nobody's
                wait([_background.start])
                _background.start = None
                ray.shutdown()


@dataclass
class _BackgroundStart:
    """The start of this process's cluster that goes on in a thread, if any."""

    start: Future[None] | None = None

    def wait(self) -> bool:
        """Wait for its end and say whether there was one; whatever it raised is raised here."""
        start, self.start = self.start, None
        if start is None:
            return False
        start.result()
        return True


_background = _BackgroundStart()


def unreachable(paths: Sequence[str]) -> list[Problem]:
    """Problems of the connected cluster's nodes that lack one of these folders."""
    if len(alive_nodes()) < 2:
        return []
    return [
        Problem(
            f"node {address}",
            f"does not see {path}; put data and run folder on a disk that all nodes mount (zips "
            "are unpacked under FOLDRACE_CACHE, or ~/.cache/foldrace), or the run at s3://...",
        )
        for address, missing in on_each_node(_missing, list(paths))
        for path in missing
    ]


def on_each_node(ask: Callable[..., T], *arguments: object) -> list[tuple[str, T]]:
    """Address of each node, and what a function gives in a worker process there."""
    nodes = [n for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]
    remote = ray.remote(num_cpus=0)(ask)
    asked = [
        remote.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(*arguments)
        for node in nodes
    ]
    addresses = [node["NodeManagerAddress"] for node in nodes]
    return list(zip(addresses, ray.get(asked), strict=True))


def open_ports() -> list[str]:
    """`address:port` of what this process's cluster listens on for other machines, sorted."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            for socket_ in process.net_connections("tcp"):
                ip, port = socket_.laddr
                host = ipaddress.ip_address(ip.removeprefix("::ffff:"))
                if socket_.status == psutil.CONN_LISTEN and not host.is_loopback:
                    found.add(f"{host}:{port}" if host.version == 4 else f"[{host}]:{port}")
    return sorted(found)


def _missing(paths: list[str]) -> list[str]:
    return [path for path in paths if not os.path.isdir(path)]


def _dashboard() -> str | None:
    url = ray.worker.global_worker.node.address_info.get("webui_url")
    return f"http://{url}" if url else None


class _OwnPath(JobConfig):
    """Keeps the folders of the user's script and terminal off the workers' import path.

    Ray puts them in front of it, where a user's `timm/` or `ensemble.py` would be imported in place
    of the installed one; only jobs with a working directory are spared, so this says it has one.
    """

    def _runtime_env_has_working_dir(self) -> bool:
        return True


def require_startable_python() -> None:
    """Raise EnvironmentProblem where Ray could start no worker, and would try for ever."""
    if " " in sys.executable:
        raise EnvironmentProblem.single(
            sys.executable,
            "Ray cannot start workers with a Python whose path has a blank; make the environment "
            "in a folder without one",
        )


def _start() -> None:
    [machine] = this_machine()
    ray.init(
        address="local",
        job_config=_OwnPath(),
        num_cpus=int(machine.cpus),
        num_gpus=int(machine.gpus),
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def _join(address: str) -> None:
    if address.startswith("ray://"):
        raise EnvironmentProblem.single(
            f"--address {address}",
            "a Ray client would run the sweep where the run folder is not; use --address auto on "
            "a node of the cluster, or `ray job submit -- foldrace run CONFIG --address auto`",
        )
    try:
        _probe(os.environ.get("RAY_ADDRESS", "") if address == "auto" else address)
        with tempfile.TemporaryDirectory(prefix="foldrace-package-") as folder:
            ray.init(
                address=address,
                job_config=_OwnPath(),
                runtime_env=_shipped_code(Path(folder)),
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise EnvironmentProblem.single(
            f"--address {address}",
            f"no Ray cluster answers there ({error}); start one with `ray start --head`, or leave "
            "--address out to use this machine alone. A cluster that asks for a token (Ray's own, "
            "in ~/.ray/auth_token) answers only with RAY_AUTH_MODE=token set here and on each node",
        ) from error


def _probe(address: str) -> None:
    """OSError where nothing listens: Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_TIMEOUT).close()


def _shipped_code(folder: Path) -> dict[str, list[str]]:
    """The runtime environment with a copy of this package.

    Empty where the job that this driver runs in brings its own modules: Ray refuses both.
    """
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    if "py_modules" in (job.get("runtime_env") or {}):
        return {}
    return {"py_modules": [str(staged_package(folder))]}


def staged_package(folder: Path) -> Path:
    """Copy this package to `folder/foldrace`, without what a checkout holds beside it.

    The copy is shipped to the nodes of a cluster, which need not have Foldrace installed.
    """
    root, copy = Path(foldrace.__file__).parent, folder / "foldrace"
    copy.mkdir()
    for path in root.iterdir():
        if (path / "__init__.py").exists():
            shutil.copytree(path, copy / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.suffix == ".py" or path.name == "py.typed":
            shutil.copy(path, copy)
    return copy
