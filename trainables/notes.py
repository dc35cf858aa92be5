"""What a fold trial warns of, kept for its record: nobody reads the terminal of a worker process.

Takes whatever is logged within a `with` block, gives the texts of the warnings.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class _Notes(logging.Filter):
    """Keeps warnings and lets everything pass. A filter and no handler: where the logger has no
    handler, Python still prints warnings itself."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: dict[str, None] = {}  # ordered, each once

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            self.texts[record.getMessage()] = None
        return True


@contextmanager
def noting() -> Iterator[dict[str, None]]:
    """The texts of our own warnings in this process, of every thread, in order and each once."""
    logger, notes = logging.getLogger("foldrace"), _Notes()
    logger.addFilter(notes)
    try:
        yield notes.texts
    finally:
        logger.removeFilter(notes)
