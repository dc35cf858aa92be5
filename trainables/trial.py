"""One fold trial: train a candidate on the other folds, score it on its fold, write the result.

Takes a `TrialSpec`, gives the `TrialRecord` that it wrote to the run folder. Knows nothing of Ray:
whoever runs it passes a `Monitor` that hears of each epoch and may ask it to stop.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from accelerate import Accelerator

from foldrace.core.plugins import naming_plugins
from foldrace.run_folder.records import EMA, RAW, TrialRecord
from foldrace.run_folder.store import RunStore
from foldrace.search_spaces.hyperparameters import TrialParams
from foldrace.trainables.data.loader import Batch, to_float
from foldrace.trainables.data.mixing import erase_, mix, soft_targets
from foldrace.trainables.data.trial_data import TrialData, open_data
from foldrace.trainables.devices import fresh_accelerator, seed_epoch, seed_trial, share_buffers
from foldrace.trainables.history import Course, Scored, score
from foldrace.trainables.models.layers import train_from, trainable_from
from foldrace.trainables.plugins import use_plugins
from foldrace.trainables.predict import pack_weights
from foldrace.trainables.resume_state import ResumeState, UnfitState
from foldrace.trainables.schedules import cycle_ends, training_size
from foldrace.trainables.spec import (
    EpochReport,
    Monitor,
    RungMonitor,
    TrialSpec,
    TrialStopped,
    noting,
    trial_seed,
)
from foldrace.trainables.state import Learner, build_learner
from foldrace.trainables.step import Examples, update


def run_trial(spec: TrialSpec, monitor: Monitor) -> TrialRecord:
    """Train, score, write; an attempt that was interrupted goes on from its last saved epoch.
    Raises TrialStopped when the monitor asked for it."""
    store = RunStore.open(spec.run)
    with naming_plugins(), noting(spec.notes) as notes:
        use_plugins(store.plugins())
        return _run_trial(spec, store, monitor, notes)


def _run_trial(
    spec: TrialSpec, store: RunStore, monitor: Monitor, notes: Iterable[str]
) -> TrialRecord:
    started = time.perf_counter()
    accelerator = fresh_accelerator(spec)
    seed_trial(spec)
    data = open_data(spec, store, accelerator)
    if accelerator.is_main_process:
        store.clear_trial(spec.candidate, spec.fold)
    with ResumeState(store, spec, started) as state:
        learner, course = _begin(spec, data, accelerator, state)
        if course.log:
            if isinstance(monitor, RungMonitor):
                monitor.show(course.log_csv(), {}, data.labels[data.rows])
            monitor.report(course.log[-1])
        _train(spec, data, learner, course, state, monitor)
    record = _record(spec, course, learner, store.folds().hash, state.seconds)
    record = record.model_copy(update={"notes": tuple(notes)})
    if accelerator.is_main_process:
        _write(store, record, course, data)
    accelerator.wait_for_everyone()  # on every device a trial has ended when its record is written
    return record


def _begin(
    spec: TrialSpec, data: TrialData, accelerator: Accelerator, state: ResumeState
) -> tuple[Learner, Course]:
    """As the last attempt left them, where there was one whose state fits; else new ones."""
    learner, course = build_learner(spec, data, accelerator), _new_course(spec.params)
    try:
        state.restore(learner, course)
        return learner, course
    except UnfitState:
        accelerator.free_memory()
    del learner  # there may be no room for two
    seed_trial(spec)
    return build_learner(spec, data, accelerator), _new_course(spec.params)


def _new_course(params: TrialParams) -> Course:
    """With warm restarts the ends of the last cycles are kept (Huang et al., Snapshot Ensembles,
    ICLR 2017)."""
    ends = cycle_ends(params.epochs, params.cycles) if params.cycles > 1 else []
    return Course(params.snapshots, tuple(ends))


def _train(
    spec: TrialSpec,
    data: TrialData,
    learner: Learner,
    course: Course,
    state: ResumeState,
    monitor: Monitor,
) -> None:
    """Epoch by epoch, until the schedule's end, no more progress, or a loss that is not finite."""
    for epoch in range(len(course.log), spec.params.epochs):
        state.save_if_due(learner, course)  # here, where another epoch follows
        started = time.perf_counter()
        train_loss, train_acc = _train_epoch(epoch, learner, data, spec, monitor)
        for model in learner.variants().values():
            share_buffers(model, learner.accelerator)
        scored = {
            name: score(model, learner, data, spec, _watched(data.scoring, monitor))
            for name, model in learner.variants().items()
        }
        seconds = time.perf_counter() - started
        lr = max(group["lr"] for group in learner.optimizer.param_groups)
        course.log.append(_epoch_report(epoch, train_loss, train_acc, scored, lr, seconds))
        losses = [train_loss, *(s.logloss for s in scored.values())]
        course.diverged = not all(math.isfinite(loss) for loss in losses)
        if course.diverged:
            break
        course.keep(learner.variants(), scored)
        learner.schedule.epoch_done(min(s.logloss for s in scored.values()))
        if isinstance(monitor, RungMonitor) and len(course.log) in monitor.rungs:
            state.wait()  # whoever stops the trial removes its state
            oof = {name: s.oof for name, s in scored.items()}
            monitor.show(course.log_csv(), oof, data.labels[data.rows])
        monitor.report(course.log[-1])
        if course.epochs_without_progress() >= spec.training.patience:
            break


def _train_epoch(
    epoch: int, learner: Learner, data: TrialData, spec: TrialSpec, monitor: Monitor
) -> tuple[float, float]:
    """One pass; mean training loss and accuracy (against the heavier label of a mixed image)."""
    rng = seed_epoch(spec, epoch, learner.accelerator.process_index)
    data.batches.epoch = epoch
    params = spec.params
    data.batches.image_size = training_size(
        epoch, params.epochs, params.image_size, params.size_start
    )
    _training_mode(epoch, learner, params)
    labels = torch.from_numpy(data.labels).to(learner.device)
    sums, images = torch.zeros(2, device=learner.device), 0  # loss and right ones
    for batch in _watched(data.training, monitor):
        examples = _examples(batch, labels, data.classes, spec, learner.device, rng)
        loss, logits = update(learner, examples, data.batches.batch_size)
        hits = (logits.argmax(1) == examples.targets.argmax(1)).sum()
        sums += torch.stack([loss * len(examples), hits])
        images += len(examples)  # on the host: a number sent to a GPU waits for all its work
    total = learner.accelerator.reduce(torch.cat([sums, sums.new_tensor([images])])).tolist()
    return total[0] / total[2], total[1] / total[2]


def _training_mode(epoch: int, learner: Learner, params: TrialParams) -> None:
    if learner.layer_ids is None:
        learner.model.train()
        return
    head = max(learner.layer_ids.values())
    train_from(learner.bare, learner.layer_ids, trainable_from(epoch, params, head))


def _examples(
    batch: Batch,
    labels: torch.Tensor,
    classes: int,
    spec: TrialSpec,
    device: torch.device,
    rng: np.random.Generator,
) -> Examples:
    """Onto the device, to soft targets, erased in part and mixed."""
    params = spec.params
    images = to_float(batch.images.to(device, non_blocking=True))
    meta = batch.meta.to(device, non_blocking=True)
    rows = batch.rows.to(device, non_blocking=True)
    targets = soft_targets(labels[rows], classes, params.label_smoothing)
    erase_(images, params.random_erasing, rng)
    images, (meta, targets) = mix(images, (meta, targets), params, rng)
    return Examples(images, meta, targets)


def _watched(loader: Iterable[Batch], monitor: Monitor) -> Iterator[Batch]:
    """The batches, until the monitor asks for the end."""
    for batch in loader:
        if monitor.stop_requested():
            raise TrialStopped
        yield batch


def _epoch_report(
    epoch: int,
    train_loss: float,
    train_acc: float,
    scored: Mapping[str, Scored],
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
    spec: TrialSpec, course: Course, learner: Learner, folds_hash: str, seconds: float
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
        variants={name: kept.score for name, kept in course.variants().items()},
        epochs_trained=epochs,
        seconds=seconds,
        node=platform.node(),
        device=learner.device.type,
        accelerators=spec.accelerators,
        micro_batch=learner.micro_batch,
        error=f"the loss is not finite at epoch {epochs - 1}" if course.diverged else None,
    )


def _write(store: RunStore, record: TrialRecord, course: Course, data: TrialData) -> None:
    if record.status == "diverged":
        store.save_trial(record, log=course.log_csv())
        return
    kept = course.variants()
    store.save_trial(
        record,
        oof={name: variant.oof for name, variant in kept.items()},
        rows=data.rows,
        weights={name: pack_weights(variant.state, data.card) for name, variant in kept.items()},
        log=course.log_csv(),
    )
