"""One trial on two devices: what it writes is what one device writes. Processes with gloo on the
CPU, as Ray Train starts them."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load

from foldrace.trainables.spec import TrialSpec
from foldrace.trainables.trial import run_trial
from tests.conftest import write_tiny_run
from tests.trainables.written_trials import another, written_trial

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 240.0  # seconds; only a fault takes so long
PULLED, PULLED_TWO, PLAIN, PLAIN_TWO, PLAIN_PARTS = "c0010", "c0011", "c0020", "c0021", "c0022"
MIXED = {"fp32": "c0030", "bf16": "c0031"}
ALIKE, ALIKE_IDLE, TOO_SMALL = "c0040", "c0041", "c0050"


def spec_for(run: Any, candidate: str = "c0000", **changes: Any) -> TrialSpec:
    """Nothing random but the order of the rows and the initial weights; `changes` of the
    hyperparameters."""
    params: dict[str, Any] = {
        "epochs": 2, "image_size": 32, "batch_size": 14, "lr": 0.02, "dropout": 0.0,
        "drop_path": 0.0, "mixup_alpha": 0.0, "label_smoothing": 0.0, "policy": "none",
        "precision": "fp32", "pretrained": False,
    }  # fmt: skip
    backbone = changes.pop("backbone", "timm/test_convnext")
    return written_trial(run, candidate, backbone, params | changes, use_gpu=False)


@dataclass(frozen=True)
class Device:
    """How a process of the group ended, and what it noted of each candidate."""

    returncode: int
    notes: dict[str, dict[str, list[float]]]
    stderr: str


def train(jobs: list[tuple[TrialSpec, str]], folder: Path) -> list[Device]:
    """A group of two processes that trains one trial after another, both ended."""
    (folder / "jobs.pkl").write_bytes(pickle.dumps(jobs))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    script = Path(__file__).with_name("one_of_several.py")
    notes = [folder / f"notes{rank}.json" for rank in range(2)]
    started = [
        subprocess.Popen(
            [sys.executable, script, folder / "jobs.pkl", notes[rank]],
            env=os.environ | group | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
                "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
            },
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=DEADLINE)[1] for process in started]
    return [
        Device(p.returncode, json.loads(n.read_text()) if n.exists() else {}, error)
        for p, n, error in zip(started, notes, errors, strict=True)
    ]


@dataclass(frozen=True)
class Trained:
    """The run of all trials of this file, and the two processes that trained."""

    run: Any
    devices: list[Device]

    def notes(self, candidate: str) -> list[dict[str, list[float]]]:
        """What each device noted of a trial that ended well."""
        assert all(candidate in d.notes for d in self.devices), self.devices[0].stderr[-3000:]
        return [device.notes[candidate] for device in self.devices]


class Unwatched:
    """Neither hears of an epoch nor stops a trial."""

    def report(self, epoch: Any) -> None:
        pass

    def stop_requested(self) -> bool:
        return False


@pytest.fixture(scope="module")
def trained(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """Every trial of this file: here on one device, then in one group of two processes."""
    folder = tmp_path_factory.mktemp("data-parallel")
    run = write_tiny_run(folder / "run", tiny_images)
    # AdamW divides by the gradient's size, and so turns rounding of tiny gradients into steps.
    sgd = {"optimizer": "sgd", "momentum": 0.0}
    pulled = spec_for(run, PULLED, frozen_layers=0.5, l2_sp=0.5, head_lr=3.0, **sgd)
    plain = spec_for(run, PLAIN, batch_size=13, weight_decay=0.0, **sgd)
    alike = spec_for(run, ALIKE, epochs=1)
    mixed = {"dropout": 0.3, "mixup_alpha": 0.4, "lr": 2e-3, "backbone": "timm/test_resnet"}
    jobs = [
        (another(pulled, PULLED_TWO), ""),
        (another(plain, PLAIN_TWO), ""),
        (replace(another(plain, PLAIN_PARTS), micro_batch=4), ""),
        (spec_for(run, MIXED["fp32"], precision="fp32", **mixed), ""),
        (spec_for(run, MIXED["bf16"], precision="bf16", **mixed), ""),
        (alike, ""),
        (another(alike, ALIKE_IDLE), "idle"),
        (spec_for(run, TOO_SMALL, batch_size=3), ""),  # ends the group
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOLDRACE_CACHE", str(folder / "cache"))
        for spec in (pulled, plain):
            run_trial(spec, Unwatched())
        yield Trained(run, train(jobs, folder))


def array(run: Any, candidate: str, name: str) -> Any:
    data = run.store.files.read(f"trials/{candidate}/fold0/{name}.npy")
    return np.load(io.BytesIO(data), allow_pickle=False)


SCORES = ("val_logloss", "val_calibrated_logloss")


def losses(run: Any, candidate: str, columns: Sequence[str]) -> list[list[float]]:
    text = run.store.train_log(candidate, 0)
    return [[float(row[c]) for c in columns] for row in csv.DictReader(io.StringIO(text))]


def check_alike(run: Any, found: str, expected: str, variant: str) -> None:
    """Two trials that trained and scored the same weights, or averages of them."""
    prefix, training = (
        ("ema_", ()) if variant == "ema" else ("", ("train_loss", "train_acc", "val_loss"))
    )
    columns = [*training, *(prefix + score for score in SCORES)]
    of_found, of_expected = (losses(run, candidate, columns) for candidate in (found, expected))
    np.testing.assert_allclose(of_found, of_expected, atol=2e-5)
    tensors = load(run.store.weights(found, 0, variant))
    for name, tensor in load(run.store.weights(expected, 0, variant)).items():
        torch.testing.assert_close(tensors[name], tensor, atol=2e-5, rtol=1e-4)
    suffix = "_ema" if variant == "ema" else ""
    for name in ("rows", f"oof{suffix}", f"true_prob{suffix}"):
        np.testing.assert_allclose(
            array(run, found, name), array(run, expected, name), atol=2e-3, rtol=2e-3
        )


def test_frozen_layers_and_the_pull_to_the_start_on_two_devices(trained: Trained) -> None:
    """Frozen layers get no gradient, and each device pulls its own copy of the weights."""
    trained.notes(PULLED_TWO)
    check_alike(trained.run, PULLED_TWO, PULLED, "raw")


def test_two_devices_train_like_one(trained: Trained) -> None:
    """Without anything that each device draws for itself, the same batches give the same weights:
    gradients and shares are right. An odd batch: the devices' shares differ."""
    run = trained.run
    assert [n["micro_batch"] for n in trained.notes(PLAIN_TWO)] == [[7], [7]]
    trained.notes(PLAIN_PARTS)
    for candidate in (PLAIN_TWO, PLAIN_PARTS):
        check_alike(run, candidate, PLAIN, "raw")
    rows = array(run, PLAIN_TWO, "rows")
    assert rows.tolist() == np.flatnonzero(run.store.folds().fold == 0).tolist()


@pytest.mark.parametrize(
    ("found", "expected"),
    [(PULLED_TWO, PULLED), (PLAIN_TWO, PLAIN), (PLAIN_PARTS, PLAIN)],
)
def test_two_devices_average_like_one(trained: Trained, found: str, expected: str) -> None:
    trained.notes(found)
    check_alike(trained.run, found, expected, "ema")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_devices_score_one_model(trained: Trained, precision: str) -> None:
    """Batch statistics differ by device until they are shared; raw and average alike. Each
    device draws its own dropout."""
    candidate = MIXED[precision]
    first, second = trained.notes(candidate)
    assert len(first["scored"]) == 4 and first["scored"] == second["scored"]
    assert first["train_loss"] == second["train_loss"]
    assert first["draws"] != second["draws"]
    assert first["written"] == second["written"] == [1.0]
    record = trained.run.store.trial(candidate, 0)
    assert record.status == "finished" and record.variants["raw"].rows == len(
        array(trained.run, candidate, "rows")
    )


def test_the_stored_weights_give_the_stored_rows(trained: Trained) -> None:
    from foldrace.trainables.data.loader import loader_settings
    from foldrace.trainables.data.pixel_cache import open_images
    from foldrace.trainables.predict import (
        autocast_for,
        log_probabilities,
        scoring_loader,
        unpack_classifier,
    )
    from foldrace.trainables.predict import read_model_config as card_of

    run, cpu, candidate = trained.run, torch.device("cpu"), MIXED["fp32"]
    trained.notes(candidate)
    files = [run.images / p for p in run.store.folds().image_paths]
    rows = array(run, candidate, "rows")
    for variant, name in (("raw", "oof"), ("ema", "oof_ema")):
        data = run.store.weights(candidate, 0, variant)
        loader = scoring_loader(
            open_images(files, 32, 1), rows, card_of(data), 5, loader_settings(1, "cpu")
        )
        model = unpack_classifier(data, card_of(data))
        log_prob, _ = log_probabilities(model, loader, cpu, autocast_for(cpu, "fp32"), "softmax")
        stored = array(run, candidate, name).astype(np.float32)
        np.testing.assert_allclose(log_prob, stored, atol=5e-3, rtol=2e-3)


def test_a_parameter_without_gradients(trained: Trained) -> None:
    """Devices do not wait for it; all others train as if it were not there."""
    run = trained.run
    trained.notes(ALIKE_IDLE)
    plain, found = (load(run.store.weights(c, 0, "raw")) for c in (ALIKE, ALIKE_IDLE))
    assert torch.equal(found.pop("body.idle"), torch.ones(3))
    assert found.keys() == plain.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(found[name], tensor)


def test_a_fold_too_small_for_its_devices(trained: Trained) -> None:
    assert all(ALIKE_IDLE in d.notes and TOO_SMALL not in d.notes for d in trained.devices)
    assert all(d.returncode == 1 for d in trained.devices)
    assert "2 devices need a batch of at least 4" in trained.devices[0].stderr
