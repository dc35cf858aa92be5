"""The sweep on Ray Tune: from a run folder to settled candidates.

Takes the store and a connected cluster, gives a `SweepOutcome`. Holds what is particular to Tune:
resources, the callback at each step, stopping.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from foldrace.config.schema import ResourcesConfig, SweepConfig
from foldrace.core.errors import EnvironmentProblem, RunFailure
from foldrace.core.patience import Patience
from foldrace.run_folder.claims import HeldClaim
from foldrace.run_folder.progress import Progress
from foldrace.run_folder.records import CandidateSummary
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.budget import Deadline
from foldrace.scheduling.events import SweepListener
from foldrace.scheduling.ray.cluster import Cluster
from foldrace.scheduling.ray.device_group import NO_DEVICE
from foldrace.scheduling.ray.ending import Ending
from foldrace.scheduling.ray.fold_trial import PLACE, TrialJob, WriteResult, trainable
from foldrace.scheduling.ray.metrics import with_metrics
from foldrace.scheduling.ray.sweep_session import SweepSession
from foldrace.scheduling.ray.trial_names import NamedCalls, shown_name
from foldrace.scheduling.room import Place
from foldrace.scheduling.updates import ResultUpdates
from foldrace.search_spaces.space import SearchSpace

# Tune reads these when it is imported or started: no loggers of its own beside our run folder, its
# own Ctrl-C handling off, and its state file written rarely, since `resume` does not read it.
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "100000")
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")

from ray import tune
from ray.tune.stopper import Stopper

_PATIENCE = 600.0  # seconds for a run folder that cannot be written


@dataclass(frozen=True)
class SweepOutcome:
    """The end of a sweep: its candidates, and why it ended."""

    summaries: tuple[CandidateSummary, ...]
    seconds: float
    """Wall seconds of this session."""
    slots: int
    """Fold trials that ran at a time."""
    interrupted: bool
    """True after Ctrl-C or SIGTERM."""
    limit: str | None
    """The limit of the budget that let nothing more start, or None."""


class _Stop(Stopper):
    """Ends the sweep in Tune's own way: Ctrl-C, SIGTERM, or the time budget."""

    def __init__(self, session: SweepSession) -> None:
        self._session = session

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._session.over


class _Leave(BaseException):
    """Leaves Tune at once: its own end of trials takes ten seconds, and no dead Ray answers it."""


class _StepCallback(tune.Callback):
    """Calls `on_step` at each step of Tune, about ten times a second."""

    def __init__(self, session: SweepSession, leaves: bool) -> None:
        """`leaves`: Ray ends with the sweep, and all that is running with Ray."""
        self._session, self._leaves = session, leaves

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._session.on_step(trials)
        if self._leaves and self._session.over:
            raise _Leave

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.on_step_begin(iteration, trials)


def run_sweep(
    store: RunStore,
    config: SweepConfig,
    space: SearchSpace,
    image_root: str,
    cluster: Cluster,
    on_progress: Callable[[Progress], None],
    say: Callable[[str], None] = lambda line: None,
    claim: HeldClaim | None = None,
    deadline: Deadline | None = None,
    write_result: WriteResult | None = None,
    listeners: Sequence[SweepListener] = (),
) -> SweepOutcome:
    """Run every fold trial that the budget allows and the run folder does not hold yet.

    What runs at the deadline is ended; its saved state stays, for `resume`. `say` prints a line on
    the terminal; `write_result` is called in a worker whenever the result so far is to be written;
    None: never. Raises RunFailure where the cluster is lost, or every trial meets the same error.
    `listeners` are told what is new.
    """
    started = time.monotonic()
    on_progress = with_metrics(config.name, on_progress)
    updates = None if write_result is None else ResultUpdates(store, cluster.room.slots)
    go_on = f"go on with: foldrace resume {store.root}"
    ending = Ending(say, go_on)
    store.files.patience = Patience(_PATIENCE, say, lambda: ending.interrupted)
    session = SweepSession(
        store, config, space, cluster, on_progress, ending, claim, deadline, updates
    )
    session.sweep.listeners += listeners
    job = TrialJob(
        run=store.root,
        image_root=image_root,
        session=uuid4().hex,
        use_gpu=cluster.gpus_per_trial > 0,
        write_result=write_result,
    )
    # Tune starts one actor at a time unless told that so many may be pending.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(max(1, cluster.room.most))
    with tempfile.TemporaryDirectory(prefix="foldrace-tune-") as scratch, ending:
        tuner = tune.Tuner(
            tune.with_resources(trainable(job), _resources(config.resources)),
            tune_config=tune.TuneConfig(
                search_alg=session.searcher,
                scheduler=session.scheduler,
                num_samples=-1,
                reuse_actors=True,
                trial_name_creator=shown_name,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=scratch,
                stop=None if cluster.is_own else _Stop(session),
                callbacks=[_StepCallback(session, leaves=cluster.is_own), NamedCalls()],
                verbose=0,
            ),
        )
        with suppress(_Leave):
            tuner.fit()
        on_progress(session.progress())
        limit = session.limit
        summaries = session.close()
    if session.searcher.import_error is not None:
        raise _cannot_import(session.searcher.import_error, store)
    if session.failure is not None:
        raise RunFailure(f"{session.failure}; {go_on}")
    return SweepOutcome(
        tuple(summaries),
        time.monotonic() - started,
        cluster.room.slots(),
        ending.interrupted,
        limit,
    )


def _cannot_import(error: str, store: RunStore) -> EnvironmentProblem:
    """The end of a sweep whose workers lack a module."""
    return EnvironmentProblem.single(
        "a worker process of the sweep",
        f"cannot import what a fold trial needs: {error}. Install it on every node in the Python "
        f"that Ray runs there, then go on with: foldrace resume {store.root}",
    )


def _resources(
    resources: ResourcesConfig,
) -> Callable[[dict[str, Any]], tune.PlacementGroupFactory]:
    """What Tune reserves for a trial, by its suggestion; it may ask without one."""
    alone, cpus = resources.devices_per_trial == 1, resources.cpus_per_trial

    # Within, so that it travels to workers by itself: they do without this module.
    def of_trial(config: dict[str, Any]) -> tune.PlacementGroupFactory:
        place = Place(**config.get(PLACE, {}))
        return tune.PlacementGroupFactory([place.bundle(cpus) if alone else NO_DEVICE])

    return of_trial
