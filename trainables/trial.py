"""One fold trial: train a candidate on the other folds, score it on its fold, write the result.

Takes a `TrialSpec`, gives the `TrialRecord` that it wrote to the run folder. Knows nothing of Ray:
whoever runs it passes a `Monitor` that hears of each epoch and may ask it to stop.
"""

from __future__ import annotations

import csv
import gc
import hashlib
import io
import json
import math
import platform
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
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
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from experiment.config import AugmentConfig, TrainingConfig
from experiment.folds import HELD_OUT
from experiment.metrics import log_loss_of_true
from experiment.records import EMA, RAW, Oof, TrialRecord, VariantScore
from experiment.store import RunStore
from experiment.tables import on_disk
from search_spaces.params import TrialParams
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
    augment: AugmentConfig
    seed: int
    """The sweep's seed; the trial's own follows from it, the hyperparameters and the fold."""
    cpus: int = 1
    use_gpu: bool = True
    """False: the CPU, even where a GPU can be seen that belongs to somebody else."""
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
    bare: nn.Module
    """The model without what the accelerator put around it."""
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    schedule: Scheduler
    labels: Tensor  # (n,) on the device
    rng: np.random.Generator  # MixUp's
    updates: int = 0

    def variants(self) -> dict[str, nn.Module]:
        found = {RAW: self.bare}
        return found if self.ema is None else found | {EMA: self.ema.module}


@dataclass(frozen=True)
class _Data:
    """What the trial reads."""

    labels: NDArray[np.int64]  # (n,) of all rows
    classes: int
    rows: NDArray[np.int64]  # of the fold
    batches: ShuffledBatches  # of the other folds
    training: DataLoader[Batch]
    scoring: DataLoader[Batch]


@dataclass(frozen=True)
class _Best:
    """A variant at its best epoch."""

    score: VariantScore
    oof: Oof
    state: dict[str, Tensor]


@dataclass
class _Course:
    """How the training went."""

    best: dict[str, _Best] = field(default_factory=dict)  # variant -> best so far
    log: list[EpochReport] = field(default_factory=list)
    diverged: bool = False


def run_trial(spec: TrialSpec, monitor: Monitor) -> TrialRecord:
    """Train, score, write. Raises TrialStopped when the monitor asked for it."""
    started = time.perf_counter()
    store = RunStore.open(spec.run)
    accelerator = _fresh_accelerator(spec.training.precision, spec.use_gpu)
    _seed_everything(trial_seed(spec), spec.cpus)
    data = _open_data(spec, store, accelerator.device)
    learner = _build_learner(spec, accelerator, data)
    course = _train(spec, data, learner, monitor)
    seconds = time.perf_counter() - started
    record = _record(spec, course, store.folds().hash, accelerator.device, seconds)
    _write(store, record, course, data)
    return record


def trial_seed(spec: TrialSpec) -> int:
    """A function of what is trained, not of when: the same candidate and fold train alike in
    whatever order and process the trials run."""
    key = [spec.seed, spec.backbone, spec.params.as_dict(), spec.fold]
    return int.from_bytes(hashlib.sha256(json.dumps(key).encode()).digest()[:4]) >> 1


def _fresh_accelerator(precision: str, use_gpu: bool) -> Accelerator:
    """A reused process keeps Accelerate's global state, and changing its precision raises. With
    mixed precision it also keeps the last trial's model, in reference cycles, and its device
    memory; else the model is gone already, and looking through all objects would take 0.2 s."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    device = PartialState(cpu=not use_gpu).device
    resolved = resolve_precision(device, precision)
    if device.type == "cuda" or resolved != "fp32":
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return Accelerator(
        cpu=not use_gpu,
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


def _open_data(spec: TrialSpec, store: RunStore, device: torch.device) -> _Data:
    """Loaders over the fold's rows and over all others but those held out."""
    table, params = store.folds(), spec.params
    train_rows = np.flatnonzero((table.fold != spec.fold) & (table.fold != HELD_OUT))
    rows = np.flatnonzero(table.fold == spec.fold)
    files = [on_disk(Path(spec.image_root), path) for path in table.image_paths]
    source = open_images(files, params.image_size, spec.cpus, store.config().cache)
    on_gpu = device.type == "cuda"
    workers = spec.cpus - 1 if on_gpu else 0
    batches = ShuffledBatches(train_rows, params.batch_size, trial_seed(spec))
    dataset = Batches(source, params.image_size, spec.augment)
    return _Data(
        store.labels(),
        len(store.classes()),
        rows,
        batches,
        build_loader(dataset, batches, workers, on_gpu),
        scoring_loader(source, rows, params.image_size, 2 * params.batch_size, workers, device),
    )


def _build_learner(spec: TrialSpec, accelerator: Accelerator, data: _Data) -> _Learner:
    params = spec.params
    model: nn.Module = build_classifier(
        spec.backbone,
        data.classes,
        params.image_size,
        spec.training.pretrained,
        params.dropout,
        params.drop_path,
    ).to(accelerator.device)
    model = model.to(memory_format=torch.channels_last)  # as the images come
    ema = build_ema(model, params.ema_decay)
    optimizer = build_optimizer(model, params)
    schedule = build_schedule(optimizer, params, params.epochs * len(data.batches))
    model, optimizer = accelerator.prepare(model, optimizer)
    return _Learner(
        accelerator,
        model,
        accelerator.unwrap_model(model),
        ema,
        optimizer,
        schedule,
        torch.from_numpy(data.labels).to(accelerator.device),
        np.random.default_rng((trial_seed(spec), 1)),
    )


def _train(spec: TrialSpec, data: _Data, learner: _Learner, monitor: Monitor) -> _Course:
    """Epoch by epoch, until the schedule's end, no more progress, or a loss that is not finite."""
    course = _Course()
    for epoch in range(spec.params.epochs):
        started = time.perf_counter()
        data.batches.epoch = epoch
        train_loss, train_acc = _train_epoch(learner, data, spec, monitor)
        scored = {
            name: _score(model, learner, data, spec, monitor)
            for name, model in learner.variants().items()
        }
        seconds = time.perf_counter() - started
        lr = learner.optimizer.param_groups[0]["lr"]
        course.log.append(_epoch_report(epoch, train_loss, train_acc, scored, lr, seconds))
        losses = [train_loss, *(s.logloss for s in scored.values())]
        course.diverged = not all(math.isfinite(loss) for loss in losses)
        if course.diverged:
            break
        _keep_best(course.best, learner, scored, epoch)
        monitor.report(course.log[-1])
        newest = max(best.score.best_epoch for best in course.best.values())
        if epoch - newest >= spec.training.patience:
            break
    return course


def _train_epoch(
    learner: _Learner, data: _Data, spec: TrialSpec, monitor: Monitor
) -> tuple[float, float]:
    """One pass; mean training loss and accuracy (against the heavier label of a mixed image)."""
    device, params = learner.accelerator.device, spec.params
    learner.model.train()
    loss_sum = torch.zeros((), device=device)
    hits = torch.zeros((), device=device)
    seen = 0
    for batch in _watched(data.training, monitor):
        images = to_float(batch.images.to(device, non_blocking=True))
        labels = learner.labels[batch.rows.to(device, non_blocking=True)]
        targets = soft_targets(labels, data.classes, params.label_smoothing)
        images, targets = mixup(images, targets, params.mixup_alpha, params.mixup_prob, learner.rng)
        loss, logits = _update(learner, images, targets, spec.training)
        loss_sum += loss * len(images)
        hits += (logits.argmax(1) == targets.argmax(1)).sum()
        seen += len(images)
    return float(loss_sum) / seen, float(hits) / seen


def _watched(loader: Iterable[Batch], monitor: Monitor) -> Iterator[Batch]:
    """The batches, until the monitor asks for the end."""
    for batch in loader:
        if monitor.stop_requested():
            raise TrialStopped
        yield batch


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
        learner.ema.update(learner.bare, learner.updates)
    return loss, torch.cat(outputs)


def _micro_batches(
    images: Tensor, targets: Tensor, size: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """At most `size` images each, as even as possible: a last one of a single image would have no
    batch statistics."""
    count = 1 if size is None else -(-len(images) // size)
    yield from zip(images.chunk(count), targets.chunk(count), strict=True)


@dataclass(frozen=True)
class _Scored:
    loss: float
    accuracy: float
    logloss: float
    oof: Oof


def _score(
    model: nn.Module, learner: _Learner, data: _Data, spec: TrialSpec, monitor: Monitor
) -> _Scored:
    """A variant on the fold's rows. `loss` is the training loss, `logloss` the score."""
    device = learner.accelerator.device
    autocast = autocast_for(device, resolve_precision(device, spec.training.precision))
    batches = _watched(data.scoring, monitor)
    log_prob, rows = log_probabilities(model, batches, device, autocast)
    labels = data.labels[rows]
    targets = soft_targets(torch.from_numpy(labels), data.classes, spec.params.label_smoothing)
    loss = LOSSES[spec.training.loss].function(torch.from_numpy(log_prob), targets)
    true_log_prob = log_prob[np.arange(len(rows)), labels]
    true_prob = np.minimum(np.exp(true_log_prob), np.float32(1))  # rounding may lift it above
    accuracy = float((log_prob.argmax(1) == labels).mean())
    finite = bool(np.isfinite(log_prob).all())
    logloss = log_loss_of_true(true_prob) if finite else math.nan
    stored = np.maximum(log_prob, np.finfo(np.float16).min).astype(np.float16)
    return _Scored(float(loss), accuracy, logloss, Oof(stored, true_prob))


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


def _record(
    spec: TrialSpec, course: _Course, folds_hash: str, device: torch.device, seconds: float
) -> TrialRecord:
    epochs = len(course.log)
    return TrialRecord(
        candidate=spec.candidate,
        fold=spec.fold,
        status="diverged" if course.diverged else "finished",
        backbone=spec.backbone,
        params=spec.params.as_dict(),
        folds_hash=folds_hash,
        seed=trial_seed(spec),
        variants={} if course.diverged else {n: best.score for n, best in course.best.items()},
        epochs_trained=epochs,
        seconds=seconds,
        node=platform.node(),
        device=device.type,
        accelerators=spec.accelerators,
        micro_batch=spec.training.micro_batch or spec.params.batch_size,
        error=f"the loss is not finite at epoch {epochs - 1}" if course.diverged else None,
    )


def _write(store: RunStore, record: TrialRecord, course: _Course, data: _Data) -> None:
    log = _log_csv(course.log)
    if record.status == "diverged":
        store.save_trial(record, log=log)
        return
    card = ModelCard(record.backbone, data.classes, int(record.params["image_size"]))
    store.save_trial(
        record,
        oof={name: best.oof for name, best in course.best.items()},
        rows=data.rows,
        weights={name: pack_weights(best.state, card) for name, best in course.best.items()},
        log=log,
    )


def _log_csv(log: Iterable[EpochReport]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(EpochReport)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(line) for line in log)
    return text.getvalue()
