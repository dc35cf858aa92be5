"""How long members take: what is timed, what is remembered, what is not known."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foldrace.core.consent import allow_run
from foldrace.ensemble.pool import Member
from foldrace.inference.run_models import FoldModel
from foldrace.inference.speed import Timing, device_name, measure_speed, time_model
from foldrace.run_folder.records import CandidateRecord, TrialRecord
from foldrace.run_folder.store import RunStore
from foldrace.trainables.models.classifier import ModelConfig, build_classifier
from foldrace.trainables.predict import autocast_for, pack_weights

K = 3
CPU = torch.device("cpu")


def add(store: RunStore, candidate: str, backbone: str, size: int, sam_rho: float = 0.0) -> Member:
    """A candidate with untrained weights of all folds."""
    config = ModelConfig(f"timm/{backbone}", 3, size)
    store.save_candidate(CandidateRecord(candidate=candidate, backbone=config.backbone, params={}))
    data = pack_weights(build_classifier(config).state_dict(), config)
    for fold in range(K):
        trial = TrialRecord(
            candidate=candidate, fold=fold, status="finished", backbone=config.backbone,
            params={"image_size": size, "sam_rho": sam_rho}, folds_hash=store.folds().hash, seed=0,
        )  # fmt: skip
        store.save_trial(trial, weights={"raw": data, "ema": data})
    return Member(candidate, "raw", config.backbone)


@pytest.fixture
def store(make_tiny_run: Callable[..., Any]) -> RunStore:
    return make_tiny_run("run", k=K).store  # type: ignore[no-any-return]


def remembered(store: RunStore) -> dict[str, dict[str, float]]:
    """Device -> architecture -> milliseconds."""
    found = json.loads((Path(store.root) / "ensemble/speed.json").read_text())
    return {
        device: {key: timing["ms_per_image"] for key, timing in times.items()}
        for device, times in found.items()
    }


def test_one_time_for_each_architecture(store: RunStore) -> None:
    first, second = add(store, "c0000", "test_resnet", 32), add(store, "c0001", "test_resnet", 32)
    larger = add(store, "c0002", "test_resnet", 128)
    ema = Member("c0000", "ema", first.backbone)
    speeds = measure_speed(store, [first, second, larger, ema])
    times = speeds.ms_per_image
    assert speeds.device == device_name(CPU if not torch.cuda.is_available() else torch.device(0))
    assert times[first] is not None and times[larger] is not None
    assert times[first] == times[second] == times[ema] > 0
    assert times[larger] > times[first]  # 16 times the pixels
    [(device, of_one)] = remembered(store).items()
    assert device == speeds.device and len(of_one) == 2
    assert sorted(K * ms for ms in of_one.values()) == sorted({times[first], times[larger]})


def test_what_is_known_is_not_timed_again(store: RunStore) -> None:
    member = add(store, "c0000", "test_resnet", 32)
    first = measure_speed(store, [member])
    written = (Path(store.root) / "ensemble/speed.json").stat().st_mtime_ns
    store.remove_weights("c0000", "raw")  # nothing is read
    assert measure_speed(store, [member]) == first
    assert (Path(store.root) / "ensemble/speed.json").stat().st_mtime_ns == written


@pytest.mark.parametrize("text", ["", "[1]", '{"cpu": {"a": "fast"}}', '{"cpu": 1}'])
def test_a_file_of_something_else_is_written_anew(
    store: RunStore, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    member = add(store, "c0000", "test_resnet", 32)
    store.files.write("ensemble/speed.json", text.encode())
    speeds = measure_speed(store, [member])
    assert list(remembered(store)) == [speeds.device]
    assert f"{store.root}/ensemble/speed.json is ignored: " in caplog.text


def test_another_device_is_kept_beside(store: RunStore) -> None:
    text = b'{"another GPU": {"a card": {"ms_per_image": 0.25, "is_sure": true}}}'
    store.files.write("ensemble/speed.json", text)
    speeds = measure_speed(store, [add(store, "c0000", "test_resnet", 32)])
    found = remembered(store)
    assert found["another GPU"] == {"a card": 0.25} and speeds.device in found


def test_what_cannot_be_timed(store: RunStore, caplog: pytest.LogCaptureFixture) -> None:
    """Predictions made elsewhere have no model, which is nothing to warn of."""
    there = add(store, "c0000", "test_resnet", 32)
    gone, torn = add(store, "c0001", "test_vit", 32), add(store, "c0002", "test_efficientnet", 32)
    store.remove_weights("c0001", "raw")
    store.files.write("trials/c0002/fold0/best.safetensors", b"torn")
    added = Member("resnet50", "added")
    with caplog.at_level(logging.WARNING, "foldrace"):
        times = measure_speed(store, [there, gone, torn, added]).ms_per_image
    assert times[there] is not None
    assert times[gone] is times[torn] is times[added] is None
    [message] = [record.getMessage() for record in caplog.records if record.name == "foldrace"]
    assert "c0001 raw, c0002 raw" in message and "c0001/fold0/best.safetensors" in message


def test_a_variant_whose_weights_are_there_stands_for_the_others(store: RunStore) -> None:
    raw = add(store, "c0000", "test_resnet", 32)
    ema = Member("c0000", "ema", raw.backbone)
    store.remove_weights("c0000", "raw")
    times = measure_speed(store, [raw, ema]).ms_per_image
    assert times[raw] == times[ema] is not None


def test_members_of_another_run(store: RunStore, make_tiny_run: Callable[..., Any]) -> None:
    other: RunStore = make_tiny_run("other", k=K).store
    add(other, "c0000", "test_resnet", 32)
    allow_run(store.root, other.root)
    member = Member("c0000", "raw", "timm/test_resnet", other.root)
    times = measure_speed(store, [member]).ms_per_image
    assert times[member] is not None
    assert not (Path(other.root) / "ensemble").exists()


class Slow(nn.Module):
    """Takes 2 ms an image, and `extra(call)` seconds more."""

    meta_width = 0

    def __init__(self, extra: Callable[[int], float] = lambda call: 0.0) -> None:
        super().__init__()
        self.batches: list[int] = []
        self._extra = extra

    def forward(self, images: Tensor, meta: Tensor) -> Tensor:
        self.batches.append(len(images))
        time.sleep(0.002 * len(images) + self._extra(len(self.batches)))
        return torch.zeros(len(images), 3)


def timed(module: Slow) -> Timing:
    model = FoldModel(module, ModelConfig("timm/none", 3, 8), autocast_for(CPU, "fp32"))  # type: ignore[arg-type]
    return time_model(model, CPU)


def test_the_time_of_an_image() -> None:
    module = Slow()
    timing = timed(module)
    assert 2.0 <= timing.ms_per_image < 20.0
    assert max(module.batches) <= 64 and len(module.batches) >= 10


def test_other_work_on_the_machine_only_adds() -> None:
    """The first image and most batches are held up; the time is that of the fastest."""
    module = Slow(lambda call: 0.0 if call in (3, 8) else 0.3)
    timing = timed(module)
    assert 2.0 <= timing.ms_per_image < 6.0
    assert module.batches[-1] >= 16
    assert not timing.is_sure


@pytest.mark.parametrize(("is_sure", "later"), [(True, 12.0), (False, 3.0)])
def test_a_time_that_is_not_sure_is_measured_anew_and_the_lower_counts(
    store: RunStore, monkeypatch: pytest.MonkeyPatch, is_sure: bool, later: float
) -> None:
    members = [add(store, "c0000", "test_resnet", 32), add(store, "c0001", "test_resnet", 32)]
    times = iter([12.0, 3.0, 50.0])
    monkeypatch.setattr(
        "foldrace.inference.speed.time_model", lambda model, device: Timing(next(times), is_sure)
    )
    found = [set(measure_speed(store, members).ms_per_image.values()) for _ in range(3)]
    assert found == [{K * 12.0}, {K * later}, {K * later}]
    store.remove_weights("c0000", "raw")
    store.remove_weights("c0001", "raw")
    assert set(measure_speed(store, members).ms_per_image.values()) == {K * later}


@pytest.mark.parametrize(("threads", "expected"), [(1, "1 thread"), (2, "2 threads")])
def test_the_device_names_its_threads(
    monkeypatch: pytest.MonkeyPatch, threads: int, expected: str
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert device_name(CPU).endswith(f", {expected}")
