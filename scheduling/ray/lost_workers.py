"""Deaths of workers that Tune takes for a fault of its own.

Tune knows two errors of a trial's worker: that it has died, and that its code has failed. Of any
other, it ends the whole sweep: of a worker that Ray's memory monitor has killed, of a full disk or
object store. Here they become the first kind, which fails the attempt alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray.exceptions import RayActorError, RayError, RayTaskError

if TYPE_CHECKING:
    from ray.air.execution._internal import RayActorManager
    from ray.air.execution._internal.tracked_actor_task import TrackedActorTask


def count_as_deaths(manager: RayActorManager) -> None:
    """Have the manager treat every error of Ray about a worker as that worker's death.

    May be called again on the same one.
    """
    if "_actor_task_failed" in vars(manager):
        return
    handle = manager._actor_task_failed

    def task_failed(tracked_actor_task: TrackedActorTask, exception: Exception) -> None:
        handle(tracked_actor_task, as_death(exception))

    manager._actor_task_failed = task_failed  # type: ignore[method-assign]


def as_death(exception: Exception) -> Exception:
    """The error itself where Tune knows its kind, else a death that says the same."""
    known = isinstance(exception, RayActorError | RayTaskError)
    if known or not isinstance(exception, RayError):
        return exception
    death = RayActorError(error_msg=f"ray.exceptions.{type(exception).__name__}: {exception}")
    death.__cause__ = exception
    return death
