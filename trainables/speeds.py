"""The speed of backbones on this machine, asked of a process of its own (`step_timing`).

Takes a `TimingRequest`, gives a `Speed` a backbone, or why it has none. Imports no torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from foldrace.core.errors import message_line
from foldrace.search_spaces.sweep_length import Speed

_STARTING = 120.0  # seconds for imports and one slow batch, beyond the time for measuring


@dataclass(frozen=True)
class TimingRequest:
    """What the process that measures speeds must be told."""

    config: str
    """The config as JSON: each backbone is timed with its first candidate's hyperparameters."""
    files: tuple[str, ...]
    """Paths of some training images."""
    rows: int
    """Number of training images."""
    classes: int
    use_gpu: bool
    seconds: float
    """Seconds after which no further backbone is timed."""


@dataclass(frozen=True)
class MeasuredSpeeds:
    """The answer; backbones in neither were not reached in time."""

    speeds: Mapping[str, Speed]
    errors: Mapping[str, str]
    """Backbone -> why it cannot train."""
    start: float = 0.0
    """Seconds until the process had started and imported all that a fold trial needs."""
    failure: str | None = None
    """Why the process itself ended, or None."""


def measure_speeds(request: TimingRequest) -> MeasuredSpeeds:
    """Time the backbones of the request's config, in their order."""
    command = [sys.executable, "-P", "-m", "foldrace.trainables.step_timing"]
    failure, began = None, time.monotonic()
    try:
        done = subprocess.run(
            command,
            input=json.dumps(asdict(request)).encode(),
            capture_output=True,
            timeout=request.seconds + _STARTING,
        )
        output = done.stdout
        if done.returncode != 0:
            text = done.stderr.decode(errors="replace")
            failure = message_line(text) or f"it ended with code {done.returncode}"
    except subprocess.TimeoutExpired as error:
        output, failure = error.stdout or b"", "it took too long"
    seconds = time.monotonic() - began
    answers = [json.loads(line) for line in output.decode().splitlines() if line[:1] == "{"]
    return MeasuredSpeeds(
        {a["backbone"]: Speed(**a["speed"]) for a in answers if "speed" in a},
        {a["backbone"]: a["error"] for a in answers if "error" in a},
        seconds - sum(a["seconds"] for a in answers),
        failure,
    )
