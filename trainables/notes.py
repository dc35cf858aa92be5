"""What a fold trial warns of, kept for its record: nobody reads the terminal of a worker process.

Takes whatever is logged within a `with` block, gives the texts of the warnings.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class _Notes(logging.Filter):
    """Keeps warnings and lets everything pass. A filter and no handler: where the logger has no
    handler, Python still prints warnings itself."""

    def __init__(self, before: Iterable[str]) -> None:
        super().__init__()
        self.texts: dict[str, None] = dict.fromkeys(before)  # ordered, each once

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            self.texts[record.getMessage()] = None
        return True


@contextmanager
def noting(before: Iterable[str]) -> Iterator[Iterable[str]]:
    """`before`, then the texts of our own warnings in this process, of every thread, each once."""
    logger, notes = logging.getLogger("foldrace"), _Notes(before)
    logger.addFilter(notes)
    try:
        yield notes.texts
    finally:
        logger.removeFilter(notes)
