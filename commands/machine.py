"""The commands' use of this machine: terminal, log files, driver's lock, files to write.

Our lines stay on the screen; all other output goes to `logs/`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

from foldrace.core.errors import RunFolderError, UserError
from foldrace.core.files import open_files
from foldrace.run_folder.store import RunStore

_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def write_out(out: Path, data: bytes) -> None:
    """Write the file of `--out`, whole or not at all; UserError where it cannot be written."""
    try:
        open_files(out.resolve().parent).write(out.name, data)
    except OSError as error:
        raise UserError.single(f"--out {out}", f"cannot be written: {error}") from error


def log_folder(store: RunStore) -> Path:
    """The folder `logs/` of a run; a temporary one where the run is in an object store."""
    folder = store.log_folder() or Path(tempfile.mkdtemp(prefix="foldrace-logs-"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def only_driver(store: RunStore, folder: Path) -> Iterator[None]:
    """Hold the run folder's lock; RunFolderError while another process sweeps into it.

    The lock goes with its process, however that ends.
    """
    try:
        with FileLock(folder / "driver.lock", timeout=0):
            yield
    except Timeout as error:
        raise RunFolderError.single(
            store.root, "another `run` or `resume` is at work on it; wait for it, or end it first"
        ) from error


def is_at_work(store: RunStore) -> bool:
    """True where a `run` or `resume` holds the folder's lock, or may hold it.

    An object store has no lock, and one in a folder that is not ours to write cannot be tried.
    """
    folder = store.log_folder()
    if folder is None:
        return True
    lock = folder / "driver.lock"
    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except (Timeout, OSError):
        return True


@contextlib.contextmanager
def logging_to(folder: Path) -> Iterator[None]:
    """Log events to `application.log`, and warnings to `error.log` as well."""
    logger = logging.getLogger("foldrace")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handlers = [
        _handler(folder / "application.log", logging.INFO),
        _handler(folder / "error.log", logging.WARNING),
    ]
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


@contextlib.contextmanager
def only_our_output(log: Path, console: Console) -> Iterator[Console]:
    """Give a console on the real terminal, and send all other output of the process to `log`.

    Ray's C++ processes write to standard output and error too, hence the file descriptors.
    """
    width = None if console.is_terminal else 120  # a terminal's own width, also after a resize
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with log.open("ab") as file, os.fdopen(os.dup(kept[0]), "w", encoding="utf-8") as screen:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield Console(file=screen, width=width)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for target, source in zip((1, 2), kept, strict=True):
                os.dup2(source, target)
                os.close(source)


def _handler(path: Path, level: int) -> logging.Handler:
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setLevel(level)
    handler.setFormatter(logging.Formatter(_FORMAT))
    return handler
