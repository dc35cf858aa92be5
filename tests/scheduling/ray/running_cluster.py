"""A cluster of several Ray nodes on this machine, each with processes of its own."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

DEADLINE = 600.0  # seconds


@dataclass
class RunningCluster:
    """`ray start` in processes of our own, all ended by `stop`."""

    folder: Path
    environment: dict[str, str]
    address: str
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start_head(self, cpus: int, gpus: int, *options: str) -> None:
        port = self.address.rpartition(":")[2]
        self._start(
            "--head", f"--port={port}", f"--ray-client-server-port={free_port()}",
            "--node-ip-address=127.0.0.1", "--include-dashboard=false",
            f"--temp-dir={self.folder}", f"--num-cpus={cpus}", f"--num-gpus={gpus}",
            *options,
        )  # fmt: skip
        self._until_started("the head has started")

    def add_node(
        self, cpus: int, gpus: int, *options: str, within: Sequence[str] = (), **variables: str
    ) -> psutil.Process:
        """`within` is a command that starts the one that is given to it; `variables`: of the
        node's environment alone. Gives the process of `ray start`."""
        self._start(
            f"--address={self.address}", "--node-ip-address=127.0.0.1", f"--num-cpus={cpus}",
            f"--num-gpus={gpus}", *options, within=within, variables=variables,
        )  # fmt: skip
        self._until_started("the node has joined")
        return psutil.Process(self.processes[-1].pid)

    def _start(self, *options: str, **how: Any) -> None:
        """Ray itself gives a node thirty seconds to start, which are few on a busy machine."""
        for _ in range(3):
            self._begin(*options, **how)
            log, process = self.folder / f"start{len(self.processes) - 1}.log", self.processes[-1]
            until(
                lambda log=log, process=process: (
                    process.poll() is not None or b"Ray runtime started" in log.read_bytes()
                ),
                "a node starts or gives up",
            )
            if process.poll() is None or b"timed out during startup" not in log.read_bytes():
                return

    def _begin(
        self, *options: str, within: Sequence[str] = (), variables: Mapping[str, str] | None = None
    ) -> None:
        script = Path(sys.executable).with_name("ray")
        with (self.folder / f"start{len(self.processes)}.log").open("wb") as log:
            self.processes.append(
                subprocess.Popen(
                    [*within, script, "start", "--block", "--disable-usage-stats", *options],
                    stdout=log, stderr=log, start_new_session=True, cwd=self.folder,
                    env=self.environment | dict(variables or {}),
                )
            )  # fmt: skip

    def _until_started(self, what: str) -> None:
        log, process = self.folder / f"start{len(self.processes) - 1}.log", self.processes[-1]

        def started() -> bool:
            assert process.poll() is None, log.read_text()
            return b"Ray runtime started" in log.read_bytes()

        until(started, what)

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


def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"not within {DEADLINE} s: {what}"
        time.sleep(0.1)


@contextlib.contextmanager
def running_cluster(**variables: str) -> Iterator[RunningCluster]:
    """A cluster without a node yet, which asks for a token; `variables`: of its environment."""
    folder = Path(tempfile.mkdtemp(prefix="fr-"))  # short: it holds the names of sockets
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = os.environ | token | variables
    found = RunningCluster(folder, environment, f"127.0.0.1:{free_port()}")
    try:
        yield found
    finally:
        found.stop()
        shutil.rmtree(folder, ignore_errors=True)
