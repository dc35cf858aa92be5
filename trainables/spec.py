"""A fold trial's inputs, its reports to a monitor, and the warnings kept for its record."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from foldrace.config.hyperparameters import TrialParams
from foldrace.config.schema import CacheConfig, TransformConfig
from foldrace.run_folder.records import CandidateRecord
from foldrace.run_folder.store import RunStore
from foldrace.run_folder.trial_record import candidate_params, candidate_seed


class _WarningFilter(logging.Filter):
    """A filter that remembers warnings and lets everything pass.

    It is no handler: where the logger has none, Python still prints warnings itself.
    """

    def __init__(self, before: Iterable[str]) -> None:
        super().__init__()
        self.texts: dict[str, None] = dict.fromkeys(before)  # ordered, each once

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            self.texts[record.getMessage()] = None
        return True


@contextmanager
def capture_warnings(before: Iterable[str]) -> Iterator[Iterable[str]]:
    """`before`, then the texts of our own warnings in this process, of every thread, each once.

    A trial's record keeps them, since the terminal of a worker process is seldom read.
    """
    logger, captured = logging.getLogger("foldrace"), _WarningFilter(before)
    logger.addFilter(captured)
    try:
        yield captured.texts
    finally:
        logger.removeFilter(captured)


@dataclass(frozen=True)
class TrialSpec:
    """What a fold trial must be told; all else lies in its run folder (`read_trial`)."""

    run: str
    """The run folder: path or URL."""
    image_root: str
    candidate: str
    fold: int
    cpus: int = 1
    """Cores of each device."""
    use_gpu: bool = True
    """False: the CPU, even where a GPU can be seen that belongs to somebody else."""
    session: str | None = None
    """Name of the driver's run: within one, image files do not change (see `open_images`)."""
    accelerators: tuple[str, ...] = ()
    """Device ids that a scheduler gave to this trial, for the record."""
    devices: float | None = None
    """Devices that its seconds are multiplied by, for the record; None: nobody counts them."""
    notes: tuple[str, ...] = ()
    """Warnings given before the trial started, for the record too."""
    micro_batch: int = 0
    """Largest number of images on a device at once, after more did not fit; 0: not known yet."""


@dataclass(frozen=True)
class FoldTrial:
    """A fold trial as it is trained: its spec, and what its run folder says about it."""

    spec: TrialSpec
    candidate: CandidateRecord
    params: TrialParams
    seed: int
    """Random seed of this fold trial: see `fold_trial_seed`."""
    transforms: tuple[TransformConfig, ...]
    """Transforms after the augmentation policy, which is a hyperparameter."""
    meta_features: tuple[str, ...]
    cache: CacheConfig

    @property
    def fold(self) -> int:
        """The fold that is scored, not trained on."""
        return self.spec.fold


def read_trial(spec: TrialSpec, store: RunStore) -> FoldTrial:
    """The fold trial of a spec; RunFolderError where its candidate or the config cannot be read."""
    config, candidate = store.config(), store.candidate(spec.candidate)
    return FoldTrial(
        spec=spec,
        candidate=candidate,
        params=candidate_params(store, candidate),
        seed=candidate_seed(store, candidate, spec.fold),
        transforms=config.augment.transforms,
        meta_features=config.training.meta_features,
        cache=config.cache,
    )


@dataclass(frozen=True)
class EpochReport:
    """One line of train_log.csv. The ema columns are NaN where there is no EMA variant."""

    epoch: int
    train_loss: float
    train_acc: float
    val_loss: float
    val_acc: float
    val_logloss: float
    val_calibrated_logloss: float
    """At the temperature fitted on these rows, in nats."""
    ema_val_acc: float
    ema_val_logloss: float
    ema_val_calibrated_logloss: float
    lr: float
    seconds: float


@dataclass(frozen=True)
class Pace:
    """How fast an epoch was trained, for whoever watches the trial; it stands in no file."""

    images_per_second: float
    """Of all devices of the trial together, scoring left out."""
    waiting: float
    """Fraction of that time for which the trial's first process waited for batches. A GPU may have
    been at work meanwhile: it has less to wait for."""


class Monitor(Protocol):
    """A trial's caller, as the trial sees it."""

    def report(self, epoch: EpochReport) -> None:
        """Take the report of an epoch; a resumed trial first reports the last one that it had."""

    def stop_requested(self) -> bool:
        """True to stop the trial; asked before every batch."""


@runtime_checkable
class RungMonitor(Monitor, Protocol):
    """A monitor that may set the trial aside after some of its epochs."""

    rungs: Collection[int]
    """Numbers of trained epochs after which `at_rung` is called."""

    def at_rung(self) -> None:
        """Take note that the epoch whose `report` comes next is a rung.

        The trial's state, its log and its columns at this epoch are in the run folder, and nothing
        of it is being written until that `report` returns or raises. Not called where the state
        cannot be saved: such a trial cannot be set aside.
        """


@runtime_checkable
class PaceMonitor(Monitor, Protocol):
    """A monitor that is told how fast each epoch was trained."""

    def pace(self, pace: Pace) -> None:
        """Take the pace of the epoch whose `report` comes next."""


class TrialStopped(Exception):
    """The monitor asked the trial to stop; no result was written."""


def first_micro_batch(trial: FoldTrial, devices: int) -> int:
    """Number of images on one device at once, as long as memory suffices."""
    share = -(-trial.params.batch_size // devices)
    return min(share, trial.params.micro_batch or share, trial.spec.micro_batch or share)
