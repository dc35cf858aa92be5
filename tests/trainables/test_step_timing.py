"""Speeds of backbones: the arithmetic by a clock that ticks once a look, and the process itself."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import timm

from foldrace.config.schema import (
    DataConfig,
    ResourcesConfig,
    SearchConfig,
    SweepConfig,
    TrainingConfig,
)
from foldrace.search_spaces.sweep_length import Speed
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
