"""A fold trial as Ray Tune runs it: in a worker process that is used again and again.

Takes a `TrialJob`, gives the function that Tune calls with what the searcher suggested. A trial on
one device trains in that process, a trial on several in a group of their own. An update of the
result is such a trial, too.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ray import tune

from foldrace.core.errors import message_line
from foldrace.core.redaction import starred
from foldrace.run_folder.store import RunStore
from foldrace.run_folder.trial_record import candidate_params, trial_record
from foldrace.scheduling.ray.trial_names import NAME
from foldrace.scheduling.rungs import rungs_of
from foldrace.scheduling.updates import UPDATE

if TYPE_CHECKING:
    from foldrace.trainables.spec import EpochReport, Pace, TrialSpec


CANDIDATE, FOLD = "candidate", "fold"
"""Keys of what Tune passes from the searcher to a worker; the rest lies in the run folder."""

PLACE = "place"
"""Key of what is reserved for the trial: the fields of a `Place`."""

JUDGED = "judged"
"""Key of whether the trial may be parked at its rungs."""

WRITTEN = "written"
"""Key in a report to Tune: the end of an update of the result, what went wrong or empty."""

WriteResult = Callable[[str, int, bool], None]
"""Writes blend and submission so far: `write(run, cpus, use_gpu)`. A function of a module, since
workers import it."""

RUNG = "rung"
"""Key in a report to Tune: True at a rung, when all that the trial has is in the run folder."""


@dataclass(frozen=True)
class TrialJob:
    """What all fold trials of a session share and is not in the run folder."""

    run: str
    image_root: str
    session: str
    """Name of this driver's session: see `TrialSpec.session`."""
    use_gpu: bool
    write_result: WriteResult | None = None
    """None: the result is written at the end alone."""


def trainable(job: TrialJob) -> Callable[[dict[str, Any]], None]:
    """The function that Tune calls with a suggestion; the heavy imports are the worker's."""

    def fold_trial(config: dict[str, Any]) -> None:
        if UPDATE in config:
            _write_result(job)
            return
        from foldrace.trainables.spec import TrialStopped
        from foldrace.trainables.trial import run_trial

        started_at = time.time()
        store = RunStore.open(job.run)
        resources = store.config().resources
        spec = _spec(job, config, resources.cpus_per_trial)
        there = store.trial(spec.candidate, spec.fold)
        if there is not None and there.status == "finished":
            return  # an attempt that was given up for lost has gone on, and was faster
        try:
            monitor = _TuneMonitor(_rung_epochs(store, spec) if config[JUDGED] else ())
            if resources.devices_per_trial == 1:
                run_trial(spec, monitor)
            else:
                from foldrace.scheduling.ray.device_group import run_on_devices

                devices, stop_requested = resources.devices_per_trial, monitor.stop_requested
                run_on_devices(spec, devices, stop_requested, config[NAME])
        except TrialStopped:
            monitor.leave()
        except Exception:  # whatever it is, trial.json says it
            _record_failure(store, spec, starred(traceback.format_exc()), started_at)
            raise  # so that Tune gives the next trial a new process

    return fold_trial


def _write_result(job: TrialJob) -> None:
    """Write the result so far, with a fold trial's resources; whatever goes wrong is reported.

    A trial on several devices holds none itself: one of them is asked for.
    """
    import ray

    assert job.write_result is not None
    resources = RunStore.open(job.run).config().resources
    arguments = job.run, resources.cpus_per_trial, job.use_gpu
    try:
        if resources.devices_per_trial == 1:
            job.write_result(*arguments)
        else:
            task = ray.remote(
                num_cpus=resources.cpus_per_trial, num_gpus=int(job.use_gpu), max_retries=0
            )(job.write_result)
            ray.get(task.remote(*arguments))
    except Exception as error:  # a full disk, weights that cannot be read: the sweep goes on
        tune.report({WRITTEN: message_line(str(error)) or type(error).__name__})
    else:
        tune.report({WRITTEN: ""})


def _spec(job: TrialJob, config: dict[str, Any], cpus: int) -> TrialSpec:
    import ray

    from foldrace.trainables.spec import TrialSpec

    return TrialSpec(
        run=job.run,
        image_root=job.image_root,
        candidate=config[CANDIDATE],
        fold=config[FOLD],
        session=job.session,
        cpus=cpus,
        use_gpu=job.use_gpu,
        accelerators=tuple(ray.get_runtime_context().get_accelerator_ids().get("GPU", ())),
        devices=config.get(PLACE, {}).get("devices"),
    )


def _rung_epochs(store: RunStore, spec: TrialSpec) -> set[int]:
    """Numbers of trained epochs after which the trial may be parked.

    A trial on several devices never is: its group goes on training while the decision about its
    last epoch is made.
    """
    config = store.config()
    if not config.race.stops_epochs or config.resources.devices_per_trial > 1:
        return set()
    params = candidate_params(store, store.candidate(spec.candidate))
    return {rung.epoch for rung in rungs_of(config.race, params)}


class _TuneMonitor:
    """Reports epochs to Tune, says which are rungs, and tells the trial to stop."""

    def __init__(self, rungs: Collection[int]) -> None:
        # Tune has no public way to ask; without it a stopped trial would go on to its epoch's end
        # and the reset of its process would fail.
        from ray.train._internal.session import get_session

        self._session = get_session()
        self._at_rung = self._dismissed = False
        self._pace: dict[str, float] = {}
        self.rungs = rungs

    def at_rung(self) -> None:
        self._at_rung = True

    def pace(self, pace: Pace) -> None:
        self._pace = asdict(pace)

    def report(self, epoch: EpochReport) -> None:
        from foldrace.trainables.spec import TrialStopped

        rung = {RUNG: True} if self._at_rung else {}
        self._at_rung = False
        try:
            tune.report(asdict(epoch) | self._pace | rung)
        except SystemExit as error:  # Tune waits 2 s for the trial to leave, as it does in a batch
            self._dismissed = True
            raise TrialStopped from error

    def stop_requested(self) -> bool:
        return self._session is not None and self._session.stop_event.is_set()

    def leave(self) -> None:
        """End a stopped trial's process where Tune has dismissed it in a report.

        It must not come back with another report, whose answer it would wait for.
        """
        if self._dismissed:
            sys.exit(0)


def _record_failure(store: RunStore, spec: TrialSpec, error: str, started_at: float) -> None:
    candidate = store.candidate(spec.candidate)
    record = trial_record(
        store,
        candidate,
        spec.fold,
        "failed",
        error=error,
        started_at=started_at,
        ended_at=time.time(),
    )
    store.save_trial(record)
