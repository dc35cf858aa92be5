"""How far a step has come that may take long: whoever does it tells, a command shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Show = Callable[[str, int, int], None]
"""Name of a step, how many of its parts are done, and how many there are; called often."""

_shows: list[Show] = []


def tell(step: str, done: int, total: int) -> None:
    """Let whoever listens know; nobody does in workers, or where Foldrace is a library."""
    for show in _shows:
        show(step, done, total)


@contextmanager
def shown_by(show: Show) -> Iterator[None]:
    """Let `show` be called within the block."""
    _shows.append(show)
    try:
        yield
    finally:
        _shows.remove(show)
