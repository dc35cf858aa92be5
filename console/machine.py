"""The commands' use of this machine: terminal, log files, driver's lock, files to write.

Our lines stay on the screen; all other output goes to `logs/`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from foldrace.console.terminal import Terminal, screen, visible
from foldrace.core.errors import UserError
from foldrace.core.files import LocalFiles, open_files
from foldrace.core.redaction import starred
from foldrace.run_folder.claims import HeldClaim
from foldrace.run_folder.store import RunStore

_PATIENCE = 3.0
"""Seconds for two that come to an object store together: one of them has to step back."""
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


def refuse_existing(out: Path, *beside: str) -> None:
    """UserError where the file of `--out`, or one that is written beside it, is there already.

    Asked before the work is done, not after it.
    """
    if out.is_dir():
        raise UserError.single(f"--out {out}", "is a folder; name a file in it")
    for path in (out, *(out.parent / name for name in beside)):
        if path.exists():
            raise UserError.single(
                f"--out {out}", f"{path.name} exists; remove it or give another name"
            )


def log_folder(store: RunStore) -> Path:
    """The folder `logs/` of a run; a temporary one where the run is in an object store."""
    folder = store.log_folder() or Path(tempfile.mkdtemp(prefix="foldrace-logs-"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def only_driver(store: RunStore, command: str) -> Iterator[HeldClaim]:
    """Be the only one that sweeps into a run folder; RunFolderError while another process does.

    Taken before the first check and the first write. A folder that does not become a run is
    removed again, where there is nothing else in it.
    """
    mounted = isinstance(store.files, LocalFiles)
    made = _missing_folders(store.files.path) if isinstance(store.files, LocalFiles) else []
    with store.drivers.hold(command, patience=0.0 if mounted else _PATIENCE) as claim:
        try:
            yield claim
        finally:
            if isinstance(store.files, LocalFiles) and not store.exists:
                _remove_lock(store.files.path / "logs", made)


def _missing_folders(folder: Path) -> list[Path]:
    """The folder's `logs` and the folders above it that are not there yet, the deepest first."""
    return [path for path in (folder / "logs", folder, *folder.parents) if not path.exists()]


def _remove_lock(logs: Path, made: list[Path]) -> None:
    """Remove what the lock has made, and the folders made for it."""
    shutil.rmtree(logs / "driver", ignore_errors=True)
    (logs / "driver.lock").unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something else is in it by now
        for path in made:
            path.rmdir()


def is_at_work(store: RunStore) -> bool:
    """True where a `run` or `resume` is at work on the folder."""
    return bool(store.drivers.alive())


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
    with log.open("ab") as file, os.fdopen(os.dup(kept[0]), "w", encoding="utf-8") as terminal:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield Terminal(screen(terminal), width=width)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for target, source in zip((1, 2), kept, strict=True):
                os.dup2(source, target)
                os.close(source)


class _StarredFormatter(logging.Formatter):
    """Writes no secret of a URL, wherever in the line or its traceback it stands.

    A message is one line, whatever names are in it.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        return visible(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        return starred(super().format(record))


def _handler(path: Path, level: int) -> logging.Handler:
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setLevel(level)
    handler.setFormatter(_StarredFormatter(_FORMAT))
    return handler
