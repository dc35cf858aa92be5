"""The state of a fold trial after an epoch, from which an interrupted trial goes on.

Takes a learner and its course, gives them back as they were: together with what follows from the
trial's seed and the number of the epoch, that is everything which the next epochs depend on.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
import zlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from enum import IntEnum
from types import TracebackType
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor

from foldrace.core.plugin_files import PluginFile
from foldrace.run_folder.records import Oof, VariantScore
from foldrace.run_folder.store import RunStore
from foldrace.trainables.history import Course, Kept
from foldrace.trainables.spec import EpochReport, TrialSpec, TrialStopped, trial_seed
from foldrace.trainables.state import Learner

_NO_PART_OF_IT = {"save_every", "micro_batch"}
"""Keys of the training section that a state may have been saved with other values of. One changes
nothing, the other leaves the effective batch as it is but gives batch norms smaller ones: a trial
that goes on with less memory is worth more than one with the same statistics in every epoch."""
_CHECKSUM_BYTES = 4
_log = logging.getLogger("foldrace")


class UnfitState(Exception):
    """A saved state that its own trial cannot go on from."""


class ResumeState:
    """A fold trial's one resumable state in the run folder. Written beside the training, in a
    thread; leaving the context waits for the last write, except where the trial is asked to stop:
    then it may be finished, or cut off and cleared away by the next attempt."""

    def __init__(self, store: RunStore, spec: TrialSpec, started: float) -> None:
        """`started` is when the trial began, by `time.perf_counter`."""
        self._store, self._spec = store, spec
        self._fingerprint = fingerprint(spec, store.folds().hash, store.plugins())
        self._started = self._saved = started
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="resume-state")
        self._writing: Future[None] | None = None

    def __enter__(self) -> ResumeState:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.shutdown(wait=not isinstance(error, TrialStopped))

    @property
    def seconds(self) -> float:
        """That this trial took, in all sessions that its state comes from."""
        return time.perf_counter() - self._started

    def restore(self, learner: Learner, course: Course) -> bool:
        """Put a new learner and a new course into the saved state. False: there is none that
        belongs to this trial, and both are as they were. Raises UnfitState where they do not take
        it; both may then be in any state."""
        state = self._read()
        if state is None:
            return False
        try:
            _restore_learner(state["learner"], learner)
            _restore_course(state["course"], course)
        except Exception as error:  # any optimiser may raise anything
            self._warn(f"begins anew: its saved state does not fit ({error})")
            raise UnfitState from error
        self._started -= state["seconds"]
        return True

    def save_if_due(self, learner: Learner, course: Course) -> None:
        """After an epoch: once in `training.save_every` seconds, and not while the last state is
        still being written."""
        now = time.perf_counter()
        due = now - self._saved >= self._spec.training.save_every
        busy = self._writing is not None and not self._writing.done()
        if not course.log or not due or busy or not learner.accelerator.is_main_process:
            return
        self._saved = now
        state = {
            "fingerprint": self._fingerprint,
            "seconds": self.seconds,
            "learner": _learner_state(learner),
            "course": _course_state(course),
        }
        try:
            copy = plain_copy(state)
        except TypeError as error:
            self._warn(f"its state is not saved, since {error}")
            return
        self._writing = self._writer.submit(self._write, copy)

    def wait(self) -> None:
        """Until the last state is written."""
        if self._writing is not None:
            wait([self._writing])

    def _read(self) -> Any:
        data = self._store.resume_state(self._spec.candidate, self._spec.fold)
        if data is None:
            return None
        try:
            state = from_bytes(data)
            if state["fingerprint"] == self._fingerprint:
                return state
            self._warn("begins anew: its saved state is of another config or version")
        except Exception as error:  # torch.load raises whatever a damaged file leads it to
            self._warn(f"begins anew: its saved state cannot be read ({error})")
        return None

    def _write(self, state: object) -> None:
        try:
            data = to_bytes(state)
            self._store.save_resume_state(self._spec.candidate, self._spec.fold, data)
        except OSError as error:  # a full disk or a lost connection is no reason to end a training
            self._warn(f"its state cannot be saved: {error}")

    def _warn(self, message: str) -> None:
        _log.warning("%s fold%d: %s", self._spec.candidate, self._spec.fold, message)


def fingerprint(spec: TrialSpec, folds_hash: str, plugins: Sequence[PluginFile]) -> str:
    """Of all that must be the same for a state to belong to a trial. Library versions are part of
    it: a newer one may name its parts otherwise, or compute otherwise."""
    training = spec.training.model_dump(mode="json", exclude=_NO_PART_OF_IT)
    sections = (training, list(spec.transforms))
    versions = (str(torch.__version__), str(timm.__version__))
    code = [(file.module, hashlib.sha256(file.source).hexdigest()) for file in plugins]
    key = [trial_seed(spec), folds_hash, *sections, *versions, code]
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


class _Queue:
    """A deque as a call of its constructor, which `torch.load` can be allowed to make."""

    def __init__(self, items: list[Any], maxlen: int | None) -> None:
        self._arguments = items, maxlen

    def __reduce__(self) -> tuple[type[deque[Any]], tuple[list[Any], int | None]]:
        return deque, self._arguments


def plain_copy(value: Any) -> Any:
    """Nested containers with every tensor copied to the CPU, so that training may go on while they
    are written. Raises TypeError for what `torch.load(weights_only=True)` would refuse."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)  # strides too: fused optimisers go by them
    if isinstance(value, dict):
        return {plain_copy(key): plain_copy(inner) for key, inner in value.items()}
    if isinstance(value, deque):
        return _Queue([plain_copy(inner) for inner in value], value.maxlen)
    if isinstance(value, (list, tuple)):
        copies = [plain_copy(inner) for inner in value]
        return copies if isinstance(value, list) else tuple(copies)
    if value is None or type(value) in (bool, int, float, str, torch.dtype):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, IntEnum):
        return int(value)
    raise TypeError(f"a {type(value).__name__} cannot be kept without pickle")


def to_bytes(state: object) -> bytes:
    """A plain copy as torch's own file, behind a checksum: `torch.load` does not notice damage."""
    file = io.BytesIO()
    torch.save(state, file)
    data = file.getvalue()
    return zlib.crc32(data).to_bytes(_CHECKSUM_BYTES) + data


def from_bytes(data: bytes) -> Any:
    """The state that `to_bytes` was given. Raises ValueError where the bytes are damaged."""
    checksum, file = data[:_CHECKSUM_BYTES], data[_CHECKSUM_BYTES:]
    if zlib.crc32(file).to_bytes(_CHECKSUM_BYTES) != checksum:
        raise ValueError("its checksum is another")
    with torch.serialization.safe_globals([deque]):
        return torch.load(io.BytesIO(file), map_location="cpu", weights_only=True)


def _learner_state(learner: Learner) -> dict[str, Any]:
    """Generators have no part in it: each epoch seeds its own (`devices.seed_epoch`), and batches
    follow from the number of the epoch (`data.ShuffledBatches`)."""
    scaler = learner.accelerator.scaler
    return {
        "model": learner.bare.state_dict(),
        "ema": learner.ema.module.state_dict() if learner.ema is not None else None,
        "optimizer": learner.optimizer.state_dict(),
        "schedule": learner.schedule.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "updates": learner.updates,
        "micro_batch": learner.micro_batch,
    }


def _restore_learner(state: dict[str, Any], learner: Learner) -> None:
    learner.bare.load_state_dict(state["model"])
    if learner.ema is not None:
        learner.ema.module.load_state_dict(state["ema"])
    learner.optimizer.load_state_dict(state["optimizer"])
    learner.schedule.load_state_dict(state["schedule"])
    scaler = learner.accelerator.scaler
    if scaler is not None and state["scaler"] is not None:  # None: saved on another device
        scaler.load_state_dict(state["scaler"])
    learner.updates = state["updates"]
    learner.micro_batch = min(learner.micro_batch, state["micro_batch"])  # what has fitted


def _course_state(course: Course) -> dict[str, Any]:
    return {
        "log": [asdict(line) for line in course.log],
        "best": {name: _kept_state(kept) for name, kept in course.best.items()},
        "further": [_kept_state(kept) for kept in course.further],
    }


def _restore_course(state: dict[str, Any], course: Course) -> None:
    course.log = [EpochReport(**line) for line in state["log"]]
    course.best = {name: _kept(kept) for name, kept in state["best"].items()}
    course.further = [_kept(kept) for kept in state["further"]]


def _kept_state(kept: Kept) -> dict[str, Any]:
    oof = {name: torch.from_numpy(array) for name, array in vars(kept.oof).items()}
    return {"score": kept.score.model_dump(), "oof": oof, "weights": kept.state}


def _kept(state: dict[str, Any]) -> Kept:
    oof = Oof(**{name: tensor.numpy() for name, tensor in state["oof"].items()})
    return Kept(VariantScore(**state["score"]), oof, state["weights"])
