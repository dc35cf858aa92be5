"""The state of a fold trial after an epoch, from which an interrupted trial goes on.

Takes a `TrainState` and its `History`, gives them back as they were: together with what follows
from the trial's seed and the number of the epoch, everything that the next epochs depend on.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from enum import IntEnum
from types import TracebackType
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor

from foldrace.core.plugin_files import PluginFile
from foldrace.run_folder.records import Oof, VariantScore
from foldrace.run_folder.store import RunStore
from foldrace.trainables.history import Checkpoint, History
from foldrace.trainables.spec import EpochReport, FoldTrial, TrialStopped
from foldrace.trainables.state import TrainState

_CHECKSUM_BYTES = 4
_log = logging.getLogger("foldrace")


class UnfitState(Exception):
    """A saved state that its own trial cannot go on from."""


class ResumeState:
    """A fold trial's one resumable state in the run folder, written in a thread beside training.

    Leaving the context waits for the last write, except where the trial is asked to stop: then it
    may be finished, or cut off and cleared away by the next attempt.
    """

    def __init__(self, store: RunStore, trial: FoldTrial, started: float) -> None:
        """Begin with nothing saved; `started` is the trial's start by `time.perf_counter`."""
        self._store, self._spec, self._save_every = store, trial.spec, trial.params.save_every
        self._fingerprint = fingerprint(trial, store.folds().hash, store.plugins())
        self.started_at = time.time() - (time.perf_counter() - started)
        """Unix time (s) of the start of the first attempt that the trial's state comes from."""
        self._started = self._saved = started
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="resume-state")
        self._writing: Future[bool] | None = None

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
        """Seconds of training in all sessions that the trial's state comes from."""
        return time.perf_counter() - self._started

    def restore(self, state: TrainState, history: History) -> bool:
        """Bring a new state and a new history to where the saved ones were.

        False where nothing is saved that belongs to this trial; both are then as they were. Raises
        UnfitState where they do not take what is saved; both may then be in any state.
        """
        saved = self._read()
        if saved is None:
            return False
        try:
            _restore_train_state(saved["train_state"], state)
            _restore_history(saved["history"], history)
            seconds, started_at = float(saved["seconds"]), float(saved["started_at"])
        except Exception as error:  # any optimiser may raise anything
            self._warn(f"starts again: its saved state does not fit ({error})")
            raise UnfitState from error
        self._started -= seconds
        self.started_at = started_at
        return True

    def save_if_due(self, state: TrainState, history: History) -> None:
        """Start to save after an epoch, at most once in `save_every` seconds.

        Never while the last state is still being written.
        """
        due = time.perf_counter() - self._saved >= self._save_every
        busy = self._writing is not None and not self._writing.done()
        if history.log and due and not busy and state.accelerator.is_main_process:
            self._save(state, history)

    def save_at_rung(
        self, state: TrainState, history: History, columns: Mapping[str, NDArray[np.float32]]
    ) -> bool:
        """Save after an epoch that is a rung, with the log and the columns, and wait for it.

        `columns`: variant -> (n,) calibrated true-class probabilities on the fold's rows. False
        where the state cannot be saved: from this epoch the trial could not go on later.
        """
        if self._writing is not None:
            wait([self._writing])
        self._save(state, history)
        if self._writing is None or not self._writing.result():
            return False
        where = self._spec.candidate, self._spec.fold, len(history.log)
        try:
            self._store.save_rung(*where, history.log_csv(), columns)
        except OSError as error:
            self._warn(f"its rung cannot be saved: {error}")
            return False
        return True

    def _save(self, state: TrainState, history: History) -> None:
        """Start to save; nothing is being written then where the state cannot be copied."""
        self._saved, self._writing = time.perf_counter(), None
        saved = {
            "fingerprint": self._fingerprint,
            "seconds": self.seconds,
            "started_at": self.started_at,
            "train_state": _train_state(state),
            "history": _history_state(history),
        }
        try:
            copy = plain_copy(saved)
        except TypeError as error:
            self._warn(f"its state is not saved, since {error}")
            return
        self._writing = self._writer.submit(self._write, copy)

    def _read(self) -> Any:
        """The saved state, or None where there is none that belongs to this trial."""
        data = self._store.resume_state(self._spec.candidate, self._spec.fold)
        if data is None:
            return None
        try:
            saved = from_bytes(data)
            if saved["fingerprint"] == self._fingerprint:
                return saved
            self._warn("starts again: its saved state is of another config or version")
        except Exception as error:  # torch.load raises whatever a damaged file leads it to
            self._warn(f"starts again: its saved state cannot be read ({error})")
        return None

    def _write(self, saved: object) -> bool:
        try:
            data = to_bytes(saved)
            self._store.save_resume_state(self._spec.candidate, self._spec.fold, data)
        except OSError as error:  # a full disk or a lost connection is no reason to end a training
            self._warn(f"its state cannot be saved: {error}")
            return False
        return True

    def _warn(self, message: str) -> None:
        _log.warning("%s fold%d: %s", self._spec.candidate, self._spec.fold, message)


def fingerprint(trial: FoldTrial, folds_hash: str, plugins: Sequence[PluginFile]) -> str:
    """A hash of all that must be the same for a saved state to belong to a trial.

    Library versions are part of it: a newer one may name its parts otherwise, or compute otherwise.
    The spec's own micro-batch is not: a trial that goes on with less memory is worth more than one
    whose batch norms see as many images in every epoch.
    """
    sections = (trial.params.as_dict(), list(trial.transforms), list(trial.meta_features))
    versions = (str(torch.__version__), str(timm.__version__))
    code = [(file.module, hashlib.sha256(file.source).hexdigest()) for file in plugins]
    key = [trial.seed, folds_hash, *sections, *versions, code]
    if trial.candidate.teacher is not None:
        key.append(trial.candidate.teacher.digest)
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


class _Queue:
    """A deque as a call of its constructor, which `torch.load` can be allowed to make."""

    def __init__(self, items: list[Any], maxlen: int | None) -> None:
        self._arguments = items, maxlen

    def __reduce__(self) -> tuple[type[deque[Any]], tuple[list[Any], int | None]]:
        return deque, self._arguments


def plain_copy(value: Any) -> Any:
    """Nested containers with every tensor copied to the CPU, to be written while training goes on.

    Raises TypeError for what `torch.load(weights_only=True)` would refuse.
    """
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
    """The copy that `to_bytes` was given. Raises ValueError where the bytes are damaged."""
    checksum, file = data[:_CHECKSUM_BYTES], data[_CHECKSUM_BYTES:]
    if zlib.crc32(file).to_bytes(_CHECKSUM_BYTES) != checksum:
        raise ValueError("its checksum does not match")
    with torch.serialization.safe_globals([deque]):
        return torch.load(io.BytesIO(file), map_location="cpu", weights_only=True)


def _train_state(state: TrainState) -> dict[str, Any]:
    """Everything that training changes, but for the generators.

    Each epoch seeds its own (`devices.seed_epoch`), and batches follow from the number of the epoch
    (`loader.ShuffledBatchSampler`).
    """
    scaler = state.accelerator.scaler
    return {
        "model": state.bare.state_dict(),
        "ema": state.ema.module.state_dict() if state.ema is not None else None,
        "optimizer": state.optimizer.state_dict(),
        "schedule": state.schedule.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "updates": state.updates,
        "micro_batch": state.micro_batch,
    }


def _restore_train_state(saved: dict[str, Any], state: TrainState) -> None:
    state.bare.load_state_dict(saved["model"])
    if state.ema is not None:
        state.ema.module.load_state_dict(saved["ema"])
    state.optimizer.load_state_dict(saved["optimizer"])
    state.schedule.load_state_dict(saved["schedule"])
    scaler = state.accelerator.scaler
    if scaler is not None and saved["scaler"] is not None:  # None: saved on another device
        scaler.load_state_dict(saved["scaler"])
    state.updates = saved["updates"]
    state.micro_batch = min(state.micro_batch, saved["micro_batch"])  # what has fitted


def _history_state(history: History) -> dict[str, Any]:
    return {
        "log": [asdict(line) for line in history.log],
        "kept": {name: _checkpoint_state(kept) for name, kept in history.kept.items()},
    }


def _restore_history(saved: dict[str, Any], history: History) -> None:
    history.log = [EpochReport(**line) for line in saved["log"]]
    history.kept = {name: _checkpoint(kept) for name, kept in saved["kept"].items()}


def _checkpoint_state(checkpoint: Checkpoint) -> dict[str, Any]:
    oof = {name: torch.from_numpy(array) for name, array in vars(checkpoint.oof).items()}
    return {"score": checkpoint.score.model_dump(), "oof": oof, "weights": checkpoint.weights}


def _checkpoint(saved: dict[str, Any]) -> Checkpoint:
    oof = Oof(**{name: tensor.numpy() for name, tensor in saved["oof"].items()})
    return Checkpoint(VariantScore(**saved["score"]), oof, saved["weights"])
