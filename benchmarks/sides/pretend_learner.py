"""A learner that trains nothing: what a fold trial would leave is linked from a bank of files.

Takes hyperparameters and a fold, gives a record with the OOF files that go with it. A row's margin
is the learner's skill less the row's difficulty, plus what the backbone and the flavour each see in
it, plus noise of its own: so members differ, and blends beat the best of them. How skilled it is
depends on the hyperparameters as in practice: a valley in log lr, shallower ones in the others; far
too high a rate diverges. Each fold of a candidate has a flavour of its own.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foldrace.config.schema import SweepConfig
from foldrace.core.files import record_json
from foldrace.core.metrics import log_loss_of_true
from foldrace.run_folder.oof import npy
from foldrace.run_folder.records import CandidateRecord, TrialRecord, VariantScore
from foldrace.run_folder.store import RunStore
from foldrace.run_folder.trials import suffix

FOLDS = 5
BACKBONES = ("timm/test_vit", "timm/test_resnet", "timm/test_efficientnet", "timm/test_byobnet")
EPOCHS = 30
REPORTS = 5  # of a trial, while it runs
LEVELS, FLAVOURS = 8, 8
_BEST_LR = (3e-4, 6e-4, 1e-3, 2e-3)
_DIVERGES = 4.0  # times the best rate, on average
_SECONDS = (100.0, 140.0, 190.0, 260.0)  # of a fold trial
_VARIANTS = ("raw", "ema")


@dataclass(frozen=True)
class Ending:
    """How a fold trial ends."""

    record: TrialRecord
    sources: Mapping[str, Path]
    """File name in the trial's folder -> file of the bank."""

    def write(self, store: RunStore) -> None:
        """As a worker leaves it, `trial.json` last."""
        folder = Path(store.root) / store.trial_folder(self.record.candidate, self.record.fold)
        folder.mkdir(parents=True, exist_ok=True)
        for name, source in self.sources.items():
            (folder / name).unlink(missing_ok=True)
            os.link(source, folder / name)
        (folder / "trial.json").write_bytes(record_json(self.record))


def run_config(candidates: int, rule: str = "gain") -> SweepConfig:
    """Seven shared hyperparameters, and a range of the learning rate for one backbone alone."""
    settings = {
        "name": "controller",
        "data": {"train": "train.csv"},
        "folds": {"k": FOLDS},
        "search": {
            "backbones": BACKBONES,
            "candidates": candidates,
            "space": {"lr": {"low": 1e-5, "high": 1e-2, "log": True}},
            "per_backbone": {BACKBONES[3]: {"lr": {"low": 1e-4, "high": 3e-2, "log": True}}},
        },
        "race": {"rule": rule, "epoch_stopping": False},
        "training": {"pretrained": False, "epochs": EPOCHS},
    }
    return SweepConfig.model_validate_json(json.dumps(settings))


def make_run(root: Path, config: SweepConfig, rows: int, classes: int) -> RunStore:
    """A run folder with nothing trained yet: folds and classes take turns."""
    lines = [f"{row}.png,class{row % classes},,{row // classes % FOLDS}" for row in range(rows)]
    store = RunStore(root)
    names = sorted(f"class{label}" for label in range(classes))
    store.create(config, "\n".join(["image_path,target,group,fold", *lines, ""]), names)
    return store


class Learner:
    """The bank, once it is made."""

    def __init__(self, bank: Path) -> None:
        self._bank = bank
        self._scores: dict[str, list[list[float]]] = json.loads((bank / "scores.json").read_text())
        kinds = [item.split("-") for item in self._scores]
        self._levels = len({level for _, level, _ in kinds})
        self._flavours = len({flavour for _, _, flavour in kinds})

    def seconds(self, record: CandidateRecord, fold: int) -> float:
        """How long the fold trial takes."""
        spread = np.random.default_rng((int(record.candidate[1:]), fold, 1)).lognormal(0.0, 0.2)
        return float(_SECONDS[BACKBONES.index(record.backbone)] * spread)

    def ending(self, record: CandidateRecord, fold: int, folds_hash: str) -> Ending:
        """How it ends."""
        rng = np.random.default_rng((int(record.candidate[1:]), fold, 0))
        level = _level(record, rng)
        flavour = int(rng.integers(self._flavours))
        kept = _VARIANTS if math.isfinite(level) else ()
        items = {
            v: self._item(record, level + shift, flavour)
            for v, shift in zip(kept, (0.0, -0.4), strict=False)
        }
        scores = {v: self._scores[item][fold] for v, item in items.items()}
        ended = TrialRecord(
            candidate=record.candidate,
            fold=fold,
            status="finished" if items else "diverged",
            backbone=record.backbone,
            params=record.params,
            folds_hash=folds_hash,
            seed=fold,
            variants={
                v: VariantScore(
                    rows=int(n),
                    val_logloss=loss,
                    calibrated_logloss=loss,
                    val_acc=acc,
                    epoch=EPOCHS - 1,
                )
                for v, (n, loss, acc) in scores.items()
            },
            epochs_trained=EPOCHS if items else 3,
            seconds=self.seconds(record, fold),
            node="pretend",
            device="none",
            error=None if items else "the loss is not finite",
        )
        return Ending(ended, self._sources(items, fold))

    def _item(self, record: CandidateRecord, level: float, flavour: int) -> str:
        step = min(max(round(level), 0), self._levels - 1)
        return f"b{BACKBONES.index(record.backbone)}-l{step}-f{flavour}"

    def _sources(self, items: Mapping[str, str], fold: int) -> dict[str, Path]:
        if not items:
            return {}
        sources = {"rows.npy": self._bank / f"rows{fold}.npy"}
        for variant, item in items.items():
            for name in ("oof", "true_prob"):
                sources[f"{name}{suffix(variant)}.npy"] = self._bank / f"{item}-{name}{fold}.npy"
        return sources


def _level(record: CandidateRecord, rng: np.random.Generator) -> float:
    """0 is the best; infinite where training diverges."""
    backbone, params = BACKBONES.index(record.backbone), record.params
    away = math.log10(float(params["lr"]) / _BEST_LR[backbone])
    if away > math.log10(_DIVERGES) + rng.normal(0.0, 0.2):
        return math.inf
    others = (
        8.0 * (float(params["dropout"]) - 0.2) ** 2
        + 6.0 * (float(params["warmup"]) - 0.1) ** 2
        + 0.5 * math.log10(float(params["weight_decay"]) / 0.03) ** 2
    )
    return 0.4 * backbone + 3.0 * away**2 + others + float(rng.normal(0.0, 0.3))


def make_bank(bank: Path, store: RunStore, levels: int = LEVELS, flavours: int = FLAVOURS) -> None:
    """Every backbone, level and flavour, each with its files for all folds."""
    bank.mkdir(parents=True)
    fold, labels, classes = store.folds().fold, store.labels(), len(store.classes())
    rng = np.random.default_rng(0)
    rows = [np.flatnonzero(fold == k) for k in range(FOLDS)]
    for k, own in enumerate(rows):
        (bank / f"rows{k}.npy").write_bytes(npy(own.astype(np.int64)))
    difficulty = rng.normal(0.0, 2.0, len(fold))
    sees = rng.normal(0.0, 1.0, (len(BACKBONES) + flavours, len(fold)))
    scores: dict[str, list[list[float]]] = {}
    for b in range(len(BACKBONES)):
        for f in range(flavours):
            margin = 0.8 * sees[b] + 0.6 * sees[len(BACKBONES) + f] - difficulty
            for level in range(levels):
                noise = rng.normal(0.0, 0.6, len(fold))
                log_prob = _log_prob(margin + 4.5 - 0.45 * level + noise, labels, classes, rng)
                scores[f"b{b}-l{level}-f{f}"] = [
                    _write(bank / f"b{b}-l{level}-f{f}", k, log_prob[own], labels[own])
                    for k, own in enumerate(rows)
                ]
    (bank / "scores.json").write_text(json.dumps(scores))


def _log_prob(
    margin: NDArray[np.float64], labels: NDArray[np.int64], classes: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    """(N, C) natural-log probabilities."""
    logits = rng.standard_normal((len(labels), classes), dtype=np.float32)
    logits[np.arange(len(labels)), labels] += margin.astype(np.float32)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits


def _write(
    item: Path, fold: int, log_prob: NDArray[np.float32], labels: NDArray[np.int64]
) -> list[float]:
    """The two files of a fold; gives rows, log loss and accuracy."""
    true = np.exp(log_prob[np.arange(len(labels)), labels]).clip(0.0, 1.0)
    item.with_name(f"{item.name}-oof{fold}.npy").write_bytes(npy(log_prob.astype(np.float16)))
    item.with_name(f"{item.name}-true_prob{fold}.npy").write_bytes(npy(true.astype(np.float32)))
    hits = float((log_prob.argmax(axis=1) == labels).mean())
    return [len(labels), log_loss_of_true(true.astype(np.float64)), hits]
