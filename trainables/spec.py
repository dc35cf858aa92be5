"""What a fold trial is given, and who watches it.

What a fold trial warns of, kept for its record: nobody reads the terminal of a worker process.

Takes whatever is logged within a `with` block, gives the texts of the warnings.
"""

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


class _Notes(logging.Filter):
    """Keeps warnings and lets everything pass. A filter and no handler: where the logger has no
    handler, Python still prints warnings itself."""

    def __init__(self, before: Iterable[str]) -> None:
        super().__init__()
        self.texts: dict[str, None] = dict.fromkeys(before)  # ordered, each once

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            self.texts[record.getMessage()] = None
        return True


@contextmanager
def noting(before: Iterable[str]) -> Iterator[Iterable[str]]:
    """`before`, then the texts of our own warnings in this process, of every thread, each once."""
    logger, notes = logging.getLogger("foldrace"), _Notes(before)
    logger.addFilter(notes)
    try:
        yield notes.texts
    finally:
        logger.removeFilter(notes)


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
    """After the augmentation policy, which is a hyperparameter."""
    seed: int
    """The sweep's seed; the trial's own follows from it, the hyperparameters and the fold."""
    cpus: int = 1
    use_gpu: bool = True
    """False: the CPU, even where a GPU can be seen that belongs to somebody else."""
    session: str | None = None
    """Of the driver: within one the image files are taken not to change (`open_images`)."""
    accelerators: tuple[str, ...] = ()
    """Device ids that a scheduler gave to this trial, for the record."""
    notes: tuple[str, ...] = ()
    """What whoever starts it has warned of, for the record too."""


@dataclass(frozen=True)
class EpochReport:
    """One line of train_log.csv. The ema columns are NaN where there is no EMA variant."""

    epoch: int
    train_loss: float
    train_acc: float
    val_loss: float
    val_acc: float
    val_logloss: float
    ema_val_acc: float
    ema_val_logloss: float
    lr: float
    seconds: float


class Monitor(Protocol):
    """Who watches a trial."""

    def report(self, epoch: EpochReport) -> None:
        """After each epoch; from a trial that goes on also the last one that it had, first."""

    def stop_requested(self) -> bool:
        """Asked before every batch."""


@runtime_checkable
class RungMonitor(Monitor, Protocol):
    """A monitor that compares the trial with others after some of its epochs."""

    rungs: Collection[int]
    """Epochs trained after which `show` is called."""

    def show(self, log: str, scored: Mapping[str, Oof], labels: NDArray[np.int64]) -> None:
        """Before the `report` of the same epoch: the text of train_log.csv so far, each variant's
        probabilities at this epoch on the fold's rows, ascending, and their labels (n,). Nothing of
        the trial is being written until that `report` returns or raises. From a trial that goes on
        also with the last epoch that it had, first, and without probabilities."""


class TrialStopped(Exception):
    """The monitor asked the trial to stop; no result was written."""


def first_micro_batch(spec: TrialSpec, devices: int) -> int:
    """Images on one device at once, as long as memory suffices."""
    share = -(-spec.params.batch_size // devices)
    return min(spec.training.micro_batch or share, share)


def trial_seed(spec: TrialSpec) -> int:
    """Random seed of the trial: see `fold_trial_seed`."""
    return fold_trial_seed(spec.seed, spec.backbone, spec.params, spec.fold)
