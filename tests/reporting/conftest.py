"""A small but real run folder, written through `RunStore`: random predictions that know a little
about the labels, some candidates that failed, a blend by hand; and races of any size, played by
dice."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from foldrace.config.schema import DataConfig, FoldsConfig, SearchConfig, SweepConfig
from foldrace.core.metrics import accuracy, log_loss
from foldrace.run_folder.blend_records import EnsembleRecord, MemberRecord
from foldrace.run_folder.records import (
    CandidateRecord,
    CandidateSummary,
    Oof,
    RaceAction,
    RaceDecision,
    TrialRecord,
    TrialStatus,
    VariantScore,
    summarise,
)
from foldrace.run_folder.store import RunStore
from tests.ensemble.temperature_reference import smoothed_temperature

BACKBONES = ("torchvision/convnext_tiny", "timm/caformer_b36.sail_in22k", "timm/resnet18.a1_in1k")
KOREAN = ("고양이", "강아지", "<script>alert('x')</script>", 'a "quoted" & $5$ one')


@dataclass(frozen=True)
class Run:
    """The folder and the arrays that went into it."""

    store: RunStore
    labels: NDArray[np.int64]  # (N,) of the scored rows
    prob: dict[str, NDArray[np.float64]]  # complete candidate -> (N, C)
    blend: NDArray[np.float64]  # (N, C), empty without a blend


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Builds a run; every call makes a new folder."""
    return lambda **options: _make_run(tmp_path_factory.mktemp("run"), **options)


@pytest.fixture(scope="session")
def full_run(make_run: Callable[..., Run]) -> Run:
    """Complete, failed and unfinished candidates, a blend, Korean and hostile names; read only."""
    return make_run()


@pytest.fixture(scope="session")
def make_race() -> Callable[..., list[CandidateSummary]]:
    """The candidates of a race that was played by dice, with their decisions."""
    return lambda **options: _DicedRace(**options).summaries()


class _DicedRace:
    """Candidates one after the other; a good one lowers the blend's loss, most are stopped or wait
    parked, in their first fold or after a fold."""

    def __init__(
        self,
        candidates: int = 6,
        k: int = 3,
        rule: str = "gain",
        epochs: int = 12,
        opens: int = 2,
        accidents: bool = True,
        backbones: tuple[str, ...] = BACKBONES,
        folds_hash: str = "",
        seed: int = 0,
    ) -> None:
        self._rng = np.random.default_rng(seed)
        self._candidates, self._k, self._rule = candidates, k, rule
        self._epochs, self._opens, self._accidents = epochs, opens, accidents
        self._backbones, self._folds_hash = backbones, folds_hash
        self._loss, self._complete, self._trained, self._number = 0.9, 0, 0, 0

    def summaries(self) -> list[CandidateSummary]:
        return [self._candidate(i) for i in range(self._candidates)]

    def _candidate(self, i: int) -> CandidateSummary:
        record = CandidateRecord(
            candidate=f"c{i:04d}",
            backbone=self._backbones[i % len(self._backbones)],
            params={"lr": 1e-3, "epochs": self._epochs},
        )
        gain = float(self._rng.normal(-0.004, 0.006))
        trials: list[TrialRecord] = []
        decisions: list[RaceDecision] = []
        for fold in range(self._k):
            status = self._status(i, fold, gain)
            if status is None:
                break
            set_aside = status == "stopped" and i % 2 == 0  # it may still go on: no trial ended
            if not set_aside:
                trials.append(self._trial(record, fold, status))
            if status in ("failed", "diverged"):
                break
            decisions.append(self._decision(record, fold, status, gain, i % 2 == 0))
            if decisions[-1].action in ("stop", "park"):
                break
        return summarise(record, trials, self._k, False, decisions)

    def _status(self, i: int, fold: int, gain: float) -> TrialStatus | None:
        if i == self._candidates - 1 and fold > 0:
            return None  # the budget ended
        if self._accidents and i % 7 == 3 and fold == self._k // 2:
            return "failed" if i % 2 else "diverged"
        lagging = self._races and fold == 0 and gain < -0.007
        return "stopped" if lagging and self._rule == "gain" else "finished"

    @property
    def _races(self) -> bool:
        return self._rule != "none" and self._complete >= self._opens

    def _trial(self, record: CandidateRecord, fold: int, status: TrialStatus) -> TrialRecord:
        epochs = self._epochs if status == "finished" else int(self._rng.integers(3, self._epochs))
        self._trained += epochs
        loss = float(0.5 + 0.3 * self._rng.random())
        score = VariantScore(
            rows=100, val_logloss=loss, calibrated_logloss=loss, val_acc=0.8, epoch=epochs - 1
        )
        return TrialRecord(
            candidate=record.candidate, fold=fold, status=status, backbone=record.backbone,
            params=record.params, folds_hash=self._folds_hash, seed=1, epochs_trained=epochs,
            variants={"raw": score} if status == "finished" else {}, seconds=2.5 * epochs,
        )  # fmt: skip

    def _decision(
        self, record: CandidateRecord, fold: int, status: TrialStatus, gain: float, waits: bool
    ) -> RaceDecision:
        measured = gain + float(self._rng.normal(0, 0.001))
        known = self._complete > 0
        stop = status == "stopped" or (self._races and measured + 0.001 < 0)
        last = fold == self._k - 1 and status == "finished"
        if last:
            self._complete += 1
            self._loss *= 0.93 if self._complete < 20 else 0.998
        self._number += 1
        out: RaceAction = "park" if waits and self._rule == "gain" else "stop"
        return RaceDecision(
            number=self._number, candidate=record.candidate, fold=fold,
            epoch=3 if status == "stopped" else None,
            rule="epoch" if status == "stopped" else self._rule,
            action="complete" if last else out if stop else "continue",
            variant="raw", folds_done=fold + (status == "finished"),
            rows=100, gain=measured if known else None, gain_se=0.001 if known else None,
            z=1.0 if known else None, complete=self._complete,
            blend_logloss=self._loss if self._complete else None, epochs_trained=self._trained,
            reason=f"gain {measured:+.4f} ± 0.0010",
        )  # fmt: skip


def _make_run(
    root: Path,
    classes: tuple[str, ...] = KOREAN,
    rows: int = 240,
    k: int = 3,
    complete: int = 5,
    broken: bool = True,
    blend: bool = True,
    epochs: int = 6,
    seed: int = 0,
    name: str = "고양이 <b>sweep</b>",
) -> Run:
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % len(classes)
    fold = np.where(rng.random(rows) < 0.4, 0, -1) if k == 1 else rng.permutation(rows) % k
    store = RunStore(root)
    store.create(_config(name, k), _folds_csv(classes, labels, fold), classes)
    scored = np.flatnonzero(fold >= 0)
    common = rng.normal(size=(rows, len(classes)))
    prob = {
        f"c{i:04d}": _save_complete(store, rng, i, labels, fold, common, epochs)[scored]
        for i in range(complete)
    }
    if broken:
        _save_broken(store, complete, k)
    blended = _save_blend(store, prob, labels[scored], fold[scored]) if blend else np.empty(0)
    return Run(store, labels[scored], prob, blended)


def _config(name: str, k: int) -> SweepConfig:
    return SweepConfig(
        name=name,
        data=DataConfig(train="/data/고양이/train.csv"),
        folds=FoldsConfig(k=k),
        search=SearchConfig(backbones=BACKBONES, candidates=8, seed=7),
    )


def _folds_csv(classes: tuple[str, ...], labels: NDArray[np.int64], fold: NDArray[np.int64]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("image_path", "target", "group", "fold"))
    for i, (label, part) in enumerate(zip(labels, fold, strict=True)):
        writer.writerow((f"{i}.jpg", classes[label], "", part))
    return text.getvalue()


def _save_complete(
    store: RunStore,
    rng: np.random.Generator,
    i: int,
    labels: NDArray[np.int64],
    fold: NDArray[np.int64],
    common: NDArray[np.float64],
    epochs: int,
) -> NDArray[np.float64]:
    """(n, C) probabilities, as stored."""
    name, n_classes = f"c{i:04d}", common.shape[1]
    params = {"lr": 1e-4 * (i + 1), "loss": "focal"} if i % 2 == 0 else {"lr": 2e-4}
    backbone = BACKBONES[i % len(BACKBONES)]
    store.save_candidate(CandidateRecord(candidate=name, backbone=backbone, params=params))
    logits = (
        2.0 * np.eye(n_classes)[labels] + common + (0.3 + 0.2 * i) * rng.normal(size=common.shape)
    )
    prob: NDArray[np.float64] = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for part in range(fold.max() + 1):
        held = np.flatnonzero(fold == part)
        calibrated = _sharpened(
            prob[held], 1 / smoothed_temperature(np.log(prob[held]), labels[held])
        )
        score = VariantScore(
            rows=len(held),
            val_logloss=log_loss(prob[held], labels[held]),
            calibrated_logloss=log_loss(calibrated, labels[held]),
            val_acc=accuracy(prob[held], labels[held]),
            epoch=epochs - 1,
        )
        store.save_trial(
            TrialRecord(
                candidate=name, fold=part, status="finished", backbone=backbone, params=params,
                folds_hash=store.folds().hash, seed=1, variants={"raw": score, "ema": score},
                epochs_trained=epochs, seconds=61.25, device="NVIDIA <H200>",
            ),
            {v: _oof(prob[held], labels[held]) for v in ("raw", "ema")},
            held,
            log=_train_log(epochs - part % 2, score),
        )  # fmt: skip
    return prob


def _oof(prob: NDArray[np.float64], labels: NDArray[np.int64]) -> Oof:
    true_prob = prob[np.arange(len(labels)), labels].astype(np.float32)
    return Oof(np.log(prob).astype(np.float16), true_prob)


def _sharpened(prob: NDArray[np.float64], power: float) -> NDArray[np.float64]:
    raised: NDArray[np.float64] = prob**power
    return np.asarray(raised / raised.sum(axis=1, keepdims=True))


def _train_log(epochs: int, end: VariantScore) -> str:
    lines = [
        "epoch,train_loss,train_acc,val_loss,val_acc,val_logloss,val_calibrated_logloss,lr,seconds"
    ]
    for e in range(epochs):
        rest = 1.5 * 0.55**e
        val = f"{end.val_logloss + 0.8 * rest:.5f},{end.calibrated_logloss + 0.7 * rest:.5f}"
        lines.append(f"{e},{0.6 * end.val_logloss + rest:.5f},0.5,1.0,0.5,{val},0.0001,9.5")
    return "\n".join(lines) + "\n"


def _save_broken(store: RunStore, first: int, k: int) -> None:
    """One failed, one diverged, one that never ran."""
    statuses: tuple[TrialStatus | None, ...] = ("failed", "diverged", None)
    for i, status in enumerate(statuses, start=first):
        name = f"c{i:04d}"
        store.save_candidate(CandidateRecord(candidate=name, backbone="timm/x", params={"lr": 1.0}))
        if status is not None:
            store.save_trial(
                TrialRecord(
                    candidate=name, fold=0, status=status, backbone="timm/x", params={"lr": 1.0},
                    folds_hash=store.folds().hash, seed=1, seconds=3.0,
                    error="Traceback (most recent call last):\n  File ...\n"
                    "OutOfMemoryError: <b>no</b> memory\nSee the manual.",
                )
            )  # fmt: skip


def _save_blend(
    store: RunStore,
    prob: dict[str, NDArray[np.float64]],
    labels: NDArray[np.int64],
    fold: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Equal weights, one member of each complete candidate."""
    blended: NDArray[np.float64] = np.mean(list(prob.values()), axis=0)
    losses = {name: log_loss(p, labels) for name, p in prob.items()}
    best = min(losses, key=lambda name: losses[name])
    record = EnsembleRecord(
        method="greedy",
        members=tuple(
            MemberRecord(candidate=name, variant="raw", weight=1 / len(prob)) for name in prob
        ),
        oof_logloss=log_loss(blended, labels),
        crossfit_logloss=log_loss(blended, labels) + 0.004,
        crossfit_se=0.0123,
        certificate=3.2e-4,
        best_single_oof_logloss=losses[best],
        best_single=best,
        oof_accuracy=accuracy(blended, labels),
        single_crossfit_logloss=losses[best] + 0.002,
        gain_over_single_se=0.0045,
        k=int(fold.max()) + 1,
        members_considered=2 * len(prob),
        candidates_considered=len(prob),
        folds_hash=store.folds().hash,
    )
    store.blend.save(record, _trajectory(prob, labels), np.log(blended).astype(np.float16))
    return blended


def _trajectory(prob: dict[str, NDArray[np.float64]], labels: NDArray[np.int64]) -> str:
    lines = ["round,candidate,variant,oof_logloss"]
    names, arrays = list(prob), list(prob.values())
    for i, name in enumerate(names, start=1):
        lines.append(f"{i},{name},raw,{log_loss(np.mean(arrays[:i], axis=0), labels):.6f}")
    return "\n".join(lines) + "\n"
