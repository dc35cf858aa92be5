"""A bar for each long step on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from foldrace.console.terminal import Terminal
from foldrace.core.progress import shown_by

_SHORT = 1.0  # seconds that a step may take without a word
_EVERY = 10.0  # seconds between two lines


class _Steps:
    """Shows one step at a time."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._step = ""
        self._due = 0.0
        self._bar: Progress | None = None

    def show(self, step: str, done: int, total: int) -> None:
        """See `foldrace.core.progress.Show`."""
        if step != self._step:
            self.end()
            wait = _SHORT if self._terminal.is_terminal else _EVERY
            self._step, self._due = step, time.monotonic() + wait
        if done >= total:
            self.end()
        elif self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done)
        elif time.monotonic() > self._due and self._terminal.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self._terminal,
                transient=True,
            )
            self._bar.add_task(step, total=total, completed=done)
            self._bar.start()
        elif time.monotonic() > self._due:
            self._terminal.print(f"{step}: {done:,} of {total:,}")
            self._due = time.monotonic() + _EVERY

    def end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
        self._step, self._bar = "", None


@contextmanager
def progress_shown(terminal: Terminal) -> Iterator[None]:
    """Show the steps within the block, but for those that take a second alone."""
    steps = _Steps(terminal)
    with shown_by(steps.show):
        try:
            yield
        finally:
            steps.end()
