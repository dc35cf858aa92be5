"""The two places of Optuna's view: a journal file, written anew each session, and a database.

Takes finished trials of candidates, keeps one study with them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna.trial import FrozenTrial
from sqlalchemy import create_engine
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from foldrace.core.errors import without_password
from foldrace.scheduling.search.mirror_tables import TrialTables
from foldrace.scheduling.search.mirror_trial import CANDIDATE

_CONNECT_SECONDS = 10
_FORM = "expected postgresql://user:password@host:5432/database"


class Journal:
    """`study.journal`. It begins anew: a line torn by a kill would break later reads, and a stale
    lock would be waited for. The path is absolute, as the lock's needs to be."""

    def __init__(self, path: Path, name: str) -> None:
        self.where, self._path, self._name = str(path), path.resolve(), name
        self._open: tuple[_OneWriter, optuna.Study] | None = None
        self._added: set[str] = set()  # what a full disk kept from the file is not added twice

    def write(self, trials: Sequence[FrozenTrial]) -> None:
        if self._open is None:
            self._open = self._begin()
        backend, study = self._open
        new = [t for t in trials if t.user_attrs[CANDIDATE] not in self._added]
        study.add_trials(new)
        self._added |= {t.user_attrs[CANDIDATE] for t in new}
        backend.flush()

    def _begin(self) -> tuple[_OneWriter, optuna.Study]:
        for old in (self._path, self._path.with_name(self._path.name + ".lock")):
            old.unlink(missing_ok=True)
        backend = _OneWriter(JournalFileBackend(str(self._path)))
        storage = JournalStorage(backend)
        return backend, optuna.create_study(storage=storage, study_name=self._name)


class _OneWriter(BaseJournalBackend):
    """A journal file that nobody else writes: lines go out together, one fsync for all of them,
    and are never read back."""

    def __init__(self, file: JournalFileBackend) -> None:
        self._file = file
        self._unwritten: list[dict[str, Any]] = []
        self._unread: deque[dict[str, Any]] = deque()

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self._unwritten += logs
        self._unread.extend(logs)

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        while self._unread:
            yield self._unread.popleft()

    def flush(self) -> None:
        if self._unwritten:
            self._file.append_logs(self._unwritten)
        self._unwritten = []


class Database:
    """A study in a database. What is there from an earlier session and still true stays."""

    def __init__(self, url: str, name: str) -> None:
        self.where, self._url, self._name = f"search.storage {without_password(url)}", url, name
        self._tables: TrialTables | None = None
        self._there: dict[str, FrozenTrial] = {}
        self._wanted: dict[str, FrozenTrial] = {}

    def write(self, trials: Sequence[FrozenTrial]) -> None:
        new = {t.user_attrs[CANDIDATE]: t for t in trials}
        self._wanted |= new
        try:
            self._write(new)
        except Exception as error:  # of any driver: each has its own kinds
            self._tables = None  # look again what is there: the last one may have come through
            raise ConnectionError(_worded(error, self._url)) from None

    def _write(self, new: dict[str, FrozenTrial]) -> None:
        if self._tables is None:
            self._tables, new = self._connect(), self._wanted
        left = {c: t for c, t in new.items() if not _still_true(self._there.get(c), t)}
        old = {c: self._there[c]._trial_id for c in left if c in self._there}
        for candidate, trial_id in self._tables.put(left, old).items():
            left[candidate]._trial_id = trial_id
        self._there |= left

    def _connect(self) -> TrialTables:
        storage = RDBStorage(self._url, engine_kwargs=_options(make_url(self._url)))
        study = optuna.create_study(storage=storage, study_name=self._name, load_if_exists=True)
        trials = study.get_trials(deepcopy=False)
        self._there = {t.user_attrs.get(CANDIDATE, ""): t for t in trials}
        return TrialTables(storage.engine, storage.get_study_id_from_name(self._name))


def database_problem(url: str) -> str | None:
    """Why no view can be written to this database, without its password."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # a port that is no number
        return f"got {without_password(url)}, which is no database URL; {_FORM}"
    try:
        engine = create_engine(parsed, **_options(parsed))
        try:
            engine.connect().close()
        finally:
            engine.dispose()
    except NoSuchModuleError:
        return f"got {without_password(url)}: no such kind of database; {_FORM}"
    except ModuleNotFoundError as error:
        return (
            f"{without_password(url)} needs the Python package {error.name}; for PostgreSQL: "
            "pip install 'foldrace[postgresql]'"
        )
    except (SQLAlchemyError, OSError, ValueError) as error:
        return f"{without_password(url)} does not answer: {_worded(error, url)}"
    return None


def _options(url: URL) -> dict[str, Any]:
    """`pool_pre_ping`: a sweep takes days, and servers drop idle connections."""
    own = url.drivername.partition("+")[2] or "psycopg"
    libpq = url.get_backend_name() == "postgresql" and own in ("psycopg", "psycopg2")
    timeout = {"connect_timeout": _CONNECT_SECONDS} if libpq else {}
    return {"pool_pre_ping": True, "connect_args": timeout}


def _worded(error: Exception, url: str) -> str:
    """The cause's first line; drivers do not show passwords, but this does not rely on it."""
    cause = getattr(error, "orig", None) or error.__cause__ or error
    text = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    try:
        password = make_url(url).password
    except (ArgumentError, ValueError):
        password = None
    return text.replace(str(password), "***") if password else text


def _still_true(there: FrozenTrial | None, wanted: FrozenTrial) -> bool:
    """Whether a trial from an earlier session says what a new one would, with the same choices:
    Optuna wants one list of them a study."""
    return (
        there is not None
        and there.state == wanted.state
        and there.params == wanted.params
        and _close(there.value, wanted.value)
        and _choices(there) == _choices(wanted)
    )


def _close(left: float | None, right: float | None) -> bool:
    if left is None or right is None:
        return left is right
    return math.isclose(left, right, rel_tol=1e-9)


def _choices(trial: FrozenTrial) -> dict[str, CategoricalDistribution]:
    found = trial.distributions.items()
    return {n: d for n, d in found if isinstance(d, CategoricalDistribution)}
