"""A fold trial as Ray Tune runs it: in a worker process that is used again and again.

Takes a `TrialJob`, gives the function that Tune calls with what the searcher suggested. A trial on
one device trains in that process, a trial on several in a group of their own.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from ray import tune

from foldrace.config.schema import RaceConfig, TrainingConfig, TransformConfig
from foldrace.run_folder.records import CandidateRecord, Oof
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.rungs import RungReport, rungs_of
from foldrace.scheduling.unfinished_trials import unfinished_trial
from foldrace.search_spaces.hyperparameters import TrialParams

if TYPE_CHECKING:
    from foldrace.trainables.spec import EpochReport, TrialSpec


CANDIDATE, FOLD = "candidate", "fold"
"""Keys of what Tune passes from the searcher to a worker."""

JUDGED = "judged"
"""Key of whether the trial may be parked at its rungs."""

RUNG = "rung"
"""Key in a report to Tune: True at a rung, when all of the trial is in the run folder."""


@dataclass(frozen=True)
class TrialJob:
    """The settings that all fold trials of a sweep share, for the workers."""

    run: str
    image_root: str
    training: TrainingConfig
    transforms: tuple[TransformConfig, ...]
    seed: int
    session: str
    """Name of this driver's session: see `TrialSpec.session`."""
    cpus: int
    """Cores of each device."""
    use_gpu: bool
    devices: int
    """Devices of each trial."""
    race: RaceConfig | None = None
    """The race's settings; None: no trial is stopped in mid-training. A trial on several devices
    never is: its group goes on training while the decision about its last epoch is made."""


def trainable(job: TrialJob) -> Callable[[dict[str, Any]], None]:
    """The function that Tune calls with a suggestion; the heavy imports are the worker's."""

    def fold_trial(config: dict[str, Any]) -> None:
        from foldrace.trainables.spec import TrialStopped
        from foldrace.trainables.trial import run_trial

        spec = _spec(job, config)
        rungs = () if job.race is None else rungs_of(job.race, spec.params)
        monitor = _TuneMonitor({rung.epoch for rung in rungs})
        try:
            if job.devices == 1:
                run_trial(spec, monitor)
            else:
                from foldrace.scheduling.ray.device_group import run_on_devices

                run_on_devices(spec, job.devices, monitor.stop_requested)
        except TrialStopped:
            monitor.leave()
        except Exception:  # whatever it is, trial.json says it
            _record_failure(spec, traceback.format_exc())
            raise  # so that Tune gives the next trial a new process

    return fold_trial


def _spec(job: TrialJob, config: dict[str, Any]) -> TrialSpec:
    import ray

    from foldrace.trainables.spec import TrialSpec

    return TrialSpec(
        run=job.run,
        image_root=job.image_root,
        candidate=config[CANDIDATE],
        backbone=config[BACKBONE],
        params=TrialParams.from_dict(config[PARAMS]),
        fold=config[FOLD],
        training=job.training,
        transforms=job.transforms,
        seed=job.seed,
        session=job.session,
        cpus=job.cpus,
        use_gpu=job.use_gpu,
        accelerators=tuple(ray.get_runtime_context().get_accelerator_ids().get("GPU", ())),
    )


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
    from foldrace.core.temperature import fit_temperature, true_prob_at

    temperature = fit_temperature(oof.log_prob, labels)
    return true_prob_at(oof.log_prob, labels, temperature)


def _record_failure(spec: TrialSpec, error: str) -> None:
    store = RunStore.open(spec.run)
    candidate = CandidateRecord(
        candidate=spec.candidate, backbone=spec.backbone, params=spec.params.as_dict()
    )
    store.save_trial(unfinished_trial(store, candidate, spec.fold, "failed", error=error))
