"""How far the trials under way are, by the states that they have saved."""

from __future__ import annotations

import contextlib
from pathlib import Path

from foldrace.trainables.resume_state import from_bytes

RESUME_STATE = "resume.pt"


def saved_epochs(run: Path) -> int:
    """Of the most advanced trial under way."""
    found = [0]
    for path in run.glob(f"trials/*/*/{RESUME_STATE}"):
        with contextlib.suppress(FileNotFoundError):  # its trial has just ended
            found.append(saved_epochs_of(path))
    return max(found)


def saved_epochs_of(state: Path) -> int:
    """Epochs that were trained when the state was saved."""
    return len(from_bytes(state.read_bytes())["history"]["log"])
