"""A fold trial as Ray Tune runs it: in a worker process that is used again and again.

Takes a `TrialJob`, gives the function that Tune calls with what the searcher suggested. A trial on
one device trains in that process, a trial on several in a group of their own.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from ray import tune

from foldrace.run_folder.records import Oof
from foldrace.run_folder.store import RunStore
from foldrace.run_folder.trial_record import candidate_params, trial_record
from foldrace.scheduling.rungs import RungReport, rungs_of

if TYPE_CHECKING:
    from foldrace.trainables.spec import EpochReport, TrialSpec


CANDIDATE, FOLD = "candidate", "fold"
"""Keys of what Tune passes from the searcher to a worker; the rest lies in the run folder."""

RUNG = "rung"
"""Key of the `RungReport` in a report to Tune."""


@dataclass(frozen=True)
class TrialJob:
    """What all fold trials of a session share and is not in the run folder."""

    run: str
    image_root: str
    session: str
    """Name of this driver's session: see `TrialSpec.session`."""
    use_gpu: bool


def trainable(job: TrialJob) -> Callable[[dict[str, Any]], None]:
    """The function that Tune calls with a suggestion; the heavy imports are the worker's."""

    def fold_trial(config: dict[str, Any]) -> None:
        from foldrace.trainables.spec import TrialStopped
        from foldrace.trainables.trial import run_trial

        started_at = time.time()
        store = RunStore.open(job.run)
        resources = store.config().resources
        spec = _spec(job, config, resources.cpus_per_trial)
        try:
            monitor = _TuneMonitor(_rung_epochs(store, spec))
            if resources.devices_per_trial == 1:
                run_trial(spec, monitor)
            else:
                from foldrace.scheduling.ray.device_group import run_on_devices

                run_on_devices(spec, resources.devices_per_trial, monitor.stop_requested)
        except TrialStopped:
            monitor.leave()
        except Exception:  # whatever it is, trial.json says it
            _record_failure(store, spec, traceback.format_exc(), started_at)
            raise  # so that Tune gives the next trial a new process

    return fold_trial


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
    )


def _rung_epochs(store: RunStore, spec: TrialSpec) -> set[int]:
    """Numbers of trained epochs after which the trial may be stopped.

    A trial on several devices never is: its group goes on training while the decision about its
    last epoch is made.
    """
    config = store.config()
    if not config.race.stops_epochs or config.resources.devices_per_trial > 1:
        return set()
    params = candidate_params(store, store.candidate(spec.candidate))
    return {rung.epoch for rung in rungs_of(config.race, params)}


class _TuneMonitor:
    """Reports epochs to Tune, at the rungs with a `RungReport`, and tells the trial to stop."""

    def __init__(self, rungs: Collection[int]) -> None:
        # Tune has no public way to ask; without it a stopped trial would go on to its epoch's end
        # and the reset of its process would fail.
        from ray.train._internal.session import get_session

        self._session = get_session()
        self._shown: RungReport | None = None
        self._dismissed = False
        self.rungs = rungs

    def show(self, log: str, scored: Mapping[str, Oof], labels: NDArray[np.int64]) -> None:
        columns = {name: _calibrated(oof, labels) for name, oof in scored.items()}
        self._shown = RungReport(log, columns)

    def report(self, epoch: EpochReport) -> None:
        from foldrace.trainables.spec import TrialStopped

        shown = {} if self._shown is None else {RUNG: self._shown}
        self._shown = None
        try:
            tune.report(asdict(epoch) | shown)
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


def _calibrated(oof: Oof, labels: NDArray[np.int64]) -> NDArray[np.float32]:
    """(n,) true-class probabilities at the temperature that suits these rows."""
    from foldrace.ensemble.temperature import fit_temperature, true_prob_at

    temperature = fit_temperature(oof.log_prob, labels)
    return true_prob_at(oof.log_prob, labels, temperature)


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
