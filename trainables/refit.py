"""One student on all images, for deployment: nothing is left to score it on.

Takes a complete student, whose folds have fixed everything (hyperparameters, epochs, which weights,
temperature), gives `refit/<candidate>/` with its weights and the record of them. Its soft labels
are the mean of what the folds' teachers say of an image that their students train on: the same kind
of labels as those that alpha and temperature were searched with.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import timm
import torch

from foldrace.core.errors import RunFailure, UserError
from foldrace.core.files import record_json
from foldrace.core.plugins import Parts, load_parts, naming_plugins
from foldrace.core.temperature import fit_temperature
from foldrace.run_folder.blend_records import Temperature
from foldrace.run_folder.oof import digest
from foldrace.run_folder.records import (
    CandidateId,
    CandidateSummary,
    Count,
    Fraction,
    Logloss,
    Params,
    PlainName,
    Seconds,
    StoredRecord,
    TeacherRef,
)
from foldrace.run_folder.store import RunStore
from foldrace.run_folder.trial_record import candidate_seed
from foldrace.run_folder.variants import EMA, RAW
from foldrace.trainables.data.soft_labels import SoftLabels, mean_soft_labels
from foldrace.trainables.data.trial_data import TrialData, open_rows
from foldrace.trainables.devices import fresh_accelerator, seed_trial
from foldrace.trainables.plugins import TRAINING_TABLES
from foldrace.trainables.predict import pack_weights
from foldrace.trainables.spec import EpochReport, FoldTrial, TrialSpec, read_trial
from foldrace.trainables.state import TrainState, build_train_state
from foldrace.trainables.trial import train_epoch

_WEIGHTS, _RECORD = "model.safetensors", "refit.json"


class RefitRecord(StoredRecord):
    """What `refit.json` says of the weights beside it."""

    candidate: CandidateId
    backbone: str
    params: Params
    teacher: TeacherRef
    variant: PlainName
    """`raw` or `ema`: the better one of the folds' students."""
    temperature: Temperature
    """Fitted on the OOF rows of the folds' students: divides the log-probabilities."""
    classes: tuple[str, ...]
    """In the order of the outputs."""
    rows: Count
    """Labelled images that it was trained on."""
    unlabelled: Count
    epochs: Count
    oof_calibrated_logloss: Logloss
    """Of the folds' students, on rows that they had not seen: no score of these weights, which have
    seen all."""
    oof_accuracy: Fraction
    folds_hash: str
    seed: Count
    seconds: Seconds
    device: str
    torch: str
    timm: str
    weights_digest: str
    """SHA-256 of model.safetensors."""


def refit(
    store: RunStore,
    student: CandidateSummary,
    image_root: str,
    cpus: int,
    tell: Callable[[str], None],
) -> RefitRecord:
    """Train the student on every image that its teacher has labelled; `tell` gets a line an epoch.

    UserError where it is there already, or its schedule waits for a validation loss; RunFailure
    where the loss is not finite.
    """
    teacher, name = student.candidate.teacher, student.candidate.candidate
    assert teacher is not None
    folder = f"refit/{name}"
    if store.files.exists(f"{folder}/{_RECORD}"):
        message = "is there already; move or remove it to train it again"
        raise UserError.single(f"{store.root}/{folder}", message)
    spec = TrialSpec(run=store.root, image_root=image_root, candidate=name, fold=0, cpus=cpus)
    seed = candidate_seed(store, student.candidate, store.fold_count)  # of no fold
    trial = replace(read_trial(spec, store), seed=seed)
    if trial.params.schedule == "plateau":
        message = "the schedule plateau waits for a validation loss, and nothing is left to score"
        raise UserError.single(f"{name}", f"cannot be refitted: {message}")
    began = time.perf_counter()
    with naming_plugins():
        parts = load_parts(store.plugins(), TRAINING_TABLES)
        soft = mean_soft_labels(trial, store, parts)
        state, data = _trained(trial, store, parts, soft, tell)
    variant = _variant(student)
    module = state.variants().get(variant, state.bare)
    weights = {k: v.detach().to("cpu", copy=True) for k, v in module.state_dict().items()}
    packed = pack_weights(weights, data.model_config)
    record = RefitRecord(
        candidate=name,
        backbone=student.candidate.backbone,
        params=student.candidate.params,
        teacher=teacher,
        variant=variant,
        temperature=_temperature(store, name, variant),
        classes=store.classes(),
        rows=len(soft.rows) - len(soft.files),
        unlabelled=len(soft.files),
        epochs=trial.params.epochs,
        oof_calibrated_logloss=student.pooled_calibrated(variant),
        oof_accuracy=student.pooled_accuracy(variant),
        folds_hash=store.folds().hash,
        seed=trial.seed,
        seconds=time.perf_counter() - began,
        device=state.device.type,
        torch=str(torch.__version__),
        timm=str(timm.__version__),
        weights_digest=digest(packed),
    )
    store.files.write(f"{folder}/{_WEIGHTS}", packed)
    store.files.write(f"{folder}/{_RECORD}", record_json(record))
    return record


class _NoMonitor:
    """A monitor that nobody asks to stop."""

    def report(self, epoch: EpochReport) -> None:
        """Ignore it."""

    def stop_requested(self) -> bool:
        """Never."""
        return False


def _trained(
    trial: FoldTrial,
    store: RunStore,
    parts: Parts,
    soft: SoftLabels,
    tell: Callable[[str], None],
) -> tuple[TrainState, TrialData]:
    """The state after the last epoch."""
    accelerator = fresh_accelerator(trial)
    seed_trial(trial)
    labelled = soft.rows[soft.rows < soft.labelled]
    nothing = np.zeros(0, dtype=np.int64)
    data = open_rows(trial, store, accelerator, parts, labelled, nothing, soft)
    state = build_train_state(trial, data, accelerator)
    for epoch in range(trial.params.epochs):
        loss, accuracy, _ = train_epoch(epoch, state, data, trial, _NoMonitor())
        if not np.isfinite(loss):
            raise RunFailure(f"the loss of the refit is not finite at epoch {epoch}")
        state.schedule.epoch_done(loss)
        tell(f"epoch {epoch}: train loss {loss:.4f}, accuracy {accuracy:.4f}")
    return state, data


def _variant(student: CandidateSummary) -> str:
    """The better one of raw and EMA weights: snapshots and soups are of a fold's own epochs."""
    known = [v for v in (RAW, EMA) if v in student.variants]
    return min(known, key=student.pooled_calibrated, default=RAW)


def _temperature(store: RunStore, candidate: str, variant: str) -> float:
    log_prob = store.oof_log_prob(candidate, variant)
    return fit_temperature(log_prob, store.labels()[store.scored_rows()])
