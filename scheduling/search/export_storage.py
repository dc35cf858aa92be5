"""The places of the export for optuna-dashboard: a journal file or a database.

Takes a path or a URL, gives Optuna's own storage, or why a database cannot be written.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy import create_engine
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from foldrace.core.redaction import without_secrets

_CONNECT_SECONDS = 10
_FORM = "expected postgresql://host:5432/database, or env:NAME with a URL in the environment's NAME"
_ENVIRONMENT = "env:"


def new_journal(path: Path) -> JournalStorage:
    """An empty journal, in place of one that is there.

    A line torn by a kill would break later reads, and a stale lock would be waited for. The path is
    made absolute, as the lock's needs to be; where it is a link, that goes, not what it leads to.
    """
    path = Path(os.path.abspath(path))
    for old in (path, path.with_name(path.name + ".lock")):
        old.unlink(missing_ok=True)
    return JournalStorage(JournalFileBackend(str(path)))


def database(url: str) -> RDBStorage:
    """The database; raises what its driver raises where it does not answer.

    `url` is a URL, or `env:NAME` where the environment's NAME holds it.
    """
    url = database_url(url)
    return RDBStorage(url, engine_kwargs=_options(make_url(url)))


def database_url(url: str) -> str:
    """The URL itself; ValueError where it is in a variable that is not set."""
    if not url.startswith(_ENVIRONMENT):
        return url
    name = url.removeprefix(_ENVIRONMENT)
    if not os.environ.get(name):
        raise ValueError(f"got {url}, but the environment variable {name} is not set; {_FORM}")
    return os.environ[name]


def database_problem(url: str) -> str | None:
    """Why nothing can be written to this database, without its password; None where it can."""
    try:
        url = database_url(url)
    except ValueError as error:
        return str(error)
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # a port that is no number
        return f"got {without_secrets(url)}, which is no database URL; {_FORM}"
    try:
        engine = create_engine(parsed, **_options(parsed))
        try:
            engine.connect().close()
        finally:
            engine.dispose()
    except NoSuchModuleError:
        return f"got {without_secrets(url)}: no such kind of database; {_FORM}"
    except ModuleNotFoundError as error:
        return (
            f"{without_secrets(url)} needs the Python package {error.name}; for PostgreSQL: "
            "pip install 'foldrace[postgresql]'"
        )
    except (SQLAlchemyError, OSError, ValueError) as error:
        return f"{without_secrets(url)} does not answer: {first_line(error, url)}"
    return None


def _options(url: URL) -> dict[str, Any]:
    """`pool_pre_ping`: a sweep takes days, and servers drop idle connections."""
    own = url.drivername.partition("+")[2] or "psycopg"
    libpq = url.get_backend_name() == "postgresql" and own in ("psycopg", "psycopg2")
    timeout = {"connect_timeout": _CONNECT_SECONDS} if libpq else {}
    return {"pool_pre_ping": True, "connect_args": timeout}


def first_line(error: Exception, url: str | None) -> str:
    """First line of the error's cause; a password in it is hidden, though drivers show none.

    `url` as `database` takes it.
    """
    cause = getattr(error, "orig", None) or error.__cause__ or error
    text = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    try:
        password = make_url(database_url(url)).password if url else None
    except (ArgumentError, ValueError):
        password = None
    return text.replace(str(password), "***") if password else text
