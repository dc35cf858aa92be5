"""The speed of backbones: some batches of the real training step, and one scored, in a process.

`python -m foldrace.trainables.step_timing` takes a `TimingRequest` as JSON on its input and writes
one line of JSON a backbone. A process of its own, so that the driver keeps no memory of a GPU.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from foldrace.config.schema import AugmentConfig, SweepConfig
from foldrace.core.errors import message_line
from foldrace.core.plugins import Parts, check_plugins
from foldrace.dataset.images import ImageError, read_rgb
from foldrace.run_folder.records import CandidateRecord
from foldrace.search_spaces.space import build_space
from foldrace.search_spaces.sweep_length import Speed
from foldrace.trainables.data.loader import (
    BatchDataset,
    ShuffledBatchSampler,
    build_loader,
    loader_settings,
)
from foldrace.trainables.data.pixel_cache import stored_side
from foldrace.trainables.data.trial_data import TrialData
from foldrace.trainables.devices import fresh_accelerator, precision_of, seed_trial
from foldrace.trainables.models.classifier import trial_model_config
from foldrace.trainables.plugins import TRAINING_TABLES
from foldrace.trainables.predict import all_logits, autocast_for, scoring_loader
from foldrace.trainables.spec import FoldTrial, TrialSpec
from foldrace.trainables.speeds import TimingRequest
from foldrace.trainables.state import TrainState, build_train_state
from foldrace.trainables.step import make_examples, train_step

_TIMED = 3  # batches, after one that warms up
_ENDING = 0.5  # seconds that a fold trial takes beside its model: scheduling, files


class _Repeated:
    """As many images as the data has, made of a few."""

    def __init__(self, images: Sequence[NDArray[np.uint8]], rows: int) -> None:
        self._images, self._rows = images, rows

    def __len__(self) -> int:
        return self._rows

    def image(self, row: int) -> NDArray[np.uint8]:
        """(height, width, 3) RGB."""
        return self._images[row % len(self._images)]


@dataclass(frozen=True)
class _Batch:
    """Seconds of one batch."""

    load: float
    step: float


def speeds(request: TimingRequest) -> Iterator[tuple[str, Speed | str]]:
    """Each backbone's speed, or the reason why it cannot train, until the time is over.

    The first is always timed; those that the time does not reach are left out.
    """
    config = SweepConfig.model_validate_json(request.config)
    parts, _ = check_plugins(config.plugins, TRAINING_TABLES)
    space, _ = build_space(config, "")
    ends = time.perf_counter() + request.seconds
    for backbone in config.search.backbones:
        params = replace(space.default(backbone), pretrained=False)  # as fast, and at hand
        trial = FoldTrial(
            spec=TrialSpec(
                run="", image_root="", candidate="timing", fold=0,
                cpus=config.resources.cpus_per_trial, use_gpu=request.use_gpu,
            ),
            candidate=CandidateRecord(
                candidate="timing", backbone=backbone, params=params.as_dict()
            ),
            params=params,
            seed=0,
            transforms=config.augment.transforms,
            meta_features=config.training.meta_features,
            cache=config.cache,
        )  # fmt: skip
        try:
            yield backbone, time_trial(trial, request, parts, ends)
        except Exception as error:  # a backbone may raise anything; the others are timed
            yield backbone, message_line(f"{type(error).__name__}: {error}")
        if time.perf_counter() > ends:
            return


def time_trial(trial: FoldTrial, request: TimingRequest, parts: Parts, ends: float) -> Speed:
    """The speed of a trial's step and of scoring; few batches where the time is over."""
    accelerator = fresh_accelerator(trial)
    seed_trial(trial)
    data = _data(trial, request, parts)
    began = time.perf_counter()
    state = build_train_state(trial, data, accelerator)
    start = time.perf_counter() - began + _ENDING
    timed = [*_training(trial, data, state, accelerator, ends)]
    counted = timed[1:] or timed  # the first sets up
    load, step = (float(np.median([getattr(b, k) for b in counted])) for k in ("load", "step"))
    workers = loader_settings(trial.spec.cpus, accelerator.device.type).workers
    batch = load + step if workers == 0 else max(step, load / workers)
    score = _scoring(trial, data, state, workers)
    weights = sum(p.numel() for p in state.parameters)
    return Speed(batch / data.batches.batch_size, score, start, weights)


def _training(
    trial: FoldTrial, data: TrialData, state: TrainState, accelerator: Accelerator, ends: float
) -> Iterator[_Batch]:
    """The first batches of an epoch."""
    device, params = accelerator.device, trial.params
    labels, rng = torch.from_numpy(data.labels).to(device), np.random.default_rng(0)
    state.model.train()
    batches = iter(data.training)
    for i in range(_TIMED + 1):
        began = time.perf_counter()
        batch = next(batches, None)
        if batch is None:  # fewer images than that
            batches = iter(data.training)
            batch = next(batches)
        loaded = time.perf_counter()
        examples = make_examples(batch, labels, data.classes, params, device, rng)
        loss, _ = train_step(state, examples, data.batches.batch_size)
        loss.item()  # waits for a GPU
        yield _Batch(loaded - began, time.perf_counter() - loaded)
        if i > 0 and time.perf_counter() > ends:
            return


def _scoring(trial: FoldTrial, data: TrialData, state: TrainState, workers: int) -> float:
    """Seconds per image of scoring all variants; loading goes on beside a GPU."""
    autocast = autocast_for(state.device, precision_of(trial, state.device))
    began = time.perf_counter()
    batch = next(iter(data.scoring))
    loaded = time.perf_counter()
    models = list(state.variants().values())
    all_logits(models, [batch], state.device, autocast)  # sets up
    again = time.perf_counter()
    all_logits(models, [batch], state.device, autocast)[0][0].cpu()
    forward, load = time.perf_counter() - again, loaded - began
    one = load + forward if workers == 0 else max(forward, load / workers)
    return one / len(batch.rows)


def _data(trial: FoldTrial, request: TimingRequest, parts: Parts) -> TrialData:
    """The trial's data as it would be opened, but with the sample of its images repeated."""
    params = trial.params
    source = _Repeated(_images(request.files, stored_side(params.image_size, trial.cache)),
                       request.rows)  # fmt: skip
    labels = np.arange(request.rows, dtype=np.int64) % request.classes
    rows = np.arange(request.rows, dtype=np.int64)
    config = trial_model_config(trial.candidate, request.classes, trial.meta_features, parts)
    augment = AugmentConfig(policy=params.policy, flip=params.flip, transforms=trial.transforms)
    dataset = BatchDataset(source, params.image_size, augment, config.meta, parts, config.resize)
    batches = ShuffledBatchSampler(rows, params.batch_size, seed=0)
    here = replace(loader_settings(1, "cpu"), workers=0)
    return TrialData(
        config,
        labels,
        np.bincount(labels, minlength=request.classes),
        rows,
        batches,
        build_loader(dataset, batches, workers=0, pin_memory=False),
        scoring_loader(source, rows, config, 2 * batches.batch_size, here, parts),
        parts,
    )


def _images(files: Sequence[str], shorter_side: int) -> list[NDArray[np.uint8]]:
    """The images that can be read, as the cache would hold them; noise where none can."""
    found = []
    for file in files:
        try:
            found.append(np.asarray(read_rgb(Path(file), shorter_side)))
        except ImageError:  # the checks before the run name it
            continue
    noise = np.random.default_rng(0).integers(0, 256, (shorter_side, shorter_side, 3), np.uint8)
    return found or [noise]


def main() -> None:
    """Answer the request on the input, a line a backbone."""
    given = json.load(sys.stdin)
    began = time.perf_counter()
    for backbone, speed in speeds(TimingRequest(**given)):
        found = {"error": speed} if isinstance(speed, str) else {"speed": asdict(speed)}
        seconds = time.perf_counter() - began
        print(json.dumps({"backbone": backbone, "seconds": seconds, **found}), flush=True)
        began = time.perf_counter()


if __name__ == "__main__":
    main()
