"""A teacher's soft labels of a student's training images, labelled or not.

Takes a fold trial and its run folder, gives the (B, C) log-probabilities of a batch's rows. They
are of each image as it is scored, without augmentation; mixed batches mix them as they mix labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foldrace.core.errors import RunFolderError
from foldrace.core.plugins import Parts
from foldrace.run_folder.records import TeacherRef
from foldrace.run_folder.store import RunStore
from foldrace.trainables.losses import LOSSES
from foldrace.trainables.spec import FoldTrial


@dataclass(frozen=True, eq=False)
class SoftLabels:
    """The soft labels of one fold's students."""

    rows: NDArray[np.int64]
    """(m + u,) training rows, then the unlabelled images, whose rows follow all labelled ones."""
    log_prob: Tensor  # (m + u, C) float16, on the CPU
    labelled: int
    """Number n of rows of folds.csv: those from there on have no label."""
    files: tuple[Path, ...]
    """The u unlabelled images."""
    temperature: float
    one_hot: bool
    """True where the loss takes one class a row: an unlabelled image has the teacher's first."""

    def of(self, rows: Tensor, device: torch.device) -> Tensor:
        """(B,) rows on the CPU -> (B, C) float32 log-probabilities on the device."""
        place = np.searchsorted(self.rows, rows.numpy())
        return self.log_prob[torch.from_numpy(place)].to(device, torch.float32, non_blocking=True)

    def classes_of_unlabelled(self) -> NDArray[np.int64]:
        """(u,) the teacher's most probable class of each unlabelled image."""
        end = len(self.rows) - len(self.files)
        return np.asarray(self.log_prob[end:].argmax(1).numpy(), dtype=np.int64)

    def taught(self, rows: Tensor, targets: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """(B, C) the targets, and the teacher's probabilities at the temperature.

        The targets of an unlabelled image are the teacher's probabilities as they are.
        """
        log_prob = self.of(rows, device)
        if self.files and not self.one_hot:
            known = (rows < self.labelled).to(device).unsqueeze(1)
            targets = torch.where(known, targets, log_prob.softmax(1))
        return targets, (log_prob / self.temperature).softmax(1)


def read_soft_labels(trial: FoldTrial, store: RunStore, parts: Parts) -> SoftLabels | None:
    """The soft labels of a student; None for a candidate that is none.

    RunFolderError where the teacher's files are gone, changed, or have seen the fold's labels.
    """
    teacher = trial.candidate.teacher
    if teacher is None:
        return None
    rows = store.folds().training_rows(trial.fold)
    return _soft_labels(trial, store, parts, teacher, rows, _read(store, teacher, trial.fold))


def mean_soft_labels(trial: FoldTrial, store: RunStore, parts: Parts) -> SoftLabels:
    """The geometric mean, image by image, over the folds whose students train on the image.

    With `folds: {k: 1}` the validation rows are in no fold's training, and stay out.
    """
    teacher, table = trial.candidate.teacher, store.folds()
    if teacher is None:
        raise ValueError(f"{trial.candidate.candidate} has no teacher")
    n, extra = len(table.fold), np.arange(teacher.unlabelled)
    total = np.zeros((n + len(extra), len(store.classes())), dtype=np.float32)
    count = np.zeros(len(total), dtype=np.int64)
    for fold in range(table.count):
        rows = np.concatenate([table.training_rows(fold), n + extra])
        total[rows] += _read(store, teacher, fold)
        count[rows] += 1
    known = np.flatnonzero(count)
    mean = (total[known] / count[known, None]).astype(np.float16)
    return _soft_labels(trial, store, parts, teacher, known[known < n], mean)


def _read(store: RunStore, teacher: TeacherRef, fold: int) -> NDArray[np.float16]:
    log_prob = store.teachers.log_prob(teacher.digest, fold, store.folds())
    if log_prob.shape[1] != len(store.classes()):
        raise RunFolderError.single(
            f"{store.root}/teachers/{teacher.digest}",
            f"has soft labels of {log_prob.shape[1]} classes, the run has {len(store.classes())}",
        )
    return log_prob


def _soft_labels(
    trial: FoldTrial,
    store: RunStore,
    parts: Parts,
    teacher: TeacherRef,
    rows: NDArray[np.int64],
    log_prob: NDArray[np.float16],
) -> SoftLabels:
    """`rows` are the labelled ones, ascending, of which `log_prob` has the first rows."""
    images = tuple(Path(path) for path in store.teachers.images(teacher.digest))
    n = len(store.folds().fold)
    return SoftLabels(
        rows=np.concatenate([rows, n + np.arange(len(images))]),
        log_prob=torch.from_numpy(log_prob),
        labelled=n,
        files=images,
        temperature=trial.params.distill_temperature,
        one_hot=parts[LOSSES][trial.params.loss].hard,
    )
