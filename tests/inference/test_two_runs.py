"""Runs whose plugins have the same names and do other things, in one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from foldrace.core.consent import allow_run
from foldrace.core.plugin_files import PluginFile
from foldrace.inference.plugins import run_parts
from foldrace.inference.predictor import Predictor
from foldrace.run_folder.blend_records import EnsembleRecord, MemberRecord
from foldrace.run_folder.records import CandidateRecord, TrialRecord
from foldrace.run_folder.store import RunStore
from foldrace.trainables.models.classifier import ModelConfig, build_classifier
from foldrace.trainables.predict import pack_weights

PLUGIN = """
import torch
from torch import nn

from foldrace.parts import Encoder, Family, Head, MetaFeature, Normalise, TTA
from own_factor import FACTOR


class Mean(nn.Module):
    def forward(self, images):
        return FACTOR * images.mean((2, 3))


class Scaled(nn.Linear):
    def forward(self, features):
        return FACTOR * super().forward(features)


def build(name, pretrained, drop_path, image_size):
    return Encoder(Mean(), 3, Normalise((0.0,) * 3, (1.0,) * 3))


PARTS = [
    Family("mine", lambda: ["mean"], build),
    Head("own", "", lambda features, classes, dropout: Scaled(features, classes)),
    MetaFeature("own", "", 1, lambda image: (FACTOR,)),
    TTA("own", "", (lambda images: images + FACTOR,)),
]
"""
FACTORS = (0.5, 2.0)
CONFIG = ModelConfig("mine/mean", 3, 32, head="own", meta=("own",))


def _run(make_tiny_run: Callable[..., Any], factor: float) -> RunStore:
    """A blend of one untrained candidate, with the same weights whatever the factor is."""
    sources = {"own_factor": f"FACTOR = {factor}\nPARTS = []\n", "own_parts": PLUGIN}
    plugins = [PluginFile(name, text.encode(), name) for name, text in sources.items()]
    store: RunStore = make_tiny_run(f"run-{factor}", k=2, plugins=plugins).store
    config = store.config()
    training = config.training.model_copy(update={"meta_features": CONFIG.meta})
    store.save_config(config.model_copy(update={"training": training}))
    store.save_candidate(CandidateRecord(candidate="c0000", backbone="mine/mean", params={}))
    torch.manual_seed(0)
    model = build_classifier(CONFIG, parts=run_parts(store))
    for fold in range(2):
        store.save_trial(
            TrialRecord(
                candidate="c0000", fold=fold, status="finished", backbone="mine/mean",
                params={"image_size": 32, "head": "own"}, folds_hash=store.folds().hash, seed=0,
            ),
            weights={"raw": pack_weights(model.state_dict(), CONFIG)},
        )  # fmt: skip
    store.blend.update(
        EnsembleRecord(
            method="greedy",
            members=(MemberRecord(candidate="c0000", variant="raw", weight=1.0),),
            oof_logloss=1, crossfit_logloss=1, crossfit_se=0, certificate=0,
            best_single_oof_logloss=1, best_single="c0000 raw", oof_accuracy=0.5,
            single_crossfit_logloss=1, members_considered=1, candidates_considered=1,
            folds_hash=store.folds().hash,
        )
    )  # fmt: skip
    return store


@pytest.fixture
def runs(make_tiny_run: Callable[..., Any]) -> list[RunStore]:
    return [_run(make_tiny_run, factor) for factor in FACTORS]


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    files = [tmp_path / f"{i}.png" for i in range(4)]
    for i, file in enumerate(files):
        Image.fromarray(np.full((32, 32, 3), (60 * i, 200, 40), np.uint8)).save(file)
    return files


def by_hand(store: RunStore, files: list[Path], factor: float) -> NDArray[np.float64]:
    """Closed form of the plugin's model on images of one colour; both folds have it."""
    torch.manual_seed(0)
    head = build_classifier(CONFIG, parts=run_parts(store)).head
    weight, bias = (p.detach().double().numpy() for p in head.parameters())
    colours = np.array([np.asarray(Image.open(file))[0, 0] / 255.0 for file in files])
    features = np.column_stack([factor * (colours + factor), np.full(len(files), factor)])
    scores = np.exp(factor * (features @ weight.T + bias))
    return scores / scores.sum(axis=1, keepdims=True)


def test_two_predictors_in_two_threads_give_what_each_gives_alone(
    runs: list[RunStore], images: list[Path]
) -> None:
    alone = [Predictor(run, tta="own").probabilities(images) for run in runs]
    for run, factor, found in zip(runs, FACTORS, alone, strict=True):
        np.testing.assert_allclose(found, by_hand(run, images, factor), rtol=0, atol=1e-5)
    assert np.abs(alone[0] - alone[1]).max() > 0.1
    together = threading.Barrier(2)

    def often(run: RunStore) -> list[NDArray[np.float64]]:
        found = []
        for _ in range(5):
            together.wait(timeout=60)
            found.append(Predictor(run, tta="own").probabilities(images))
        return found

    with ThreadPoolExecutor(2) as pool:
        for expected, found in zip(alone, pool.map(often, runs), strict=True):
            for each in found:
                np.testing.assert_array_equal(each, expected)


def test_a_blend_of_both_runs_uses_the_plugins_of_each(
    runs: list[RunStore], images: list[Path]
) -> None:
    """Test-time augmentation is of the run that blends; it comes first in either model."""
    first, second = runs
    allow_run(first.root, second.root)
    record = first.blend.record()
    assert record is not None
    members = [
        MemberRecord(candidate="c0000", variant="raw", weight=0.5, run=run)
        for run in ("", second.root)
    ]
    first.blend.update(record.model_copy(update={"members": tuple(members)}))
    found = Predictor(first).probabilities(images)
    alone = []
    for store, member in zip(runs, members, strict=True):
        one = member.model_copy(update={"weight": 1.0, "run": ""})
        store.blend.update(record.model_copy(update={"members": (one,)}))
        alone.append(Predictor(store).probabilities(images))
    np.testing.assert_allclose(found, (alone[0] + alone[1]) / 2, rtol=0, atol=1e-6)
