"""One fold trial: train a candidate on the other folds, score it on its fold, write the result.

Takes a `TrialSpec`, gives the `TrialRecord` that it wrote to the run folder. Knows nothing of Ray:
its caller passes a `Monitor` that gets each epoch's report and may ask the trial to stop.
"""

from __future__ import annotations

import logging
import math
import platform
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from foldrace.config.hyperparameters import TrialParams
from foldrace.core.patience import Patience
from foldrace.core.plugins import Parts, load_parts, naming_plugins
from foldrace.core.temperature import fit_temperature, true_prob_at
from foldrace.run_folder.records import Oof, TrialRecord
from foldrace.run_folder.store import RunStore
from foldrace.run_folder.trial_record import trial_record
from foldrace.run_folder.variants import EMA, RAW
from foldrace.trainables.data.loader import Batch
from foldrace.trainables.data.mixing import mixed_epochs
from foldrace.trainables.data.trial_data import TrialData, open_data
from foldrace.trainables.devices import fresh_accelerator, seed_epoch, seed_trial, share_buffers
from foldrace.trainables.history import FoldScore, History, score_fold
from foldrace.trainables.models.layers import train_from, trainable_from
from foldrace.trainables.plugins import TRAINING_TABLES
from foldrace.trainables.predict import pack_weights
from foldrace.trainables.resume_state import ResumeState, UnfitState
from foldrace.trainables.schedules import training_size
from foldrace.trainables.spec import (
    EpochReport,
    FoldTrial,
    Monitor,
    Pace,
    PaceMonitor,
    RungMonitor,
    TrialSpec,
    TrialStopped,
    capture_warnings,
    read_trial,
)
from foldrace.trainables.state import TrainState, build_train_state
from foldrace.trainables.step import make_examples, train_step

_PATIENCE = 600.0  # seconds for a run folder that cannot be written
_log = logging.getLogger("foldrace")


def run_trial(spec: TrialSpec, monitor: Monitor) -> TrialRecord:
    """Train, score, write; an attempt that was interrupted goes on from its last saved epoch.

    Raises TrialStopped when the monitor asked for it.
    """
    store = RunStore.open(spec.run)
    store.files.patience = Patience(_PATIENCE, _log.warning)  # hours of training are worth a wait
    attempt = uuid.uuid4().hex
    with naming_plugins(), capture_warnings(spec.notes) as notes:
        parts = load_parts(store.plugins(), TRAINING_TABLES)
        return _run_trial(read_trial(spec, store), store, parts, monitor, notes, attempt)


def _run_trial(
    trial: FoldTrial,
    store: RunStore,
    parts: Parts,
    monitor: Monitor,
    notes: Iterable[str],
    attempt: str,
) -> TrialRecord:
    started = time.perf_counter()
    accelerator = fresh_accelerator(trial)
    seed_trial(trial)
    data = open_data(trial, store, accelerator, parts)
    if accelerator.is_main_process:
        store.clear_trial(trial.spec.candidate, trial.fold)
    with ResumeState(store, trial, started) as resume:
        state, history = _begin(trial, data, accelerator, resume)
        if history.log:
            monitor.report(history.log[-1])
        _train(trial, data, state, history, resume, monitor)
    record = _record(trial, store, history, state, resume, tuple(notes), attempt)
    if accelerator.is_main_process:
        record = _write(store, record, history, data)
    accelerator.wait_for_everyone()  # on every device a trial has ended when its record is written
    return record


def _begin(
    trial: FoldTrial, data: TrialData, accelerator: Accelerator, resume: ResumeState
) -> tuple[TrainState, History]:
    """State and history as the last attempt left them, or new ones where none is saved or fits."""
    state, history = build_train_state(trial, data, accelerator), History.of(trial.params)
    try:
        resume.restore(state, history)
        return state, history
    except UnfitState:
        accelerator.free_memory()
    del state  # there may be no room for two
    seed_trial(trial)
    return build_train_state(trial, data, accelerator), History.of(trial.params)


def _train(
    trial: FoldTrial,
    data: TrialData,
    state: TrainState,
    history: History,
    resume: ResumeState,
    monitor: Monitor,
) -> None:
    """Train epoch by epoch, to the last one or a loss that is not finite."""
    for epoch in range(len(history.log), trial.params.epochs):
        resume.save_if_due(state, history)  # here, where another epoch follows
        started = time.perf_counter()
        train_loss, train_acc, pace = train_epoch(epoch, state, data, trial, monitor)
        for model in state.variants().values():
            share_buffers(model, state.accelerator)
        scored = score_fold(state, data, trial, _until_stop(data.scoring, monitor))
        seconds = time.perf_counter() - started
        lr = max(group["lr"] for group in state.optimizer.param_groups)
        history.log.append(_epoch_report(epoch, train_loss, train_acc, scored, lr, seconds))
        losses = [train_loss]
        losses += [loss for s in scored.values() for loss in (s.logloss, s.calibrated)]
        history.diverged = not all(math.isfinite(loss) for loss in losses)
        if history.diverged:
            break
        history.keep(state.variants(), scored)
        state.schedule.epoch_done(min(s.calibrated for s in scored.values()))
        if isinstance(monitor, RungMonitor) and len(history.log) in monitor.rungs:
            columns = {
                name: _calibrated(s.oof, data.labels[data.rows]) for name, s in scored.items()
            }
            if resume.save_at_rung(state, history, columns):
                monitor.at_rung()
        if isinstance(monitor, PaceMonitor):
            monitor.pace(pace)
        monitor.report(history.log[-1])


def _calibrated(oof: Oof, labels: NDArray[np.int64]) -> NDArray[np.float32]:
    """(n,) true-class probabilities at the temperature that suits these rows."""
    return true_prob_at(oof.log_prob, labels, fit_temperature(oof.log_prob, labels))


def train_epoch(
    epoch: int, state: TrainState, data: TrialData, trial: FoldTrial, monitor: Monitor
) -> tuple[float, float, Pace]:
    """Mean loss, accuracy and pace of one pass; accuracy by the heavier label of a mixed image."""
    rng = seed_epoch(trial, epoch, state.accelerator.process_index)
    data.batches.epoch = epoch
    params = trial.params
    data.batches.image_size = training_size(
        epoch, params.epochs, params.image_size, params.size_start
    )
    _training_mode(epoch, state, params)
    labels = torch.from_numpy(data.labels).to(state.device)
    mixed = epoch < mixed_epochs(params)
    sums, images = torch.zeros(2, device=state.device), 0  # loss and right ones
    began = asked = time.perf_counter()
    waited = 0.0
    for batch in _until_stop(data.training, monitor):
        waited += time.perf_counter() - asked
        examples = make_examples(
            batch, labels, data.classes, params, state.device, rng, mixed, data.soft
        )
        loss, logits = train_step(state, examples, data.batches.batch_size)
        hits = (logits.argmax(1) == examples.targets.argmax(1)).sum()
        sums += torch.stack([loss * len(examples), hits])
        images += len(examples)  # on the host: a number sent to a GPU waits for all its work
        asked = time.perf_counter()
    total = state.accelerator.reduce(torch.cat([sums, sums.new_tensor([images])])).tolist()
    seconds = time.perf_counter() - began
    return total[0] / total[2], total[1] / total[2], Pace(total[2] / seconds, waited / seconds)


def _training_mode(epoch: int, state: TrainState, params: TrialParams) -> None:
    if state.layer_ids is None:
        state.model.train()
        return
    head = max(state.layer_ids.values())
    train_from(state.bare, state.layer_ids, trainable_from(epoch, params, head))


def _until_stop(loader: Iterable[Batch], monitor: Monitor) -> Iterator[Batch]:
    """The batches; raises TrialStopped once the monitor asks for the end."""
    for batch in loader:
        if monitor.stop_requested():
            raise TrialStopped
        yield batch


def _epoch_report(
    epoch: int,
    train_loss: float,
    train_acc: float,
    scored: Mapping[str, FoldScore],
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
        val_calibrated_logloss=raw.calibrated,
        ema_val_acc=ema.accuracy if ema else math.nan,
        ema_val_logloss=ema.logloss if ema else math.nan,
        ema_val_calibrated_logloss=ema.calibrated if ema else math.nan,
        lr=lr,
        seconds=seconds,
    )


def _record(
    trial: FoldTrial,
    store: RunStore,
    history: History,
    state: TrainState,
    resume: ResumeState,
    notes: tuple[str, ...],
    attempt: str,
) -> TrialRecord:
    epochs = len(history.log)
    return trial_record(
        store,
        trial.candidate,
        trial.fold,
        "diverged" if history.diverged else "finished",
        variants={name: kept.score for name, kept in history.variants().items()},
        epochs_trained=epochs,
        seconds=resume.seconds,
        started_at=resume.started_at,
        ended_at=time.time(),
        node=platform.node(),
        device=state.device.type,
        accelerators=trial.spec.accelerators,
        devices=trial.spec.devices,
        micro_batch=state.micro_batch,
        error=f"the loss is not finite at epoch {epochs - 1}" if history.diverged else None,
        notes=notes,
        attempt=attempt,
    )


def _write(store: RunStore, record: TrialRecord, history: History, data: TrialData) -> TrialRecord:
    """Write the result; the record that is in the run folder then."""
    if record.status == "diverged":
        return store.save_trial(record, log=history.log_csv())
    checkpoints = history.variants()
    return store.save_trial(
        record,
        oof={name: kept.oof for name, kept in checkpoints.items()},
        rows=data.rows,
        weights={
            name: pack_weights(kept.weights, data.model_config)
            for name, kept in checkpoints.items()
        },
        log=history.log_csv(),
    )
