"""Speeds and memory of backbones: the arithmetic by a clock that ticks once a look, the process
itself, and on the CPU all of the measurement of memory but the reading."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from foldrace.config.schema import (
    DataConfig,
    ResourcesConfig,
    SearchConfig,
    SweepConfig,
    TrainingConfig,
)
from foldrace.core.errors import RunFailure, UserError
from foldrace.run_folder.gpu_memory import GpuReading
from foldrace.search_spaces.sweep_length import Speed
from foldrace.trainables import state as state_module
from foldrace.trainables import step_timing
from foldrace.trainables.speeds import TimingRequest, measure_speeds

CLASSES, BATCH = 3, 8


def request(images: Path, *backbones: str, rows: int = 60, seconds: float = 60.0) -> TimingRequest:
    training: Any = {"image_size": 32, "batch_size": BATCH, "pretrained": True}
    config = SweepConfig(
        name="t",
        data=DataConfig(train=str(images)),
        search=SearchConfig(backbones=backbones),
        training=TrainingConfig.model_validate(training),
        resources=ResourcesConfig(cpus_per_trial=1),
    )
    files = tuple(str(path) for path in sorted(images.rglob("*.png"))[::9])
    return TimingRequest(config.model_dump_json(), files, rows, CLASSES, False, seconds)


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is a second later."""
    looks = itertools.count()
    monkeypatch.setattr(step_timing.time, "perf_counter", lambda: float(next(looks)))


@pytest.mark.usefixtures("ticking")
def test_loading_and_step_of_a_batch_and_scoring_of_both_variants(tiny_images: Path) -> None:
    """One second each: 2 s for 8 images; scored, 2 s for 16 images, loaded once for raw and EMA."""
    [(name, speed)] = step_timing.speeds(request(tiny_images, "timm/test_vit", seconds=1e6))
    assert name == "timm/test_vit"
    assert isinstance(speed, Speed)
    assert speed.train == pytest.approx(2 / BATCH)
    assert speed.score == pytest.approx(2 / (2 * BATCH))
    assert speed.start == 1.5
    model = timm.create_model("test_vit", num_classes=CLASSES, img_size=32)
    assert speed.weights == sum(p.numel() for p in model.parameters())


@pytest.mark.usefixtures("ticking")
def test_the_first_backbone_is_always_timed(tiny_images: Path) -> None:
    asked = request(tiny_images, "timm/test_vit", "timm/test_resnet", seconds=0.0)
    assert [name for name, _ in step_timing.speeds(asked)] == ["timm/test_vit"]


def test_a_backbone_that_cannot_train_says_why(tiny_images: Path) -> None:
    asked = request(tiny_images, "timm/no_such_net", "timm/test_vit")
    found = dict(step_timing.speeds(asked))
    assert isinstance(found["timm/no_such_net"], str)
    assert isinstance(found["timm/test_vit"], Speed)


def test_fewer_images_than_a_few_batches(tiny_images: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    asked = request(tmp_path, "timm/test_vit", rows=5)
    [(_, speed)] = step_timing.speeds(asked)
    assert isinstance(speed, Speed)
    assert speed.train > 0


@pytest.mark.slow
def test_a_process_of_its_own(tiny_images: Path) -> None:
    found = measure_speeds(request(tiny_images, "timm/test_vit", "timm/no_such_net"))
    assert found.failure is None
    assert list(found.speeds) == ["timm/test_vit"]
    assert list(found.errors) == ["timm/no_such_net"]
    assert 0 < found.speeds["timm/test_vit"].train < 10
    assert found.start > 0


def test_a_process_that_fails(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An installation that cannot be imported, found first by the process."""
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so: cannot be opened')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = measure_speeds(request(tiny_images, "timm/test_vit"))
    assert (dict(found.speeds), dict(found.errors)) == ({}, {})
    assert found.failure == "ImportError: libcudart.so: cannot be opened"


# -- memory


Seen = list[tuple[bool, int, int]]
"""Whether a pass was of training, its images and their side."""


@pytest.fixture
def model_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Seen]:
    """From then on models note what they are given, and raise where it is more images than that."""
    build = state_module.build_classifier

    def limited(images: float) -> Seen:
        seen: Seen = []

        def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen.append((module.training, len(inputs[0]), inputs[0].shape[-1]))
            if len(inputs[0]) > images:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

        def built(*arguments: Any, **options: Any) -> nn.Module:
            model: nn.Module = build(*arguments, **options)
            model.register_forward_hook(look)
            return model

        monkeypatch.setattr(state_module, "build_classifier", built)
        return seen

    return limited


def memory_of(run: Any, backbone: str = "timm/test_resnet", **changes: Any) -> GpuReading:
    """With 5 of 9 bytes taken at the peak."""
    given = {"image_size": 48, "batch_size": 14, "pretrained": True} | changes
    return step_timing.trial_memory(run.store.root, backbone, given, lambda device: (5, 9))


def test_memory_is_that_of_training_steps_and_a_scored_batch(
    tiny_run: Any, model_of: Callable[[float], Seen]
) -> None:
    """SAM takes two passes a step; scored are raw and average, twice as many images at once."""
    seen = model_of(math.inf)
    reading = memory_of(tiny_run, sam_rho=0.05)
    assert reading.memory == 9 and reading.trial is not None
    assert (reading.trial.bytes, reading.trial.whole) == (5, True)
    assert reading.trial.params["batch_size"] == 14
    assert Counter(seen)[True, 14, 48] == 2 * 4 and (False, 28, 48) in seen
    assert seen[-1][0] is False


def test_a_batch_that_does_not_fit_in_one_piece(
    tiny_run: Any, model_of: Callable[[float], Seen]
) -> None:
    model_of(5)
    reading = memory_of(tiny_run)
    assert reading.trial is not None
    assert (reading.trial.bytes, reading.trial.whole) == (5, False)


@pytest.mark.parametrize("backbone", ["timm/test_vit", "timm/test_resnet"])
def test_a_backbone_of_which_no_image_fits(
    tiny_run: Any, model_of: Callable[[float], Seen], backbone: str
) -> None:
    model_of(0)
    reading = memory_of(tiny_run, backbone)
    assert reading.memory == 9 and reading.trial is not None and reading.trial.bytes is None


def test_other_errors_are_no_matter_of_memory(tiny_run: Any) -> None:
    with pytest.raises(UserError, match="no_such_net: unknown backbone"):
        memory_of(tiny_run, "timm/no_such_net")


def test_the_memory_of_the_gpu_alone(tiny_run: Any) -> None:
    run = tiny_run.store.root
    found = step_timing.trial_memory(run, None, {}, lambda device: (5, 9))
    assert found == GpuReading(memory=9)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_without_a_gpu_nothing_is_measured(tiny_run: Any) -> None:
    for backbone in ("timm/test_vit", None):
        with pytest.raises(RunFailure, match="torch sees no GPU"):
            step_timing.trial_memory(tiny_run.store.root, backbone, {})


def test_what_the_driver_and_the_allocator_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 bytes 30 are free, and the allocator has given 10 back since it held the most."""
    found = {"mem_get_info": (30, 100), "max_memory_reserved": 50, "memory_reserved": 40}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in found.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert step_timing._gpu_usage(torch.device("cuda")) == (80, 100)
