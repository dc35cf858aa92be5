"""The rows of a fold trial, and the loaders over them.

Takes a `FoldTrial` and the run folder, gives `TrialData`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from foldrace.config.schema import AugmentConfig
from foldrace.core.errors import DataError
from foldrace.core.plugins import NO_PARTS, Parts
from foldrace.dataset.image_paths import on_disk
from foldrace.run_folder.store import RunStore
from foldrace.trainables.data.loader import (
    Batch,
    BatchDataset,
    ShuffledBatchSampler,
    build_loader,
    loader_settings,
)
from foldrace.trainables.data.pixel_cache import open_images
from foldrace.trainables.data.soft_labels import SoftLabels, read_soft_labels
from foldrace.trainables.models.classifier import ModelConfig, trial_model_config
from foldrace.trainables.predict import scoring_loader
from foldrace.trainables.spec import FoldTrial, first_micro_batch


@dataclass(frozen=True)
class TrialData:
    """A fold trial's rows and the loaders over them.

    The fold's rows are scored, all others but those held out are trained on.
    """

    model_config: ModelConfig
    """The classifier that fits the data."""
    labels: NDArray[np.int64]
    """(n,) of all rows; then the teacher's class of each unlabelled image of a student."""
    class_counts: NDArray[np.int64]  # (C,) of the training rows
    rows: NDArray[np.int64]  # of the fold
    batches: ShuffledBatchSampler
    training: DataLoader[Batch]
    scoring: DataLoader[Batch]  # of several devices each has its own rows
    parts: Parts
    """The run's own losses, heads and so on."""
    soft: SoftLabels | None = None
    """What a student's teacher says of the training rows."""

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.model_config.classes


def open_data(
    trial: FoldTrial, store: RunStore, accelerator: Accelerator, parts: Parts = NO_PARTS
) -> TrialData:
    """Loaders for this process, which may be one of several of the trial."""
    table, fold = store.folds(), trial.fold
    soft = read_soft_labels(trial, store, parts)
    labelled, rows = table.training_rows(fold), table.rows_of(fold)
    return open_rows(trial, store, accelerator, parts, labelled, rows, soft)


def open_rows(
    trial: FoldTrial,
    store: RunStore,
    accelerator: Accelerator,
    parts: Parts,
    labelled: NDArray[np.int64],
    rows: NDArray[np.int64],
    soft: SoftLabels | None,
) -> TrialData:
    """Loaders that train on the rows `labelled`, or those of `soft`, and score `rows`."""
    table, params, spec = store.folds(), trial.params, trial.spec
    train_rows = labelled if soft is None else soft.rows
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    _check_shares(trial, len(train_rows), len(rows), world)
    labels = store.labels()
    counts = np.bincount(labels[labelled], minlength=len(store.classes()))
    files = [on_disk(Path(spec.image_root), path) for path in table.image_paths]
    if soft is not None:
        files += soft.files
        labels = np.concatenate([labels, soft.classes_of_unlabelled()])
    source = open_images(files, params.image_size, spec.cpus, trial.cache, spec.session)
    loader = loader_settings(spec.cpus, device.type)
    batches = ShuffledBatchSampler(train_rows, params.batch_size, trial.seed, rank, world)
    classes, meta = len(store.classes()), trial.meta_features
    model_config = trial_model_config(trial.candidate, classes, meta, parts)
    augment = AugmentConfig(policy=params.policy, flip=params.flip, transforms=trial.transforms)
    dataset = BatchDataset(
        source, params.image_size, augment, model_config.meta, parts, model_config.resize
    )
    # Without gradients there is room for twice as many images.
    scored_at_once = 2 * first_micro_batch(trial, world)
    return TrialData(
        model_config,
        labels,
        counts,
        rows,
        batches,
        build_loader(dataset, batches, **asdict(loader)),
        scoring_loader(source, rows[rank::world], model_config, scored_at_once, loader, parts),
        parts,
        soft,
    )


def _check_shares(trial: FoldTrial, training: int, scored: int, devices: int) -> None:
    """Refuse a device without a row, or with a single one to train on (batch statistics).

    The other devices would wait for it.
    """
    batch = min(trial.params.batch_size, training)
    if devices > 1 and (batch < 2 * devices or scored < devices):
        raise DataError.single(
            f"fold {trial.fold}",
            f"has {training} training rows in batches of {batch} and {scored} rows to score; "
            f"{devices} devices need a batch of at least {2 * devices} and {devices} rows to "
            "score: lower resources.devices_per_trial",
        )
