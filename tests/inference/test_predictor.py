"""The blend's probabilities, against a recomputation by hand from the weights files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file

from experiment.errors import RunFolderError
from experiment.records import CandidateRecord, EnsembleRecord, MemberRecord, TrialRecord
from experiment.store import RunStore
from inference.predictor import Predictor
from trainables.card import ModelCard
from trainables.classifier import build_classifier
from trainables.predict import pack_weights, resolve_precision

K = 2
MEMBERS = (("c0000", "raw", 0.7), ("c0001", "ema", 0.3))
BACKBONES = {"c0000": ("test_resnet", 32), "c0001": ("test_efficientnet", 48)}
SUFFIX = {"raw": "", "ema": "_ema"}


@pytest.fixture
def blend(make_tiny_run: Callable[..., Any]) -> RunStore:
    """Untrained models of two candidates; only the members' weights exist."""
    store: RunStore = make_tiny_run("run", k=K).store
    for name, variant, _ in MEMBERS:
        backbone, size = BACKBONES[name]
        record = CandidateRecord(candidate=name, backbone=f"timm/{backbone}", params={})
        store.save_candidate(record)
        for fold in range(K):
            torch.manual_seed(100 * fold + size)
            card = ModelCard(f"timm/{backbone}", 3, size)
            model = build_classifier(card, dropout=0.3)
            for parameter in model.head.parameters():  # a fresh head is nearly indifferent
                parameter.data.mul_(4)
            store.save_trial(
                TrialRecord(
                    candidate=name, fold=fold, status="finished", backbone=f"timm/{backbone}",
                    params={}, folds_hash=store.folds().hash, seed=0,
                ),
                weights={variant: pack_weights(model.state_dict(), card)},
            )  # fmt: skip
    store.blend.update(
        EnsembleRecord(
            method="greedy",
            members=tuple(MemberRecord(candidate=c, variant=v, weight=w) for c, v, w in MEMBERS),
            oof_logloss=1, crossfit_logloss=1, crossfit_se=0, certificate=0,
            best_single_oof_logloss=1, best_single="c0000 raw", oof_accuracy=0.5,
            last_fold_logloss=1, members_considered=2, candidates_considered=2,
            folds_hash=store.folds().hash,
        )
    )  # fmt: skip
    return store


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Three images of 32 x 32 pixels."""
    rng = np.random.default_rng(3)
    files = [tmp_path / f"사진 {i}.png" for i in range(3)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
    return files


def by_hand(store: RunStore, files: list[Path]) -> NDArray[np.float64]:
    """Softmax of each fold's model, the mean over folds, the weighted mean over members."""
    blended = np.zeros((len(files), 3))
    for name, variant, weight in MEMBERS:
        backbone, size = BACKBONES[name]
        per_fold = []
        for fold in range(K):
            path = Path(store.root) / f"trials/{name}/fold{fold}/best{SUFFIX[variant]}.safetensors"
            state = {k: torch.from_numpy(v.copy()) for k, v in load_file(path).items()}
            body = timm.create_model(backbone, num_classes=0)
            body.load_state_dict(
                {k.removeprefix("body."): v for k, v in state.items() if k.startswith("body.")}
            )
            [weights] = [v for k, v in state.items() if k.startswith("head") and v.ndim == 2]
            [bias] = [v for k, v in state.items() if k.startswith("head") and v.ndim == 1]
            mean, std = (np.array(body.pretrained_cfg[key]) for key in ("mean", "std"))
            pixels = [np.asarray(Image.open(file)) for file in files]
            batch = np.stack([cv2.resize(p, (size, size)) for p in pixels]) / 255.0
            tensor = torch.from_numpy(((batch - mean) / std).transpose(0, 3, 1, 2)).float()
            with torch.no_grad():
                logits = (body.eval()(tensor) @ weights.T + bias).double().numpy()
            per_fold.append(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))
        blended += weight * np.mean(per_fold, axis=0)
    return blended


def test_mean_over_folds_then_blend(blend: RunStore, images: list[Path]) -> None:
    done: list[int] = []
    predictor = Predictor(blend)
    prob = predictor.probabilities(images, done.append)
    np.testing.assert_allclose(prob, by_hand(blend, images), atol=2e-6)
    np.testing.assert_allclose(prob.sum(axis=1), 1, atol=1e-12)
    assert np.ptp(prob, axis=0).max() > 1e-4  # the images do differ
    assert done == [1, 2, 3, 4] and predictor.models == 4
    assert predictor.classes == ("blue", "green", "red")


def test_a_row_does_not_depend_on_its_neighbours(blend: RunStore, images: list[Path]) -> None:
    together = Predictor(blend).probabilities([*images, images[0]])
    alone = Predictor(blend).probabilities([images[2]])
    np.testing.assert_allclose(together[2], alone[0], atol=1e-6)
    np.testing.assert_allclose(together[3], together[0], atol=1e-6)


def test_a_run_without_a_blend(make_tiny_run: Callable[..., Any]) -> None:
    with pytest.raises(RunFolderError, match="no blend yet"):
        Predictor(make_tiny_run("empty").store)


@pytest.mark.parametrize("damage", ["missing", "torn", "no header"])
def test_unusable_weights_are_named(blend: RunStore, images: list[Path], damage: str) -> None:
    path = Path(blend.root) / "trials/c0001/fold1/best_ema.safetensors"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100] if damage == "torn" else b"")
    with pytest.raises(RunFolderError, match=r"trials/c0001/fold1/best_ema\.safetensors"):
        Predictor(blend).probabilities(images)


def test_a_model_is_predicted_as_it_was_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU without bf16 `auto` means fp16, but fp32 for what SAM has trained."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    gpu = torch.device("cuda")
    assert resolve_precision(gpu, "auto", sam_rho=0.0) == "fp16"
    assert resolve_precision(gpu, "auto", sam_rho=0.05) == "fp32"
    assert resolve_precision(gpu, "bf16", sam_rho=0.05) == "bf16"


@pytest.mark.parametrize(("sam_rho", "half"), [(0.0, True), (0.05, False)])
def test_the_precision_follows_the_members_own_trial(
    blend: RunStore, sam_rho: float, half: bool
) -> None:
    trial = blend.trial("c0001", 1)
    assert trial is not None
    blend.save_trial(trial.model_copy(update={"params": {"sam_rho": sam_rho}}))
    predictor = Predictor(blend)
    predictor._precision = "fp16"
    found = predictor._autocast(predictor.ensemble.members[1], 1)
    assert found._enabled is half
