"""The nodes of the connected cluster, asked for in a thread: a dead cluster answers nobody.

Whoever reads them never waits. How long nothing has answered tells a dead control process.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import ray

from foldrace.scheduling.nodes import Node

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
    return [
        Node(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
        for node in listed
        if node["Alive"]
    ]
