"""Started as a process of its own: a worker that fills the memory until Ray's monitor kills it.

Prints as JSON the names and texts of the errors that Tune's manager of workers hands on.
"""

from __future__ import annotations

import json
import time

import psutil
import ray
from ray.air.execution import FixedResourceManager, ResourceRequest
from ray.air.execution._internal import RayActorManager, TrackedActor

from foldrace.scheduling.ray.lost_workers import count_as_deaths

_ROOM, _MOST, _STEP = 1 << 30, 6 << 30, 100 << 20  # bytes


class Hog:
    """Fills the memory, slowly enough for the monitor."""

    def fill(self) -> None:
        kept = []
        for _ in range(_MOST // _STEP):
            kept.append(b"1" * _STEP)
            time.sleep(0.1)


def main() -> None:
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + _ROOM) / memory.total
    ray.init(
        num_cpus=1, include_dashboard=False, log_to_driver=False,
        _system_config={"memory_usage_threshold": threshold, "memory_monitor_refresh_ms": 100},
    )  # fmt: skip
    errors: dict[str, list[str]] = {"actor": [], "task": []}
    manager = RayActorManager(resource_manager=FixedResourceManager({"CPU": 1}))
    count_as_deaths(manager)
    count_as_deaths(manager)  # a second time changes nothing

    def note(kind: str, error: Exception) -> None:
        errors[kind] += [type(error).__name__, str(error)]

    def actor_failed(tracked_actor: TrackedActor, error: Exception) -> None:
        note("actor", error)

    def task_failed(tracked_actor: TrackedActor, error: Exception) -> None:
        note("task", error)

    actor = manager.add_actor(Hog, {}, ResourceRequest([{"CPU": 1}]), on_error=actor_failed)
    manager.schedule_actor_task(actor, "fill", on_error=task_failed)
    ends = time.monotonic() + 60
    while not errors["actor"] and time.monotonic() < ends:
        manager.next(timeout=1)
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
