"""The nodes of the connected cluster, asked for in a thread: a dead cluster answers nobody.

Whoever reads them never waits. How long nothing has answered tells a dead control process.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import ray

from foldrace.scheduling.nodes import Node

KIND = "accelerator_type:"
"""Beginning of the names of Ray's resources for kinds of GPUs."""
_EVERY = 1.0  # seconds
_AWAY = 5.0  # seconds between two looks after which this process itself has stood still


class NodeWatch:
    """Follows the nodes for a block."""

    def __init__(self) -> None:
        self.nodes = alive_nodes()
        """Nodes that are alive, by the last answer."""
        self._answered = self._looked = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="nodes", daemon=True)

    def __enter__(self) -> NodeWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=2 * _EVERY)  # a question to a dead cluster takes a minute

    @property
    def silence(self) -> float:
        """Seconds since the cluster's control process last answered, in which this one was awake.

        To be asked for at least every few seconds.
        """
        now = time.monotonic()
        if now - self._looked > _AWAY:
            self._answered = now
        self._looked = now
        return now - self._answered

    def _follow(self) -> None:
        while not self._over.wait(_EVERY):
            try:
                self.nodes = alive_nodes()
            except Exception:  # whatever a dying Ray raises: no answer
                continue
            self._answered = time.monotonic()


def alive_nodes() -> list[Node]:
    """The connected cluster's nodes."""
    listed: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [_node(node) for node in listed if node["Alive"]]


def _node(info: dict[str, Any]) -> Node:
    """A node as Ray lists it. Its kind of GPU is the most special that Ray names, else itself."""
    resources: dict[str, float] = info["Resources"]
    gpus, kind = resources.get("GPU", 0.0), ""
    if gpus:
        kinds = [name for name in resources if name.startswith(KIND)]
        own = f"node:{info['NodeManagerAddress']}"
        kind = max(kinds, key=lambda name: (len(name), name), default=own)
    return Node(resources.get("CPU", 0.0), gpus, info["NodeID"], kind)
