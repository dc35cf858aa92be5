"""Warnings of ours on the terminal, for commands that have no log of their own."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from rich.console import Console

from foldrace.core.files import warn_ignored


class _OnConsole(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(f"warning {record.getMessage()}")


@contextlib.contextmanager
def warnings_shown(console: Console) -> Iterator[None]:
    """Print what is logged as a warning meanwhile: files that are ignored, and so on."""
    handler = _OnConsole(console)
    logger = logging.getLogger("foldrace")
    warn_ignored.cache_clear()  # an earlier command of this process may have said it
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
