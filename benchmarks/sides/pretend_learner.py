"""A learner that trains nothing: what a fold trial would leave is linked from a bank of files.

Takes hyperparameters and a fold, gives a record with the OOF files that go with it. A row's margin
is the learner's skill less the row's difficulty, plus what the backbone and the flavour each see in
it, plus noise of its own: so members differ, and blends beat the best of them. How skilled it is
depends on the hyperparameters as in practice: a valley in log lr, shallower ones in the others; far
too high a rate diverges. Each fold of a candidate has a flavour of its own. After `RUNG` epochs it
is as good as a learner of the next level below will be at its end.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foldrace.config.schema import SweepConfig
from foldrace.core.files import record_json
from foldrace.core.metrics import log_loss_of_true
from foldrace.run_folder.oof import columns_file, npy
from foldrace.run_folder.records import CandidateRecord, TrialRecord, VariantScore
from foldrace.run_folder.store import RunStore
from foldrace.run_folder.trials import suffix
from foldrace.trainables.spec import EpochReport

FOLDS = 5
BACKBONES = ("timm/test_vit", "timm/test_resnet", "timm/test_efficientnet", "timm/test_byobnet")
EPOCHS = 30
RUNG = 15  # epochs: the one rung of the default race
REPORTED = (5, 10, RUNG, 20, 25, EPOCHS)  # numbers of epochs of which Tune hears
LEVELS, FLAVOURS = 8, 8
_BEST_LR = (3e-4, 6e-4, 1e-3, 2e-3)
_DIVERGES = 4.0  # times the best rate, on average
_SECONDS = (100.0, 140.0, 190.0, 260.0)  # of a fold trial
_SHIFTS = {"raw": 0.0, "ema": -0.4}  # variant -> levels
_VARIANTS = tuple(_SHIFTS)
_BEHIND = 1.0  # levels, at the rung
_STATE = b"the state of a training"


@dataclass(frozen=True)
class Ending:
    """How a fold trial goes on and ends."""

    record: TrialRecord
    log: tuple[EpochReport, ...]
    sources: Mapping[str, Path]
    """File name in the trial's folder -> file of the bank."""
    at_rung: Mapping[str, Path]
    """Variant -> file of the bank with its column at the rung."""

    def write(self, store: RunStore) -> None:
        """As a worker leaves it, `trial.json` last."""
        folder = self._folder(store)
        for name, source in self.sources.items():
            (folder / name).unlink(missing_ok=True)
            os.link(source, folder / name)
        (folder / "train_log.csv").write_text(_log_csv(self.log))
        (folder / "trial.json").write_bytes(record_json(self.record))
        (folder / "resume.pt").unlink(missing_ok=True)

    def write_rung(self, store: RunStore) -> None:
        """What a worker has in the run folder when it reports the rung."""
        folder = self._folder(store)
        columns = {variant: np.load(file) for variant, file in self.at_rung.items()}
        (folder / "resume.pt").write_bytes(_STATE)
        (folder / "train_log.csv").write_text(_log_csv(self.log[:RUNG]))
        (folder / f"rung{RUNG}.safetensors").write_bytes(columns_file((), columns))

    def _folder(self, store: RunStore) -> Path:
        folder = Path(store.root) / store.trial_folder(self.record.candidate, self.record.fold)
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def _log_csv(log: Sequence[EpochReport]) -> str:
    header = ",".join(field.name for field in fields(EpochReport))
    lines = (",".join(map(str, asdict(line).values())) for line in log)
    return "\n".join([header, *lines, ""])


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
        "race": {"rule": rule},
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
        items, before = (self._items(record, level + more, flavour) for more in (0.0, _BEHIND))
        scores = {v: self._scores[item][fold] for v, item in items.items()}
        at_rung = {v: self._scores[item][fold][1] for v, item in before.items()}
        seconds = self.seconds(record, fold)
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
            seconds=seconds,
            node="pretend",
            device="none",
            error=None if items else "the loss is not finite",
        )
        log = _log(at_rung, {v: loss for v, (_, loss, _) in scores.items()}, seconds / EPOCHS)
        columns = {v: self._bank / f"{item}-true_prob{fold}.npy" for v, item in before.items()}
        return Ending(ended, log, self._sources(items, fold), columns)

    def _items(self, record: CandidateRecord, level: float, flavour: int) -> dict[str, str]:
        """Variant -> its item in the bank; none where training diverges."""
        if not math.isfinite(level):
            return {}
        place = BACKBONES.index(record.backbone)
        return {v: f"b{place}-l{self._step(level + _SHIFTS[v])}-f{flavour}" for v in _VARIANTS}

    def _step(self, level: float) -> int:
        return min(max(round(level), 0), self._levels - 1)

    def _sources(self, items: Mapping[str, str], fold: int) -> dict[str, Path]:
        if not items:
            return {}
        sources = {"rows.npy": self._bank / f"rows{fold}.npy"}
        for variant, item in items.items():
            for name in ("oof", "true_prob"):
                sources[f"{name}{suffix(variant)}.npy"] = self._bank / f"{item}-{name}{fold}.npy"
        return sources


def _log(
    at_rung: Mapping[str, float], at_end: Mapping[str, float], seconds: float
) -> tuple[EpochReport, ...]:
    """Losses on straight lines through the one at the rung and the last one."""
    if not at_end:
        return tuple(_line(epoch, math.nan, math.nan, seconds) for epoch in range(3))
    lines = []
    for epoch in range(EPOCHS):
        part = (epoch + 1) / RUNG - 1.0  # 0 at the rung, 1 at the end
        known = {v: loss + part * (at_end[v] - loss) for v, loss in at_rung.items()}
        lines.append(_line(epoch, known["raw"], known["ema"], seconds))
    return tuple(lines)


def _line(epoch: int, raw: float, ema: float, seconds: float) -> EpochReport:
    return EpochReport(epoch, raw, 0.5, raw, 0.5, raw, raw, 0.5, ema, ema, 1e-3, seconds)


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
