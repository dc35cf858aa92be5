"""A run folder over the tiny images, its OOF rows and blend written by hand: what the models would
say is known, and some rows are said to be of another class than their label."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from foldrace.core.metrics import accuracy, log_loss
from foldrace.run_folder.blend_records import EnsembleRecord, MemberRecord
from foldrace.run_folder.records import CandidateRecord, Oof, TrialRecord, VariantScore
from foldrace.run_folder.store import RunStore
from foldrace.trainables.models.classifier import ModelConfig, build_classifier
from foldrace.trainables.predict import pack_weights

WEIGHTS = (0.7, 0.3)
_BACKBONES = {"c0000": "test_resnet", "c0001": "test_efficientnet"}
WRONG = (3, 17, 24, 41, 58)
"""Rows that every member is sure are of the next class."""


@dataclass(frozen=True)
class OofRun:
    store: RunStore
    labels: NDArray[np.int64]
    prob: tuple[NDArray[np.float64], ...]
    """(n, C) of each member, as stored: rounded to float16 logarithms."""

    @property
    def blend(self) -> NDArray[np.float64]:
        return np.asarray(sum(w * p for w, p in zip(WEIGHTS, self.prob, strict=True)))


@pytest.fixture
def oof_run(make_tiny_run: Callable[..., Any]) -> OofRun:
    return write_oof(make_tiny_run("run").store)


def write_oof(store: RunStore, seed: int = 0, with_models: bool = False) -> OofRun:
    """Two members on a run's rows, and their blend."""
    rng = np.random.default_rng(seed)
    labels, n_classes = store.labels(), len(store.classes())
    said = labels.copy()
    said[list(WRONG)] = (said[list(WRONG)] + 1) % n_classes
    stored = []
    for number in range(len(WEIGHTS)):
        logits = 4.0 * np.eye(n_classes)[said] + 0.5 * rng.normal(size=(len(labels), n_classes))
        prob = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        stored.append(np.exp(np.log(prob).astype(np.float16).astype(np.float64)))
        _save(store, f"c{number:04d}", prob, labels, with_models)
    run = OofRun(store, labels, tuple(stored))
    store.blend.save(_record(store, run), "round,candidate\n", np.log(run.blend).astype(np.float16))
    return run


@pytest.fixture
def model_run(make_tiny_run: Callable[..., Any]) -> RunStore:
    """A run whose two members have models, untrained but far from indifferent."""
    store: RunStore = make_tiny_run("run", k=2).store
    write_oof(store, with_models=True)
    return store


def _weights(store: RunStore, name: str, fold: int) -> bytes:
    torch.manual_seed(100 * fold + int(name[1:]))
    config = ModelConfig(f"timm/{_BACKBONES[name]}", len(store.classes()), 32)
    model = build_classifier(config)
    for parameter in model.head.parameters():
        parameter.data.mul_(4)
    return pack_weights(model.state_dict(), config)


def _save(
    store: RunStore,
    name: str,
    prob: NDArray[np.float64],
    labels: NDArray[np.int64],
    models: bool,
) -> None:
    record = CandidateRecord(candidate=name, backbone=f"timm/{_BACKBONES[name]}", params={})
    store.save_candidate(record)
    for fold in range(store.fold_count):
        rows = store.folds().rows_of(fold)
        loss = log_loss(prob[rows], labels[rows])
        score = VariantScore(
            rows=len(rows), val_logloss=loss, calibrated_logloss=loss,
            val_acc=accuracy(prob[rows], labels[rows]), epoch=0,
        )  # fmt: skip
        true = prob[rows, labels[rows]].astype(np.float32)
        store.save_trial(
            TrialRecord(
                candidate=name, fold=fold, status="finished", backbone=record.backbone,
                params={"image_size": 32},
                folds_hash=store.folds().hash, seed=0, variants={"raw": score},
            ),
            {"raw": Oof(np.log(prob[rows]).astype(np.float16), true)},
            rows,
            {"raw": _weights(store, name, fold)} if models else None,
        )  # fmt: skip


def _record(store: RunStore, run: OofRun) -> EnsembleRecord:
    loss = log_loss(run.blend, run.labels)
    return EnsembleRecord(
        method="greedy",
        members=tuple(
            MemberRecord(candidate=f"c{i:04d}", variant="raw", weight=w)
            for i, w in enumerate(WEIGHTS)
        ),
        oof_logloss=loss, crossfit_logloss=loss, crossfit_se=0.01, certificate=0.0,
        best_single_oof_logloss=loss, best_single="c0000 raw", oof_accuracy=0.9,
        single_crossfit_logloss=loss, members_considered=2, candidates_considered=2,
        folds_hash=store.folds().hash,
    )  # fmt: skip
