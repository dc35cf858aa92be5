"""Export of finished candidates for optuna-dashboard: `study.journal`, or a database by URL.

Takes candidates as they end, writes one Optuna trial each: pooled OOF log loss (whatever the
objective), one intermediate value a fold, hyperparameters, status and gain. It writes in a thread
of its own, so that a slow database delays no suggestion. Everything in it is derived from the run
folder; nothing is read back into the sweep.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Protocol

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from foldrace.config.hyperparameters import KNOBS, TrialParams
from foldrace.config.ranges import Choice, Float, Int, Range, Value
from foldrace.config.schema import SweepConfig
from foldrace.run_folder.records import CandidateSummary
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.search.export_storage import CANDIDATE, Database, Journal
from foldrace.scheduling.search.sampler_history import diverged_value, last_value
from foldrace.search_spaces.space import SearchSpace, distribution

BACKBONE = "backbone"
_CLOSE_SECONDS = 120.0  # that the end of a sweep waits for a database
_BATCH, _PAUSE = 50, 0.05  # candidates at a time, and seconds between
_log = logging.getLogger("foldrace")


class Storage(Protocol):
    """A place that holds the exported trials."""

    where: str
    """Name of the place for messages, without a password."""

    def write(self, trials: Sequence[FrozenTrial]) -> None:
        """Add the trials, in place of those that it has of the same candidates."""


class StudyExporter:
    """Writes the candidates that are added, together and in a thread of its own."""

    def __init__(self, storage: Storage, space: SearchSpace, classes: int) -> None:
        self._storage, self._space, self._classes = storage, ExportSpace(space), classes
        self._pending: list[CandidateSummary] = []
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self._warned = False
        self._thread: threading.Thread | None = None

    def expect(self, backbone: str, params: TrialParams) -> None:
        """Announce a configuration that may be added later, perhaps from outside the space."""
        self._space.widen(backbone, params)

    def add(self, summary: CandidateSummary) -> None:
        """Add a candidate for the next `write`."""
        with self._lock:
            self._pending.append(summary)

    def write(self) -> None:
        """Begin to write what was added, and return."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="study-export", daemon=True)
            self._thread.start()
        self._wake.set()

    def close(self) -> None:
        """Write what was added and wait for it, at most two minutes."""
        self._closing = True
        self.write()
        assert self._thread is not None
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            _log.warning("%s: not all candidates are written yet", self._storage.where)

    def _work(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            closing = self._closing
            self._write_pending()
            if closing:
                return

    def _write_pending(self) -> None:
        """Write in batches with pauses, since suggestions need the interpreter, too.

        What could not be written waits for the next time.
        """
        while self._pending:
            with self._lock:
                batch = self._pending[:_BATCH]
                self._pending = self._pending[_BATCH:]
            try:
                self._storage.write([exported_trial(s, self._space, self._classes) for s in batch])
            except Exception as error:  # the sweep needs no export: none may end it
                with self._lock:
                    self._pending = batch + self._pending
                self._warn(error)
                return
            if self._pending and not self._closing:
                time.sleep(_PAUSE)

    def _warn(self, error: Exception) -> None:
        """Log the failure once, and at the end again."""
        if not self._warned or self._closing:
            text = str(error).strip().splitlines() or [type(error).__name__]
            _log.warning(
                "%s cannot be written, and the sweep goes on without it (`resume` writes it "
                "anew): %s",
                self._storage.where,
                text[0],
            )
        self._warned = True


def open_exporter(store: RunStore, config: SweepConfig, space: SearchSpace) -> StudyExporter | None:
    """Exporter to the database of `search.storage`, else to the journal in the run folder.

    None where the run folder is in an object store, which cannot be appended to.
    """
    name, folder = study_name(config.name, store.root), store.log_folder()
    storage: Storage
    if config.search.storage is not None:
        storage = Database(config.search.storage, name)
    elif folder is not None:
        storage = Journal(folder.parent / "study.journal", name)
    else:
        return None
    return StudyExporter(storage, space, len(store.classes()))


def study_name(run: str, root: str) -> str:
    """Name of the run and a hash of its folder: two runs never share one study."""
    return f"{run}-{hashlib.sha256(root.encode()).hexdigest()[:8]}"


class ExportSpace:
    """The search space, widened to hold candidates outside it.

    Those are points given by hand, and candidates from before a `resume --set search.space`. Optuna
    wants one list of choices a study.
    """

    def __init__(self, space: SearchSpace) -> None:
        self._space = space
        self._backbones = list(space.backbones)
        self._ranges = {n: r for b in space.backbones for n, r in space.searched(b).items()}

    def widen(self, backbone: str, params: TrialParams) -> None:
        """Make room for a configuration."""
        if backbone not in self._backbones:
            self._backbones.append(backbone)
        for name, value in self._searched(backbone, params).items():
            self._ranges[name] = _widened(self._ranges[name], value)

    def encode(self, backbone: str, params: TrialParams) -> dict[str, Value]:
        """Optuna's names and values of a configuration, backbone first."""
        return {BACKBONE: backbone} | self._searched(backbone, params)

    def distributions(self, names: dict[str, Value]) -> dict[str, BaseDistribution]:
        """Distributions of the names that `encode` gives."""
        found: dict[str, BaseDistribution] = {BACKBONE: CategoricalDistribution(self._backbones)}
        return found | {n: distribution(self._ranges[n]) for n in names if n != BACKBONE}

    def _searched(self, backbone: str, params: TrialParams) -> dict[str, Value]:
        values, settings = params.as_dict(), self._space.settings.get(backbone, {})
        return {s.name: values[knob] for knob, s in settings.items() if s.range is not None}


def exported_trial(summary: CandidateSummary, space: ExportSpace, classes: int) -> FrozenTrial:
    """A candidate as a finished Optuna trial.

    PRUNED: stopped by the race, or unfinished with a fold to show. A diverged one is COMPLETE with
    a loss worse than chance, a failed one FAIL.
    """
    record = summary.candidate
    params = TrialParams.from_dict(record.params)
    encoded, steps = space.encode(record.backbone, params), _steps(summary)
    state = _state(summary, steps)
    now = datetime.now()
    return FrozenTrial(
        number=-1,  # the study gives it one
        trial_id=-1,
        state=state,
        value=_value(summary, classes) if state == TrialState.COMPLETE else None,
        datetime_start=now - timedelta(seconds=sum(t.seconds for t in summary.trials)),
        datetime_complete=now,
        params=encoded,
        distributions=space.distributions(encoded),
        user_attrs=_attributes(summary, encoded),
        system_attrs={},
        intermediate_values=steps,
    )


def _state(summary: CandidateSummary, steps: dict[int, float]) -> TrialState:
    if summary.status in ("complete", "diverged"):
        return TrialState.COMPLETE
    pruned = summary.status == "stopped" or (summary.status != "failed" and steps)
    return TrialState.PRUNED if pruned else TrialState.FAIL


def _value(summary: CandidateSummary, classes: int) -> float | None:
    return diverged_value(classes) if summary.status == "diverged" else last_value(summary)


def _steps(summary: CandidateSummary) -> dict[int, float]:
    """Number of folds -> pooled log loss of the first folds, that many.

    0 -> the score of a first fold that was stopped in mid-training.
    """
    best, last = summary.best, last_value(summary)
    if best is None:
        return {} if last is None else {0: last}
    rows = loss = 0.0
    steps: dict[int, float] = {}
    for folds, trial in enumerate(summary.finished, start=1):
        score = trial.variants[best]
        rows, loss = rows + score.rows, loss + score.rows * score.val_logloss
        steps[folds] = loss / rows
    return steps


def _attributes(summary: CandidateSummary, encoded: dict[str, Value]) -> dict[str, Value]:
    """Attributes: status, gain, and hyperparameters neither searched nor at their default."""
    found: dict[str, Value] = {
        CANDIDATE: summary.candidate.candidate,
        "status": summary.status,
        "folds": len(summary.finished),
    }
    if summary.gain is not None:
        found["gain"] = summary.gain
    names = {name.split("[")[0] for name in encoded}  # without the backbone of one of its own
    given = summary.candidate.params.items()
    return found | {k: v for k, v in given if k not in names and v != KNOBS[k].default}


def _widened(chosen: Range, value: Value) -> Range:
    if chosen.contains(value):
        return chosen
    match chosen:
        case Choice(values):
            return Choice((*values, value))
        case Float(low, high, log):
            low, high = min(low, float(value)), max(high, float(value))
            return Float(low, high, log and low > 0)
        case Int(low, high, log):
            least, most = min(low, int(value)), max(high, int(value))
            return Int(least, most, log and least > 0)
