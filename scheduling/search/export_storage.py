"""Storages of the export for optuna-dashboard: a journal file or a database.

Takes finished Optuna trials, each with its candidate's name, and keeps one study with them. The
database's rows are written many at once: Optuna's own `add_trial` sends some fifty statements a
trial, and takes the driver's processor for 25 ms, which the next suggestion would wait for; this
sends some ten for five hundred trials.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, distribution_to_json
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna.trial import FrozenTrial
from sqlalchemy import Connection, Engine, MetaData, bindparam, create_engine, func, select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from foldrace.core.errors import without_password

CANDIDATE = "candidate"
"""The attribute of an exported trial that says which candidate it is."""

_CONNECT_SECONDS = 10
_FORM = "expected postgresql://user:password@host:5432/database"
_BATCH = 500  # trials in one transaction
_CHILDREN = (
    "trial_params", "trial_values", "trial_user_attributes", "trial_intermediate_values",
)  # fmt: skip
_Rows = Iterator[dict[str, object]]


class Journal:
    """The file `study.journal`, written anew in each session.

    A line torn by a kill would break later reads, and a stale lock would be waited for. The path is
    absolute, as the lock's needs to be.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.where, self._path, self._name = str(path), path.resolve(), name
        self._open: tuple[_WriteOnlyJournal, optuna.Study] | None = None
        self._added: set[str] = set()  # what a full disk kept from the file is not added twice

    def write(self, trials: Sequence[FrozenTrial]) -> None:
        """Append the trials of candidates that it does not have yet."""
        if self._open is None:
            self._open = self._begin()
        backend, study = self._open
        new = [t for t in trials if t.user_attrs[CANDIDATE] not in self._added]
        study.add_trials(new)
        self._added |= {t.user_attrs[CANDIDATE] for t in new}
        backend.flush()

    def _begin(self) -> tuple[_WriteOnlyJournal, optuna.Study]:
        for old in (self._path, self._path.with_name(self._path.name + ".lock")):
            old.unlink(missing_ok=True)
        backend = _WriteOnlyJournal(JournalFileBackend(str(self._path)))
        storage = JournalStorage(backend)
        return backend, optuna.create_study(storage=storage, study_name=self._name)


class _WriteOnlyJournal(BaseJournalBackend):
    """A journal file without other writers: one fsync for many lines, and none is read back."""

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
    """A study in a database; trials from an earlier session that are still true stay."""

    def __init__(self, url: str, name: str) -> None:
        self.where, self._url, self._name = f"search.storage {without_password(url)}", url, name
        self._tables: TrialTables | None = None
        self._there: dict[str, FrozenTrial] = {}
        self._wanted: dict[str, FrozenTrial] = {}

    def write(self, trials: Sequence[FrozenTrial]) -> None:
        """Write the trials, over those of the same candidates; ConnectionError where it fails."""
        new = {t.user_attrs[CANDIDATE]: t for t in trials}
        self._wanted |= new
        try:
            self._write(new)
        except Exception as error:  # of any driver: each has its own kinds
            self._tables = None  # look again what is there: the last one may have come through
            raise ConnectionError(_cause(error, self._url)) from None

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
    """Why nothing can be written to this database, without its password; None where it can."""
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
        return f"{without_password(url)} does not answer: {_cause(error, url)}"
    return None


def _options(url: URL) -> dict[str, Any]:
    """`pool_pre_ping`: a sweep takes days, and servers drop idle connections."""
    own = url.drivername.partition("+")[2] or "psycopg"
    libpq = url.get_backend_name() == "postgresql" and own in ("psycopg", "psycopg2")
    timeout = {"connect_timeout": _CONNECT_SECONDS} if libpq else {}
    return {"pool_pre_ping": True, "connect_args": timeout}


def _cause(error: Exception, url: str) -> str:
    """First line of the error's cause; any password in it is hidden, though drivers show none."""
    cause = getattr(error, "orig", None) or error.__cause__ or error
    text = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    try:
        password = make_url(url).password
    except (ArgumentError, ValueError):
        password = None
    return text.replace(str(password), "***") if password else text


def _still_true(there: FrozenTrial | None, wanted: FrozenTrial) -> bool:
    """True where an earlier session's trial says what a new one would, with the same choices.

    Optuna wants one list of choices a study.
    """
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


class TrialTables:
    """The rows of one study in Optuna's tables, which Optuna has made."""

    def __init__(self, engine: Engine, study_id: int) -> None:
        self._engine, self._study_id = engine, study_id
        schema = MetaData()
        schema.reflect(engine, only=["trials", *_CHILDREN])
        self._trials = schema.tables["trials"]
        self._children = {name: schema.tables[name] for name in _CHILDREN}

    def put(self, trials: Mapping[str, FrozenTrial], there: Mapping[str, int]) -> dict[str, int]:
        """Write `trials`, by any key, and give their ids.

        `there`: ids of earlier trials with the same keys, which are written over.
        """
        ids: dict[str, int] = {}
        left = iter(trials)
        while keys := list(islice(left, _BATCH)):
            batch = {key: trials[key] for key in keys}
            with self._engine.begin() as connection:
                ids |= self._put(connection, batch, {k: there[k] for k in keys if k in there})
        return ids

    def _put(
        self, connection: Connection, trials: Mapping[str, FrozenTrial], old: dict[str, int]
    ) -> dict[str, int]:
        new = {key: trial for key, trial in trials.items() if key not in old}
        ids = old | self._insert(connection, new)
        if old:
            self._clear(connection, {old[key]: trials[key] for key in old})
        by_id = {ids[key]: trial for key, trial in trials.items()}
        for name, rows in _ROWS.items():
            found = [row for trial_id, trial in by_id.items() for row in rows(trial_id, trial)]
            if found:
                connection.execute(self._children[name].insert(), found)
        return ids

    def _insert(self, connection: Connection, trials: Mapping[str, FrozenTrial]) -> dict[str, int]:
        """Insert into the table of trials alone; numbers go on from the last one, without a gap."""
        if not trials:
            return {}
        table, own = self._trials, self._trials.c.study_id == self._study_id
        first = connection.scalar(select(func.count()).select_from(table).where(own)) or 0
        numbered = dict(enumerate(trials, start=first))
        rows = [
            {"study_id": self._study_id, "number": number} | _state(trials[key])
            for number, key in numbered.items()
        ]
        connection.execute(table.insert(), rows)
        written = select(table.c.number, table.c.trial_id).where(own, table.c.number >= first)
        return {numbered[number]: trial_id for number, trial_id in connection.execute(written)}

    def _clear(self, connection: Connection, trials: Mapping[int, FrozenTrial]) -> None:
        for table in self._children.values():
            connection.execute(table.delete().where(table.c.trial_id.in_(list(trials))))
        update = self._trials.update().where(self._trials.c.trial_id == bindparam("id"))
        connection.execute(update, [{"id": i} | _state(trial) for i, trial in trials.items()])


def _state(trial: FrozenTrial) -> dict[str, object]:
    return {
        "state": trial.state.name,
        "datetime_start": _utc(trial.datetime_start),
        "datetime_complete": _utc(trial.datetime_complete),
    }


def _utc(when: datetime | None) -> datetime | None:
    return None if when is None else when.astimezone(UTC).replace(tzinfo=None)


def _params(trial_id: int, trial: FrozenTrial) -> _Rows:
    for name, value in trial.params.items():
        distribution = trial.distributions[name]
        yield {
            "trial_id": trial_id,
            "param_name": name,
            "param_value": distribution.to_internal_repr(value),
            "distribution_json": distribution_to_json(distribution),
        }


def _values(trial_id: int, trial: FrozenTrial) -> _Rows:
    if trial.value is not None:
        yield {
            "trial_id": trial_id,
            "objective": 0,
            "value": trial.value,
            "value_type": "FINITE",
        }


def _attributes(trial_id: int, trial: FrozenTrial) -> _Rows:
    for key, value in trial.user_attrs.items():
        yield {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)}


def _intermediate_values(trial_id: int, trial: FrozenTrial) -> _Rows:
    for step, value in trial.intermediate_values.items():
        yield {
            "trial_id": trial_id,
            "step": step,
            "intermediate_value": value,
            "intermediate_value_type": "FINITE",
        }


_ROWS = dict(zip(_CHILDREN, (_params, _values, _attributes, _intermediate_values), strict=True))
