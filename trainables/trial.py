"""One fold trial: train a candidate on the other folds, score it on its fold, write the result.

Takes a `TrialSpec`, gives the `TrialRecord` that it wrote to the run folder. Knows nothing of Ray:
whoever runs it passes a `Monitor` that hears of each epoch and may ask it to stop.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import platform
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration
from numpy.typing import NDArray
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from experiment.config import TrainingConfig
from experiment.folds import HELD_OUT
from experiment.metrics import log_loss_of_true
from experiment.records import EMA, RAW, Oof, TrialRecord, VariantScore
from experiment.store import RunStore
from search_spaces.params import TrialParams
from trainables.augment import POLICIES
from trainables.backbones import build_classifier
from trainables.data import Batch, Batches, ShuffledBatches, build_loader, to_float
from trainables.ema import build_ema
from trainables.losses import LOSSES
from trainables.mixing import mixup, soft_targets
from trainables.optim import build_optimizer, build_schedule
from trainables.pixel_cache import open_images
from trainables.predict import (
    ModelCard,
    autocast_for,
    log_probabilities,
    pack_weights,
    resolve_precision,
    scoring_loader,
)


@dataclass(frozen=True)
class TrialSpec:
    """Everything that a fold trial depends on."""

    run: str
    """The run folder: path or URL."""
    image_root: str
    candidate: str
    backbone: str
    params: TrialParams
    fold: int
    training: TrainingConfig
    policy: str
    seed: int
    """The sweep's seed; the trial's own follows from it, the hyperparameters and the fold."""
    cpus: int = 1
    accelerators: tuple[str, ...] = ()
    """Device ids that a scheduler gave to this trial, for the record."""


@dataclass(frozen=True)
class EpochReport:
    """One line of train_log.csv. The ema columns are NaN where there is no EMA variant."""

    epoch: int
    train_loss: float
    train_acc: float
    val_loss: float
    val_acc: float
    val_logloss: float
    ema_val_acc: float
    ema_val_logloss: float
    lr: float
    seconds: float


class Monitor(Protocol):
    """Who watches a trial."""

    def report(self, epoch: EpochReport) -> None: ...
    def stop_requested(self) -> bool:
        """Asked before every batch."""


class TrialStopped(Exception):
    """The monitor asked the trial to stop; nothing was written."""


@dataclass
class _Learner:
    """The parts that training changes."""

    accelerator: Accelerator
    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    schedule: Scheduler
    labels: Tensor  # (n,) on the device
    rng: np.random.Generator  # MixUp's
    updates: int = 0

    def variants(self) -> dict[str, nn.Module]:
        found = {RAW: self.accelerator.unwrap_model(self.model)}
        return found if self.ema is None else found | {EMA: self.ema.module}


@dataclass(frozen=True)
class _Best:
    """A variant at its best epoch."""

    score: VariantScore
    oof: Oof
    state: dict[str, Tensor]


def run_trial(spec: TrialSpec, monitor: Monitor) -> TrialRecord:
    """Train, score, write. Raises TrialStopped when the monitor asked for it."""
    started = time.perf_counter()
    store = RunStore.open(spec.run)
    fold, labels, classes = store.folds().fold, store.labels(), len(store.classes())
    train_rows = np.flatnonzero((fold != spec.fold) & (fold != HELD_OUT))
    val_rows = np.flatnonzero(fold == spec.fold)
    files = [Path(spec.image_root) / path for path in store.folds().image_paths]
    params, training = spec.params, spec.training

    accelerator = _fresh_accelerator(training.precision)
    seed = trial_seed(spec)
    _seed_everything(seed, spec.cpus)
    device = accelerator.device
    workers = spec.cpus - 1 if device.type == "cuda" else 0
    source = open_images(files, params.image_size, spec.cpus)
    batches = ShuffledBatches(train_rows, params.batch_size, seed)
    dataset = Batches(source, params.image_size, POLICIES[spec.policy])
    loader = build_loader(dataset, batches, workers, device.type == "cuda")
    scoring = scoring_loader(
        source, val_rows, params.image_size, 2 * params.batch_size, workers, device
    )
    learner = _build_learner(spec, accelerator, classes, len(batches), seed, labels)

    best: dict[str, _Best] = {}
    log: list[EpochReport] = []
    diverged = False
    for epoch in range(params.epochs):
        epoch_started = time.perf_counter()
        batches.epoch = epoch
        train_loss, train_acc = _train_epoch(learner, loader, spec, classes, monitor)
        scored = {
            name: _score(model, scoring, learner, classes, params, training)
            for name, model in learner.variants().items()
        }
        seconds = time.perf_counter() - epoch_started
        lr = learner.optimizer.param_groups[0]["lr"]
        log.append(_epoch_report(epoch, train_loss, train_acc, scored, lr, seconds))
        diverged = not math.isfinite(train_loss + log[-1].val_logloss)
        if diverged:
            break
        _keep_best(best, learner, scored, epoch)
        monitor.report(log[-1])
        if epoch - max(b.score.best_epoch for b in best.values()) >= training.patience:
            break

    record = TrialRecord(
        candidate=spec.candidate,
        fold=spec.fold,
        status="diverged" if diverged else "finished",
        backbone=spec.backbone,
        params=params.as_dict(),
        folds_hash=store.folds().hash,
        seed=seed,
        variants={} if diverged else {name: b.score for name, b in best.items()},
        epochs_trained=len(log),
        seconds=time.perf_counter() - started,
        node=platform.node(),
        device=device.type,
        accelerators=spec.accelerators,
        micro_batch=training.micro_batch or params.batch_size,
        error=f"the loss is not finite at epoch {len(log) - 1}" if diverged else None,
    )
    _write(store, record, best, val_rows, log, ModelCard(spec.backbone, classes, params.image_size))
    return record


def trial_seed(spec: TrialSpec) -> int:
    """A function of what is trained, not of when: the same candidate and fold train alike in
    whatever order and process the trials run."""
    key = [spec.seed, spec.backbone, spec.params.as_dict(), spec.fold]
    return int.from_bytes(hashlib.sha256(json.dumps(key).encode()).digest()[:4]) >> 1


def _fresh_accelerator(precision: str) -> Accelerator:
    """A reused process keeps Accelerate's global state, and changing its precision raises."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    device = PartialState().device
    resolved = resolve_precision(device, precision)
    return Accelerator(
        mixed_precision="no" if resolved == "fp32" else resolved,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
    )


def _seed_everything(seed: int, threads: int) -> None:
    """Global generators too: dropout and the initial weights draw from them."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    cv2.setNumThreads(0)


def _build_learner(
    spec: TrialSpec,
    accelerator: Accelerator,
    classes: int,
    updates_per_epoch: int,
    seed: int,
    labels: NDArray[np.int64],
) -> _Learner:
    params = spec.params
    model = build_classifier(
        spec.backbone,
        classes,
        params.image_size,
        spec.training.pretrained,
        params.dropout,
        params.drop_path,
    )
    model = model.to(accelerator.device)
    ema = build_ema(model, params.ema_decay)
    optimizer = build_optimizer(model, params)
    schedule = build_schedule(optimizer, params, params.epochs * updates_per_epoch)
    model, optimizer = accelerator.prepare(model, optimizer)
    return _Learner(
        accelerator,
        model,
        ema,
        optimizer,
        schedule,
        torch.from_numpy(labels).to(accelerator.device),
        np.random.default_rng((seed, 1)),
    )


def _train_epoch(
    learner: _Learner,
    loader: DataLoader[Batch],
    spec: TrialSpec,
    classes: int,
    monitor: Monitor,
) -> tuple[float, float]:
    """One pass; mean training loss and accuracy (against the heavier label of a mixed image)."""
    device, params = learner.accelerator.device, spec.params
    learner.model.train()
    loss_sum = torch.zeros((), device=device)
    hits = torch.zeros((), device=device)
    seen = 0
    for batch in loader:
        if monitor.stop_requested():
            raise TrialStopped
        images = to_float(batch.images.to(device, non_blocking=True))
        labels = learner.labels[batch.rows.to(device, non_blocking=True)]
        targets = soft_targets(labels, classes, params.label_smoothing)
        images, targets = mixup(
            images, targets, params.mixup_alpha, params.mixup_prob, learner.rng
        )
        loss, logits = _update(learner, images, targets, spec.training)
        loss_sum += loss * len(images)
        hits += (logits.argmax(1) == targets.argmax(1)).sum()
        seen += len(images)
    return float(loss_sum) / seen, float(hits) / seen


def _update(
    learner: _Learner, images: Tensor, targets: Tensor, training: TrainingConfig
) -> tuple[Tensor, Tensor]:
    """One optimiser step on a batch, in micro-batches whose losses add up to the batch's mean."""
    criterion = LOSSES[training.loss].function
    loss = torch.zeros((), device=images.device)
    outputs: list[Tensor] = []
    for part, part_targets in _micro_batches(images, targets, training.micro_batch):
        logits = learner.model(part)
        part_loss = criterion(logits, part_targets) * (len(part) / len(images))
        learner.accelerator.backward(part_loss)
        loss += part_loss.detach()
        outputs.append(logits.detach())
    if training.clip_grad is not None:
        learner.accelerator.clip_grad_norm_(learner.model.parameters(), training.clip_grad)
    learner.optimizer.step()
    learner.optimizer.zero_grad()
    learner.updates += 1
    learner.schedule.step_update(learner.updates)
    if learner.ema is not None:
        learner.ema.update(learner.accelerator.unwrap_model(learner.model), learner.updates)
    return loss, torch.cat(outputs)


def _micro_batches(
    images: Tensor, targets: Tensor, size: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    size = size or len(images)
    yield from zip(images.split(size), targets.split(size), strict=True)


@dataclass(frozen=True)
class _Scored:
    loss: float
    accuracy: float
    logloss: float
    oof: Oof


def _score(
    model: nn.Module,
    scoring: DataLoader[Batch],
    learner: _Learner,
    classes: int,
    params: TrialParams,
    training: TrainingConfig,
) -> _Scored:
    """A variant on the fold's rows. `loss` is the training loss, `logloss` the score."""
    device = learner.accelerator.device
    autocast = autocast_for(device, resolve_precision(device, training.precision))
    log_prob, rows = log_probabilities(model, scoring, device, autocast)
    labels = learner.labels.cpu()[torch.from_numpy(rows)]
    targets = soft_targets(labels, classes, params.label_smoothing)
    loss = LOSSES[training.loss].function(torch.from_numpy(log_prob), targets)
    true_prob = np.exp(log_prob[np.arange(len(rows)), labels.numpy()])
    accuracy = float((log_prob.argmax(1) == labels.numpy()).mean())
    finite = bool(np.isfinite(log_prob).all())
    logloss = log_loss_of_true(true_prob) if finite else math.nan
    return _Scored(float(loss), accuracy, logloss, Oof(log_prob.astype(np.float16), true_prob))


def _keep_best(
    best: dict[str, _Best], learner: _Learner, scored: dict[str, _Scored], epoch: int
) -> None:
    for name, model in learner.variants().items():
        new = scored[name]
        if name in best and new.logloss >= best[name].score.val_logloss:
            continue
        state = {k: v.detach().to("cpu", copy=True) for k, v in model.state_dict().items()}
        score = VariantScore(
            rows=len(new.oof.true_prob),
            val_logloss=new.logloss,
            val_acc=new.accuracy,
            best_epoch=epoch,
        )
        best[name] = _Best(score, new.oof, state)


def _epoch_report(
    epoch: int,
    train_loss: float,
    train_acc: float,
    scored: dict[str, _Scored],
    lr: float,
    seconds: float,
) -> EpochReport:
    raw, ema = scored[RAW], scored.get(EMA)
    return EpochReport(
        epoch=epoch,
        train_loss=train_loss,
        train_acc=train_acc,
        val_loss=raw.loss,
        val_acc=raw.accuracy,
        val_logloss=raw.logloss,
        ema_val_acc=ema.accuracy if ema else math.nan,
        ema_val_logloss=ema.logloss if ema else math.nan,
        lr=lr,
        seconds=seconds,
    )


def _write(
    store: RunStore,
    record: TrialRecord,
    best: dict[str, _Best],
    rows: NDArray[np.int64],
    log: list[EpochReport],
    card: ModelCard,
) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(EpochReport)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(line) for line in log)
    if record.status == "diverged":
        store.save_trial(record, log=text.getvalue())
        return
    store.save_trial(
        record,
        oof={name: b.oof for name, b in best.items()},
        rows=rows,
        weights={name: pack_weights(b.state, card) for name, b in best.items()},
        log=text.getvalue(),
    )
