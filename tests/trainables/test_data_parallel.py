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
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load

from foldrace.trainables.spec import TrialSpec
from tests.trainables.written_trials import another, written_trial

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 240.0  # seconds; only a fault takes so long


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
    """How a process of the group ended."""

    returncode: int
    notes: dict[str, list[float]]
    stderr: str


def train(spec: TrialSpec, devices: int, folder: Path, what: str = "") -> list[Device]:
    """The trial's processes, all started and all ended; one that fails ends the others, as Ray
    Train sees to it."""
    folder.mkdir()
    (folder / "spec.pkl").write_bytes(pickle.dumps(spec))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(devices)}
    script = Path(__file__).with_name("one_of_several.py")
    notes = [folder / f"notes{rank}.json" for rank in range(devices)]
    started = [
        subprocess.Popen(
            [sys.executable, script, folder / "spec.pkl", what, notes[rank]],
            env=os.environ | group | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(devices),
                "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
            },
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(devices)
    ]  # fmt: skip
    errors = [process.communicate(timeout=DEADLINE)[1] for process in started]
    return [
        Device(p.returncode, json.loads(n.read_text()) if n.exists() else {}, error)
        for p, n, error in zip(started, notes, errors, strict=True)
    ]


def ended_well(devices: list[Device]) -> list[dict[str, list[float]]]:
    assert [d.returncode for d in devices] == [0] * len(devices), devices[0].stderr[-3000:]
    return [device.notes for device in devices]


def array(run: Any, candidate: str, name: str) -> Any:
    data = run.store.files.read(f"trials/{candidate}/fold0/{name}.npy")
    return np.load(io.BytesIO(data), allow_pickle=False)


def losses(run: Any, candidate: str) -> list[list[float]]:
    text = run.store.train_log(candidate, 0)
    variants = ("val_logloss", "val_calibrated_logloss")
    columns = ("train_loss", "train_acc", "val_loss", *variants, *(f"ema_{v}" for v in variants))
    return [[float(row[c]) for c in columns] for row in csv.DictReader(io.StringIO(text))]


def test_frozen_layers_and_the_pull_to_the_start_on_two_devices(
    make_tiny_run: Callable[..., Any], tmp_path: Path
) -> None:
    """Frozen layers get no gradient, and each device pulls its own copy of the weights."""
    run = make_tiny_run()
    sgd = {"optimizer": "sgd", "momentum": 0.0}
    one = spec_for(run, "c0001", frozen_layers=0.5, l2_sp=0.5, head_lr=3.0, **sgd)
    two = another(one, "c0002")
    ended_well(train(one, 1, tmp_path / "one"))
    ended_well(train(two, 2, tmp_path / "two"))
    np.testing.assert_allclose(losses(run, "c0002"), losses(run, "c0001"), atol=2e-5)
    found = load(run.store.weights("c0002", 0, "raw"))
    for name, tensor in load(run.store.weights("c0001", 0, "raw")).items():
        torch.testing.assert_close(found[name], tensor, atol=2e-5, rtol=1e-4)


def test_two_devices_train_like_one(make_tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    """Without anything that each device draws for itself, the same batches give the same weights:
    gradients and shares are right. An odd batch: the devices' shares differ."""
    run = make_tiny_run()
    # AdamW divides by the gradient's size, and so turns rounding of tiny gradients into steps.
    sgd = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0}
    one = spec_for(run, "c0001", batch_size=13, **sgd)
    two = another(one, "c0002")
    parts = replace(another(one, "c0003"), micro_batch=4)
    ended_well(train(one, 1, tmp_path / "one"))
    notes = ended_well(train(two, 2, tmp_path / "two"))
    assert [n["micro_batch"] for n in notes] == [[7], [7]]
    ended_well(train(parts, 2, tmp_path / "parts"))
    expected = {v: load(run.store.weights("c0001", 0, v)) for v in ("raw", "ema")}
    for candidate in ("c0002", "c0003"):
        np.testing.assert_allclose(losses(run, candidate), losses(run, "c0001"), atol=2e-5)
        for variant, tensors in expected.items():
            found = load(run.store.weights(candidate, 0, variant))
            for name, tensor in tensors.items():
                torch.testing.assert_close(found[name], tensor, atol=2e-5, rtol=1e-4)
        for name in ("rows", "oof", "oof_ema", "true_prob", "true_prob_ema"):
            np.testing.assert_allclose(
                array(run, candidate, name), array(run, "c0001", name), atol=2e-3, rtol=2e-3
            )
    rows = array(run, "c0002", "rows")
    assert rows.tolist() == np.flatnonzero(run.store.folds().fold == 0).tolist()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_devices_score_one_model(
    make_tiny_run: Callable[..., Any], tmp_path: Path, precision: str
) -> None:
    """Batch statistics differ by device until they are shared; raw and average alike. Each
    device draws its own dropout."""
    run = make_tiny_run()
    spec = spec_for(
        run, backbone="timm/test_resnet", precision=precision, dropout=0.3, mixup_alpha=0.4, lr=2e-3
    )
    first, second = ended_well(train(spec, 2, tmp_path / "two"))
    assert len(first["scored"]) == 4 and first["scored"] == second["scored"]
    assert first["train_loss"] == second["train_loss"]
    assert first["draws"] != second["draws"]
    assert first["written"] == second["written"] == [1.0]
    record = run.store.trial("c0000", 0)
    assert record.status == "finished" and record.variants["raw"].rows == len(
        array(run, "c0000", "rows")
    )


def test_the_stored_weights_give_the_stored_rows(
    make_tiny_run: Callable[..., Any], tmp_path: Path
) -> None:
    from foldrace.trainables.data.loader import loader_settings
    from foldrace.trainables.data.pixel_cache import open_images
    from foldrace.trainables.predict import (
        autocast_for,
        log_probabilities,
        scoring_loader,
        unpack_classifier,
    )
    from foldrace.trainables.predict import read_model_config as card_of

    run, cpu = make_tiny_run(), torch.device("cpu")
    ended_well(train(spec_for(run, backbone="timm/test_resnet"), 2, tmp_path / "two"))
    files = [run.images / p for p in run.store.folds().image_paths]
    rows = array(run, "c0000", "rows")
    for variant, name in (("raw", "oof"), ("ema", "oof_ema")):
        data = run.store.weights("c0000", 0, variant)
        loader = scoring_loader(
            open_images(files, 32, 1), rows, card_of(data), 5, loader_settings(1, "cpu")
        )
        model = unpack_classifier(data, card_of(data))
        log_prob, _ = log_probabilities(model, loader, cpu, autocast_for(cpu, "fp32"), "softmax")
        stored = array(run, "c0000", name).astype(np.float32)
        np.testing.assert_allclose(log_prob, stored, atol=5e-3, rtol=2e-3)


def test_a_parameter_without_gradients(make_tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    """Devices do not wait for it; all others train as if it were not there."""
    run = make_tiny_run()
    spec = spec_for(run, "c0001", epochs=1)
    ended_well(train(spec, 2, tmp_path / "two"))
    ended_well(train(another(spec, "c0002"), 2, tmp_path / "idle", "idle"))
    plain, found = (load(run.store.weights(c, 0, "raw")) for c in ("c0001", "c0002"))
    assert torch.equal(found.pop("body.idle"), torch.ones(3))
    assert found.keys() == plain.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(found[name], tensor)


def test_a_fold_too_small_for_its_devices(
    make_tiny_run: Callable[..., Any], tmp_path: Path
) -> None:
    devices = train(spec_for(make_tiny_run(), batch_size=3), 2, tmp_path / "two")
    assert all(d.returncode == 1 for d in devices)
    assert "2 devices need a batch of at least 4" in devices[0].stderr
