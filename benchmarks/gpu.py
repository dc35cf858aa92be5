"""What a GPU gets to do: run on a machine with one; without one a tiny model only tries the code.

throughput  images a second of training convnext_tiny at 224 px, bf16, batches of 256: the trial's
            own steps fed from the pixel cache by its loader processes, the same steps on one batch
            that stays on the device, and a bare PyTorch loop (timm's model of the same size,
            AdamW, autocast) on such a batch, already normalised. The last two are medians of three
            runs in turns. The device's share of waiting for data follows from the first two. Peak
            memory is the allocator's.
agreement   a short fold trial on the digits, on the GPU in fp32 and in bf16 against the CPU: mean
            absolute difference of the out-of-fold probabilities. Same seeds, no dropout, no EMA.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import timm
import torch
from harness import Results, in_turns, options
from sides.fold_spec import Silent, fold_spec
from sides.photos import write_photos
from torch.nn import functional

from foldrace.config.load import parse_config
from foldrace.config.ranges import Value
from foldrace.dataset.demo import write_demo
from foldrace.run_folder.store import RunStore
from foldrace.trainables import spec as spec_module
from foldrace.trainables.data.loader import to_float
from foldrace.trainables.data.mixing import soft_targets
from foldrace.trainables.data.trial_data import TrialData, open_data
from foldrace.trainables.devices import fresh_accelerator, seed_trial
from foldrace.trainables.spec import TrialSpec, read_trial
from foldrace.trainables.state import TrainState, build_train_state
from foldrace.trainables.step import Examples, train_step
from foldrace.trainables.trial import run_trial

_WARM_UP = 5  # steps
_TURNS = 3
_PLAIN: dict[str, Value] = {
    "mixup_prob": 0.0,
    "ema_epochs": 0.0,
    "dropout": 0.0,
    "label_smoothing": 0.0,
}


def _throughput(results: Results, folder: Path, on_gpu: bool, quick: bool) -> None:
    size, batch, steps = (224, 256, 20 if quick else 60) if on_gpu else (32, 16, 5)
    images = batch * (_WARM_UP + steps + 2)
    write_photos(folder / "photos", min(images, 4096))
    backbone = "timm/convnext_tiny" if on_gpu else "timm/test_convnext"
    spec = _photo_spec(folder, backbone, size, batch, "bf16" if on_gpu else "fp32")
    store = RunStore.open(spec.run)
    trial = read_trial(spec, store)
    accelerator = fresh_accelerator(trial)
    seed_trial(trial)
    data = open_data(trial, store, accelerator)
    state = build_train_state(trial, data, accelerator)
    state.model.train()
    _reset_memory()
    fed = _rate(state, data, _from_loader(state, data), steps)
    memory = _peak_gb()
    held = next(_from_loader(state, data))
    turns = in_turns(
        partial(_rate, state, data, _for_ever(held), steps),
        partial(_timed, _bare_step(backbone, held), _for_ever(held), steps, state.device),
        _TURNS,
    )
    steady, bare = median(turns.a), median(turns.b)
    results.add(
        f"throughput: {backbone}, {size} px, batches of {batch}, {trial.params.precision}",
        from_cache=fed,
        on_device=steady,
        bare_on_device=bare,
        of_bare=fed / bare,
        waiting_for_data=max(0.0, 1 - fed / steady),
        peak_gb=memory,
        loader_processes=data.training.num_workers,
    )
    if on_gpu:
        results.at_least("images a second from the pixel cache / bare loop on the device", 0.95,
                         fed / bare)  # fmt: skip


def _photo_spec(folder: Path, backbone: str, size: int, batch: int, precision: str) -> TrialSpec:
    config = folder / "photos.yaml"
    config.write_text(
        f"data: {{train: photos}}\nfolds: {{k: 5}}\nsearch: {{backbones: [{backbone}]}}\n"
        f"training: {{pretrained: false, precision: {precision}, clip_grad: null}}\n"
    )
    knobs: dict[str, Value] = {"image_size": size, "batch_size": batch}
    return _spec(config, backbone, knobs | {"policy": "vehicles", "flip": 0.5})


def _spec(config: Path, backbone: str, knobs: dict[str, Value]) -> TrialSpec:
    """On all cores; MixUp and EMA off."""
    parsed = parse_config(config).require()
    cpus = len(os.sched_getaffinity(0))
    return fold_spec(parsed, config.parent, backbone, _PLAIN | knobs, cpus=cpus)


def _from_loader(state: TrainState, data: TrialData) -> Iterator[Examples]:
    """Epoch after epoch, as a trial makes them."""
    labels = torch.from_numpy(data.labels).to(state.device)
    while True:
        data.batches.epoch += 1
        for batch in data.training:
            images = to_float(batch.images.to(state.device, non_blocking=True))
            rows = batch.rows.to(state.device, non_blocking=True)
            meta = batch.meta.to(state.device, non_blocking=True)
            yield Examples(
                images,
                meta,
                soft_targets(labels[rows], data.classes, 0.0),
                labels.new_zeros(len(rows), 0),
            )


def _for_ever(examples: Examples) -> Iterator[Examples]:
    while True:
        yield examples


def _rate(state: TrainState, data: TrialData, batches: Iterator[Examples], steps: int) -> float:
    return _timed(lambda examples: train_step(state, examples, data.batches.batch_size),
                  batches, steps, state.device)  # fmt: skip


def _bare_step(backbone: str, held: Examples) -> Callable[[Examples], object]:
    classes, device = held.targets.shape[1], held.images.device
    model = timm.create_model(backbone.removeprefix("timm/"), num_classes=classes)
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    images = (held.images - 0.5) / 0.25

    def step(_: Examples) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = functional.cross_entropy(model(images), held.targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _timed(
    step: Callable[[Examples], object],
    batches: Iterator[Examples],
    steps: int,
    device: torch.device,
) -> float:
    """Images a second, after a warm-up."""
    for examples in islice(batches, _WARM_UP):
        step(examples)
    _wait_for(device)
    images, started = 0, time.perf_counter()
    for examples in islice(batches, steps):
        step(examples)
        images += len(examples)
    _wait_for(device)
    return images / (time.perf_counter() - started)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _reset_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak_gb() -> float | None:
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None


def _agreement(results: Results, folder: Path) -> None:
    config = write_demo(folder / "digits")
    knobs: dict[str, Value] = {"epochs": 2, "image_size": 32, "policy": "light"}
    oof = {}
    for name, precision in (("CPU fp32", "fp32"), ("GPU fp32", "fp32"), ("GPU bf16", "bf16")):
        spec = _spec(config, "timm/test_convnext", knobs | {"precision": precision})
        spec = replace(spec, use_gpu=name != "CPU fp32")
        with mock.patch.object(spec_module, "candidate_seed", lambda *_: 0):  # else one for each
            run_trial(spec, Silent())
        store = RunStore.open(spec.run)
        data = store.files.read(f"{store.trial_folder(spec.candidate, 0)}/oof.npy")
        aside = folder / "oof.npy"
        aside.write_bytes(data)
        oof[name] = np.exp(np.load(aside).astype(np.float64))
    for name in ("GPU fp32", "GPU bf16"):
        difference = float(np.abs(oof[name] - oof["CPU fp32"]).mean())
        results.add("agreement: out-of-fold probabilities, 2 epochs on the digits",
                    side=name, mean_absolute_difference=difference)  # fmt: skip
        if name == "GPU fp32":
            results.at_most("mean |OOF on the GPU - OOF on the CPU|, fp32", 1e-3, difference)


def main() -> None:
    given = options(__doc__)
    results = Results("gpu")
    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FOLDRACE_CACHE"] = f"{folder}/cache"
        _throughput(results, Path(folder), on_gpu, given.quick)
        if on_gpu:
            _agreement(results, Path(folder))
    results.publish(given if on_gpu else replace(given, quick=True))


if __name__ == "__main__":
    main()
