"""Fold models run on the same batches: each image is decoded once for all of equal input.

Takes models with their sources of images, gives their log-probabilities batch by batch. The next
batch is decoded by threads while the models see this one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from foldrace.core.plugins import Parts
from foldrace.dataset.images import ImageError
from foldrace.inference.run_models import BATCH, FoldModel
from foldrace.inference.tta import TTA, AveragedViews
from foldrace.trainables.data.framing import Image, resize
from foldrace.trainables.data.loader import Batch
from foldrace.trainables.data.meta_features import meta_vectors
from foldrace.trainables.data.pixel_cache import ImageSource
from foldrace.trainables.predict import all_logits

OnBadImage = Callable[[int, ImageError], None]


@dataclass(frozen=True, eq=False)
class Seat:
    """One model, and where its images come from: seats of one source share what is decoded."""

    model: FoldModel
    source: ImageSource
    parts: Parts


@dataclass(frozen=True, eq=False)
class BatchOutputs:
    """What the models say of one batch."""

    rows: NDArray[np.int64]
    """(b,) rows of the sources."""
    log_prob: list[NDArray[np.float32]]
    """(b, C) natural-log probabilities of each seat's model."""


@dataclass(frozen=True, eq=False)
class _Input:
    """What several seats have in common: their batches are the same."""

    source: ImageSource
    image_size: int
    resize: str
    meta: tuple[str, ...]
    parts: Parts
    seats: list[int] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Loaded:
    """One image as one input sees it."""

    pixels: Image  # (1, size, size, 3)
    meta: NDArray[np.float32]  # (1, F)


def run_together(
    seats: Sequence[Seat],
    rows: NDArray[np.int64],
    tta: TTA,
    device: torch.device,
    threads: int,
    on_bad: OnBadImage | None = None,
) -> Iterator[BatchOutputs]:
    """Every model's log-probabilities of these rows of the sources, in batches and in order.

    Rows whose image cannot be read are left out and told to `on_bad`; without it ImageError.
    """
    inputs = _inputs(seats)
    modules = [AveragedViews(s.model.module, tta, s.model.model_config.activation) for s in seats]
    for kept, loaded in _decoded_ahead(inputs, rows, threads, on_bad):
        found: list[NDArray[np.float32]] = [np.zeros(0, np.float32)] * len(seats)
        for place, one in enumerate(inputs):
            batch = _batch(kept, [image[place] for image in loaded])
            for autocast, numbers in _by_precision(seats, one.seats):
                averaged = [modules[number] for number in numbers]
                outputs, _ = all_logits(averaged, [batch], device, autocast)
                for number, log_prob in zip(numbers, outputs, strict=True):
                    found[number] = log_prob.cpu().numpy()
        yield BatchOutputs(kept, found)


def _inputs(seats: Sequence[Seat]) -> list[_Input]:
    found: dict[tuple[object, ...], _Input] = {}
    for number, seat in enumerate(seats):
        config = seat.model.model_config
        shape = config.image_size, config.resize, config.meta
        of_plugins = id(seat.parts) if config.meta else 0
        key = (id(seat.source), *shape, of_plugins)
        found.setdefault(key, _Input(seat.source, *shape, seat.parts)).seats.append(number)
    return list(found.values())


def _by_precision(
    seats: Sequence[Seat], numbers: Sequence[int]
) -> Iterator[tuple[torch.autocast, list[int]]]:
    """The seats that run in the same precision, with its context."""
    groups = defaultdict(list)
    for number in numbers:
        groups[seats[number].model.precision].append(number)
    for group in groups.values():
        yield seats[group[0]].model.autocast, group


def _batch(rows: NDArray[np.int64], loaded: Sequence[_Loaded]) -> Batch:
    pixels = np.concatenate([one.pixels for one in loaded])
    meta = np.concatenate([one.meta for one in loaded])
    return Batch(torch.from_numpy(pixels), torch.from_numpy(rows), torch.from_numpy(meta))


def _decoded_ahead(
    inputs: Sequence[_Input], rows: NDArray[np.int64], threads: int, on_bad: OnBadImage | None
) -> Iterator[tuple[NDArray[np.int64], list[list[_Loaded]]]]:
    """The readable rows of each batch, and their images as each input sees them."""
    starts = [*range(0, len(rows), BATCH), len(rows)]
    batches = [rows[start:end] for start, end in pairwise(starts)]
    with ThreadPoolExecutor(max(1, threads)) as pool:

        def submit(batch: NDArray[np.int64]) -> list[Future[list[_Loaded]]]:
            return [pool.submit(_load, inputs, int(row)) for row in batch]

        ahead = submit(batches[0]) if batches else []
        try:
            for number, batch in enumerate(batches):
                waiting, ahead = ahead, []
                if number + 1 < len(batches):
                    ahead = submit(batches[number + 1])
                loaded = [_result(f, int(r), on_bad) for f, r in zip(waiting, batch, strict=True)]
                good = [i for i, one in enumerate(loaded) if one is not None]
                if good:
                    yield batch[good], [one for one in loaded if one is not None]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _result(
    waiting: Future[list[_Loaded]], row: int, on_bad: OnBadImage | None
) -> list[_Loaded] | None:
    try:
        return waiting.result()
    except ImageError as error:
        if on_bad is None:
            raise
        on_bad(row, error)
        return None


def _load(inputs: Sequence[_Input], row: int) -> list[_Loaded]:
    """One image, decoded once for each source."""
    decoded: dict[int, Image] = {}
    found = []
    for one in inputs:
        if id(one.source) not in decoded:
            decoded[id(one.source)] = one.source.image(row)
        image = decoded[id(one.source)]
        pixels = resize([image], one.image_size, one.resize)
        found.append(_Loaded(pixels, meta_vectors([image], one.meta, one.parts)))
    return found
