"""What a fold trial reads: its rows, and the loaders over them.

Takes a `TrialSpec` and the run folder, gives `TrialData`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from experiment.folds import HELD_OUT
from experiment.store import RunStore
from experiment.tables import on_disk
from trainables.card import ModelCard
from trainables.data import Batch, Batches, ShuffledBatches, build_loader
from trainables.losses import LOSSES
from trainables.pixel_cache import open_images
from trainables.predict import scoring_loader
from trainables.spec import TrialSpec, trial_seed


@dataclass(frozen=True)
class TrialData:
    """The fold's rows are scored, all others but those held out are trained on."""

    card: ModelCard
    """The classifier that fits the data."""
    labels: NDArray[np.int64]  # (n,) of all rows
    class_counts: NDArray[np.int64]  # (C,) of the training rows
    rows: NDArray[np.int64]  # of the fold
    batches: ShuffledBatches
    training: DataLoader[Batch]
    scoring: DataLoader[Batch]  # of several devices each has its own rows

    @property
    def classes(self) -> int:
        return self.card.classes


def open_data(spec: TrialSpec, store: RunStore, accelerator: Accelerator) -> TrialData:
    """Loaders for this process, which may be one of several of the trial."""
    table, params = store.folds(), spec.params
    train_rows = np.flatnonzero((table.fold != spec.fold) & (table.fold != HELD_OUT))
    rows = np.flatnonzero(table.fold == spec.fold)
    labels = store.labels()
    files = [on_disk(Path(spec.image_root), path) for path in table.image_paths]
    source = open_images(files, params.image_size, spec.cpus)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    on_gpu = device.type == "cuda"
    workers = spec.cpus - 1 if on_gpu else 0
    batches = ShuffledBatches(train_rows, params.batch_size, trial_seed(spec), rank, world)
    card = _card(spec, len(store.classes()))
    dataset = Batches(source, params.image_size, spec.augment, card.meta)
    return TrialData(
        card,
        labels,
        np.bincount(labels[train_rows], minlength=card.classes),
        rows,
        batches,
        build_loader(dataset, batches, workers, on_gpu),
        scoring_loader(source, rows[rank::world], card, 2 * params.batch_size, workers, device),
    )


def _card(spec: TrialSpec, classes: int) -> ModelCard:
    params = spec.params
    return ModelCard(
        spec.backbone,
        classes,
        params.image_size,
        params.head,
        spec.training.meta_features,
        LOSSES[params.loss].activation,
    )
