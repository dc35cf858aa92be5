"""Batches of images for a trial: augmented in training, resized for scoring.

Takes an `ImageSource`, gives loaders of uint8 batches with their row numbers. What a training
batch holds depends on the trial's seed, the epoch and the batch number alone, not on the number
of loader processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from foldrace.config.schema import AugmentConfig
from foldrace.core.plugins import NO_PARTS, Parts
from foldrace.core.random_streams import Stream, generator
from foldrace.trainables.data.augment import POLICIES, augment
from foldrace.trainables.data.framing import resize
from foldrace.trainables.data.meta_features import meta_vectors
from foldrace.trainables.data.pixel_cache import ImageSource
from foldrace.trainables.data.transforms import Transforms

_MAX_WORKERS = 16  # a trial; more only take memory


@dataclass(frozen=True)
class BatchRows:
    """Which rows make a batch, and how they are varied."""

    rows: NDArray[np.int64]
    seed: tuple[int, ...] | None
    """The trial's seed, then epoch, step and rank: where in the stream of augmentation; None:
    resize only."""
    image_size: int | None = None
    """Side in pixels; None: the data set's own."""


@dataclass(frozen=True)
class Batch:
    """A batch as a loader gives it."""

    images: Tensor  # (B, H, W, 3) uint8
    rows: Tensor  # (B,) int64, rows of the image source
    meta: Tensor  # (B, F) float32, of the images before augmentation; F is 0 without features

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; torch's loader asks for it by this name."""
        return Batch(self.images.pin_memory(), self.rows.pin_memory(), self.meta.pin_memory())


class ShuffledBatchSampler(Sampler[BatchRows]):
    """Each epoch's rows in a new order.

    The last, smaller batch is left out, since its gradient would weigh its images more; fewer rows
    than one batch make one smaller batch. Of `world` devices, number `rank` gets its share of each
    batch.
    """

    def __init__(
        self,
        rows: NDArray[np.int64],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._rows, self._seed, self._rank, self._world = rows, seed, rank, world
        self.batch_size = min(batch_size, len(rows))
        self.epoch = 0
        self.image_size: int | None = None

    def __len__(self) -> int:
        return len(self._rows) // self.batch_size

    def __iter__(self) -> Iterator[BatchRows]:
        order = generator(self._seed, Stream.ORDER, self.epoch).permutation(self._rows)
        for step in range(len(self)):
            start = step * self.batch_size
            batch = order[start : start + self.batch_size]
            seed = (self._seed, self.epoch, step, self._rank)
            yield BatchRows(batch[self._rank :: self._world], seed, self.image_size)


class OrderedBatchSampler(Sampler[BatchRows]):
    """Rows in their order, every one once."""

    def __init__(self, rows: NDArray[np.int64], batch_size: int) -> None:
        self._rows, self._batch_size = rows, batch_size

    def __len__(self) -> int:
        return -(-len(self._rows) // self._batch_size)

    def __iter__(self) -> Iterator[BatchRows]:
        for start in range(0, len(self._rows), self._batch_size):
            yield BatchRows(self._rows[start : start + self._batch_size], None)


class BatchDataset(Dataset[Batch]):
    """A data set of whole batches: one call a batch keeps the per-image overhead small."""

    def __init__(
        self,
        source: ImageSource,
        image_size: int,
        config: AugmentConfig,
        meta: Sequence[str] = (),
        parts: Parts = NO_PARTS,
        how: str = "squash",
    ) -> None:
        """Batches as `config` varies them; `how` is a `training.resize`."""
        self._given = (source, image_size, config, tuple(meta), parts, how)
        self._source, self._image_size, self._meta, self._parts = source, image_size, meta, parts
        self._how = how
        self._policy = parts[POLICIES][config.policy]
        self._flip = config.flip or 0.0  # None where a config does not fix it
        self._transforms = Transforms((*self._policy.transforms, *config.transforms), parts)

    def __reduce__(self) -> tuple[type[BatchDataset], tuple[object, ...]]:
        """A spawned worker makes its own: a plugin's functions are in no module that it has."""
        return BatchDataset, self._given

    def __getitems__(self, batch: BatchRows) -> Batch:
        images = [self._source.image(row) for row in batch.rows]
        size = batch.image_size or self._image_size
        if batch.seed is None:
            pixels = resize(images, size, self._how)
        else:
            rng = generator(batch.seed[0], Stream.AUGMENTATION, *batch.seed[1:])
            pixels = augment(images, size, self._policy, rng, self._how, self._flip)
            pixels = self._transforms(pixels, rng)
        meta = meta_vectors(images, self._meta, self._parts)
        return Batch(torch.from_numpy(pixels), torch.from_numpy(batch.rows), torch.from_numpy(meta))


@dataclass(frozen=True)
class LoaderSettings:
    """A loader's share of what its trial has."""

    workers: int
    """Number of processes that load ahead; 0: the training process loads."""
    pin_memory: bool
    """True: batches lie in page-locked memory, from where copies to the device run alone."""
    prefetch_factor: int
    """Number of batches that each worker is ahead."""


def loader_settings(cpus: int, device_type: str) -> LoaderSettings:
    """Settings for a trial with this many CPU cores beside its device.

    On a CPU the training itself takes every core, and loading is a small part of it: no worker
    gains anything. Beside an accelerator one core is left to the training process, where there is
    more than one; one or two workers need a longer queue to even out slow batches.
    """
    if device_type == "cpu":
        return LoaderSettings(workers=0, pin_memory=False, prefetch_factor=4)
    workers = min(max(1, cpus - 1), _MAX_WORKERS)
    return LoaderSettings(workers, device_type == "cuda", prefetch_factor=4 if workers <= 4 else 2)


def build_loader(
    dataset: BatchDataset,
    sampler: Sampler[BatchRows],
    workers: int,
    pin_memory: bool,
    prefetch_factor: int = 4,
) -> DataLoader[Batch]:
    """A loader of whole batches; the last arguments are those of `LoaderSettings`."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,  # type: ignore[arg-type]  # torch types it as lists of indices
        collate_fn=_as_it_is,  # type: ignore[arg-type]  # the data set gives whole batches
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        prefetch_factor=prefetch_factor if workers > 0 else None,
        generator=torch.Generator(),
    )


def to_float(images: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [0, 1], channels last in memory."""
    if images.device.type != "cpu":
        return images.permute(0, 3, 1, 2).to(torch.float32).div_(255.0)
    # In one pass and, by NumPy, in huge pages: four times as fast as torch, which also gives each
    # new batch's memory page by page.
    scaled = np.divide(images.numpy(), np.float32(255), dtype=np.float32)
    return torch.from_numpy(scaled).permute(0, 3, 1, 2)


def _as_it_is(batch: Batch) -> Batch:
    return batch
