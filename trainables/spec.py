"""A fold trial's inputs, its reports to a monitor, and the warnings kept for its record."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from foldrace.config.schema import TrainingConfig, TransformConfig
from foldrace.run_folder.records import Oof
from foldrace.search_spaces.hyperparameters import TrialParams, fold_trial_seed


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
    """Everything that a fold trial depends on."""

    run: str
    """The run folder: path or URL."""
    image_root: str
    candidate: str
    backbone: str
    params: TrialParams
    fold: int
    training: TrainingConfig
    transforms: tuple[TransformConfig, ...]
    """Transforms after the augmentation policy, which is a hyperparameter."""
    seed: int
    """The sweep's seed; the trial's own follows from it, the hyperparameters and the fold."""
    cpus: int = 1
    use_gpu: bool = True
    """False: the CPU, even where a GPU can be seen that belongs to somebody else."""
    session: str | None = None
    """Name of the driver's run: within one, image files do not change (see `open_images`)."""
    accelerators: tuple[str, ...] = ()
    """Device ids that a scheduler gave to this trial, for the record."""
    notes: tuple[str, ...] = ()
    """Warnings given before the trial started, for the record too."""


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


class Monitor(Protocol):
    """A trial's caller, as the trial sees it."""

    def report(self, epoch: EpochReport) -> None:
        """Take the report of an epoch; a resumed trial first reports the last one that it had."""

    def stop_requested(self) -> bool:
        """True to stop the trial; asked before every batch."""


@runtime_checkable
class RungMonitor(Monitor, Protocol):
    """A monitor that compares the trial with others after some of its epochs."""

    rungs: Collection[int]
    """Numbers of trained epochs after which `show` is called."""

    def show(self, log: str, scored: Mapping[str, Oof], labels: NDArray[np.int64]) -> None:
        """Take a rung's scores, before the `report` of the same epoch.

        `log` is the text of train_log.csv so far, `scored` each variant's probabilities at this
        epoch on the fold's rows, ascending, `labels` (n,) theirs. Nothing of the trial is being
        written until that `report` returns or raises. A resumed trial first shows the last epoch
        that it had, without probabilities.
        """


class TrialStopped(Exception):
    """The monitor asked the trial to stop; no result was written."""


def first_micro_batch(spec: TrialSpec, devices: int) -> int:
    """Number of images on one device at once, as long as memory suffices."""
    share = -(-spec.params.batch_size // devices)
    return min(spec.training.micro_batch or share, share)


def trial_seed(spec: TrialSpec) -> int:
    """Random seed of the trial: see `fold_trial_seed`."""
    return fold_trial_seed(spec.seed, spec.backbone, spec.params, spec.fold)
