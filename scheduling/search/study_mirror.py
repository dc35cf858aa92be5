"""Optuna's view of the sweep for optuna-dashboard: `study.journal`, or a database by URL.

Takes candidates as they end, writes one trial each, in a thread of its own: a slow database delays
no suggestion. Everything in it is derived from the run folder; nothing is read back into the sweep.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Sequence
from typing import Protocol

from optuna.trial import FrozenTrial

from foldrace.config.schema import SweepConfig
from foldrace.run_folder.records import CandidateSummary
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.search.mirror_storage import Database, Journal
from foldrace.scheduling.search.mirror_trial import MirrorSpace, mirror_trial
from foldrace.search_spaces.hyperparameters import TrialParams
from foldrace.search_spaces.space import SearchSpace

_CLOSE_SECONDS = 120.0  # that the end of a sweep waits for a database
_PIECE, _PAUSE = 50, 0.05  # candidates, seconds
_log = logging.getLogger("foldrace")


class Storage(Protocol):
    """Where the trials go. `where` is for messages, without a password."""

    where: str

    def write(self, trials: Sequence[FrozenTrial]) -> None:
        """Add them, or make them anew: afterwards the study has no others of these candidates, and
        none that is running."""


class StudyMirror:
    """Candidates are added at any time, and written together."""

    def __init__(self, storage: Storage, space: SearchSpace, classes: int) -> None:
        self._storage, self._space, self._classes = storage, MirrorSpace(space), classes
        self._pending: list[CandidateSummary] = []
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self._told = False
        self._thread: threading.Thread | None = None

    def expect(self, backbone: str, params: TrialParams) -> None:
        """A configuration that may be added later, perhaps from outside the space."""
        self._space.hold(backbone, params)

    def add(self, summary: CandidateSummary) -> None:
        """To be written with the next `write`."""
        with self._lock:
            self._pending.append(summary)

    def write(self) -> None:
        """Begin to write what was added, and return."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="study-mirror", daemon=True)
            self._thread.start()
        self._wake.set()

    def close(self) -> None:
        """Write what was added and wait for it, though not for ever."""
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
        """In pieces with pauses, since the interpreter is the suggestions' too. What could not be
        written waits for the next time: the sweep needs none of it."""
        while self._pending:
            with self._lock:
                piece = self._pending[:_PIECE]
                self._pending = self._pending[_PIECE:]
            try:
                self._storage.write([mirror_trial(s, self._space, self._classes) for s in piece])
            except Exception as error:  # a view that nobody needs must not end a sweep
                with self._lock:
                    self._pending = piece + self._pending
                self._tell(error)
                return
            if self._pending and not self._closing:
                time.sleep(_PAUSE)

    def _tell(self, error: Exception) -> None:
        """Once, and at the end again."""
        if not self._told or self._closing:
            text = str(error).strip().splitlines() or [type(error).__name__]
            _log.warning(
                "%s cannot be written, and the sweep goes on without it (`resume` writes it "
                "anew): %s",
                self._storage.where,
                text[0],
            )
        self._told = True


def open_mirror(store: RunStore, config: SweepConfig, space: SearchSpace) -> StudyMirror | None:
    """The database of `search.storage`, else the journal in the run folder; None where that is in
    an object store, which cannot be appended to."""
    name, folder = study_name(config.name, store.root), store.log_folder()
    storage: Storage
    if config.search.storage is not None:
        storage = Database(config.search.storage, name)
    elif folder is not None:
        storage = Journal(folder.parent / "study.journal", name)
    else:
        return None
    return StudyMirror(storage, space, len(store.classes()))


def study_name(run: str, root: str) -> str:
    """Two runs never share one: the name of the run and a hash of its folder."""
    return f"{run}-{hashlib.sha256(root.encode()).hexdigest()[:8]}"
