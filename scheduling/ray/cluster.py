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
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import ray
from ray.exceptions import RayError
from ray.job_config import JobConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import foldrace
from foldrace.config.schema import ResourcesConfig, SweepConfig
from foldrace.core.errors import EnvironmentProblem, message_line
from foldrace.scheduling.budget import devices_of_a_trial
from foldrace.scheduling.nodes import Node, default_gpus, slots, this_machine
from foldrace.scheduling.ray.node_watch import NodeWatch, alive_nodes
from foldrace.scheduling.ray.private_cluster import private_cluster
from foldrace.scheduling.room import Place, Room

K = TypeVar("K")
T = TypeVar("T")
_PROBE_TIMEOUT = 5.0  # seconds
_JOIN_TIMEOUT = 60.0  # seconds
_LOCAL_SILENCE = 15.0  # seconds without an answer after which this machine's own Ray is dead
_JOINED_SILENCE = 45.0  # of a cluster elsewhere; after 60 Ray ends the process without a word


@dataclass
class Cluster:
    """A connected cluster. `gpus_per_trial` is the config's, or its default for this cluster."""

    resources: ResourcesConfig
    gpus_per_trial: float
    dashboard: str | None
    """Address of Ray's dashboard, where it runs."""
    watch: NodeWatch
    room: Room
    """Where fold trials may run; nodes may come and go."""
    is_own: bool = False
    """True where the connection ends with the sweep."""
    is_local: bool = False
    """True where the cluster was started here, and has this machine alone."""

    @property
    def death(self) -> str | None:
        """What has happened to a cluster that will never run a trial again; None while it may."""
        for process in _dead_processes() if self.is_local else ():
            return f"Ray's {process} on this machine has died (killed, or out of memory)"
        silence = self.watch.silence
        if silence > (_LOCAL_SILENCE if self.is_local else _JOINED_SILENCE):
            return f"Ray's control process has not answered for {silence:.0f} s"
        if self.is_local and not self.watch.nodes:
            return "Ray counts the node of this machine as dead"
        return None


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
        with NodeWatch() as watch:
            gpus = default_gpus(watch.nodes, resources)
            is_local = own and address is None
            place = Place(gpus, devices=devices_of_a_trial(resources, gpus))
            room = Room(lambda: slots(watch.nodes, resources, gpus), place)
            yield Cluster(resources, gpus, _dashboard(), watch, room, own, is_local)
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


def _dead_processes() -> list[str]:
    """Of the two that a cluster on this machine cannot live without."""
    node = ray._private.worker.global_worker.node
    dead = {name for name, _ in node.dead_processes()} if node is not None else set()
    return [name for name in ("raylet", "gcs_server") if name in dead]


@dataclass(frozen=True)
class NoAnswer:
    """Why a task has given nothing."""

    reason: str
    late: bool = False
    """True where it took too long, and was ended."""


def answers(asked: Mapping[ray.ObjectRef[T], K], limit: float) -> Iterator[tuple[K, T | NoAnswer]]:
    """What the tasks give, as they end, each with what it stands for, within `limit` seconds."""
    ends, waiting = time.monotonic() + limit, list(asked)
    while waiting:
        ready, waiting = ray.wait(waiting, timeout=max(0.0, ends - time.monotonic()))
        for task in ready:
            try:
                yield asked[task], ray.get(task)
            except RayError as error:  # a missing package, a process that died, a lost node
                cause = getattr(error, "cause", None) or error  # without Ray's frame around it
                yield asked[task], NoAnswer(message_line(str(cause)) or type(cause).__name__)
        if not ready:
            for task in waiting:
                ray.cancel(task, force=True)
                yield asked[task], NoAnswer(f"did not answer within {limit:g} s", late=True)
            return


def on_node(node: str) -> NodeAffinitySchedulingStrategy:
    """To run a task on the node of this number of Ray's, and nowhere else."""
    return NodeAffinitySchedulingStrategy(node, soft=False)


def on_each_node(ask: Callable[[], T], limit: float = 60.0) -> list[tuple[str, T | NoAnswer]]:
    """Address of each node, and what a function gives in a worker process there."""
    remote = ray.remote(num_cpus=0, max_retries=0)(ask)
    nodes = [n for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]
    asked: dict[ray.ObjectRef[T], str] = {
        remote.options(scheduling_strategy=on_node(n["NodeID"])).remote(): n["NodeManagerAddress"]
        for n in nodes
    }
    found: list[tuple[str, T | NoAnswer]] = [*answers(asked, limit)]
    return sorted(found, key=lambda answer: answer[0])


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
    with private_cluster() as sessions:
        ray.init(
            address="local",
            job_config=_OwnPath(),
            num_cpus=int(machine.cpus),
            num_gpus=int(machine.gpus),
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=sessions,
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
            _within(_JOIN_TIMEOUT, lambda: _connect(address, Path(folder)))
    except (OSError, ValueError, RuntimeError) as error:
        raise EnvironmentProblem.single(
            f"--address {address}",
            f"no Ray cluster answers there ({error}); start one with `ray start --head`, or leave "
            "--address out to use this machine alone. A cluster that asks for a token (Ray's own, "
            "in ~/.ray/auth_token) answers only with RAY_AUTH_MODE=token set here and on each node",
        ) from error


def _connect(address: str, folder: Path) -> None:
    ray.init(
        address=address,
        job_config=_OwnPath(),
        runtime_env=_shipped_code(folder),
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def _within(limit: float, call: Callable[[], None]) -> None:
    """Call it in a thread that nobody waits for any longer; TimeoutError after `limit` seconds."""
    result: Future[None] = Future()

    def run() -> None:
        try:
            call()
            result.set_result(None)
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="connection to Ray", daemon=True).start()
    try:
        result.result(limit)
    except TimeoutError:
        raise TimeoutError(f"no answer within {limit:g} s") from None


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
