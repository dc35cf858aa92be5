"""Speed and memory of backbones: some batches of the real training step, and one scored.

`python -m foldrace.trainables.step_timing` takes a `TimingRequest` as JSON on its input and writes
one line of JSON a backbone. A process of its own, so that the driver keeps no memory of a GPU.
`trial_memory` is called in one, too.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from foldrace.config.hyperparameters import TrialParams
from foldrace.config.ranges import Value
from foldrace.config.schema import AugmentConfig, SweepConfig
from foldrace.core.errors import RunFailure, message_line
from foldrace.core.plugins import Parts, check_plugins, load_parts
from foldrace.dataset.images import ImageError, read_rgb
from foldrace.run_folder.gpu_memory import GpuReading, TrialMemory
from foldrace.run_folder.records import CandidateRecord
from foldrace.run_folder.store import RunStore
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
from foldrace.trainables.memory import is_out_of_memory
from foldrace.trainables.models.classifier import trial_model_config
from foldrace.trainables.plugins import TRAINING_TABLES
from foldrace.trainables.predict import all_logits, autocast_for, scoring_loader
from foldrace.trainables.spec import FoldTrial, TrialSpec, first_micro_batch
from foldrace.trainables.speeds import TimingRequest
from foldrace.trainables.state import TrainState, build_train_state
from foldrace.trainables.step import make_examples, train_step

_NAME = "c0000"  # of the candidate that is timed, in no run
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
        trial = _trial(config, backbone, space.default(backbone), request.use_gpu)
        try:
            yield backbone, time_trial(trial, request, parts, ends)
        except Exception as error:  # a backbone may raise anything; the others are timed
            yield backbone, message_line(f"{type(error).__name__}: {error}")
        if time.perf_counter() > ends:
            return


def _trial(config: SweepConfig, backbone: str, params: TrialParams, use_gpu: bool) -> FoldTrial:
    """A fold trial of no run folder, without pretrained weights: as fast, and at hand."""
    params = replace(params, pretrained=False)
    cpus = config.resources.cpus_per_trial
    return FoldTrial(
        spec=TrialSpec("", "", candidate=_NAME, fold=0, cpus=cpus, use_gpu=use_gpu),
        candidate=CandidateRecord(candidate=_NAME, backbone=backbone, params=params.as_dict()),
        params=params,
        seed=0,
        transforms=config.augment.transforms,
        meta_features=config.training.meta_features,
        cache=config.cache,
    )


def trial_memory(
    run: str,
    backbone: str | None,
    params: Mapping[str, Value],
    usage: Callable[[torch.device], tuple[int, int]] | None = None,
) -> GpuReading:
    """The memory of this process's GPU, and what training and scoring a backbone take of it.

    To be called in a new process that has the GPU to itself. `run`: the run folder; `backbone`
    None: the GPU's memory alone; `usage` gives what is taken at the peak and all that there is, in
    bytes.
    """
    usage = usage or _gpu_usage
    if backbone is None:
        return GpuReading(memory=usage(torch.device("cuda"))[1])
    store = RunStore.open(run)
    parts = load_parts(store.plugins(), TRAINING_TABLES)
    trial = _trial(store.config(), backbone, TrialParams.from_dict(dict(params)), use_gpu=True)
    accelerator = fresh_accelerator(trial)
    seed_trial(trial)
    rows, classes = len(store.folds().targets), len(store.classes())
    data = _data(trial, TimingRequest("", (), rows, classes, True, 0.0), parts)
    memory = usage(accelerator.device)[1]  # first: without a GPU there is nothing to measure
    found = TrialMemory(params=dict(params), bytes=None)
    try:
        state = build_train_state(trial, data, accelerator)
        whole = state.micro_batch
        list(_training(trial, data, state, accelerator, math.inf))
        _scoring(trial, data, state, workers=0)
    except (RuntimeError, RunFailure) as error:
        cause = error.__cause__ if isinstance(error, RunFailure) else error
        if not isinstance(cause, RuntimeError) or not is_out_of_memory(cause):
            raise
    else:
        update = {"bytes": usage(accelerator.device)[0], "whole": state.micro_batch >= whole}
        found = found.model_copy(update=update)
    return GpuReading(memory=memory, trial=found)


def _gpu_usage(device: torch.device) -> tuple[int, int]:
    """Bytes of the GPU that are taken when this process is at its peak, and all bytes.

    By the driver: the context and what libraries hold count, as does what others have taken, which
    is so counted for each of several trials. The allocator keeps what it once had, unless it had to
    give it back to find room.
    """
    if not torch.cuda.is_available():
        raise RunFailure("torch sees no GPU there")
    free, total = torch.cuda.mem_get_info(device)
    given_back = torch.cuda.max_memory_reserved(device) - torch.cuda.memory_reserved(device)
    return total - free + given_back, total


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
        scoring_loader(source, rows, config, 2 * first_micro_batch(trial, 1), here, parts),
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
