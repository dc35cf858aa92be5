"""A worker that Ray's memory monitor has killed: really filled memory, really killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
)

from foldrace.scheduling.failures import _fault_of_surroundings
from foldrace.scheduling.ray.lost_workers import as_death

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.ray
@pytest.mark.slow
def test_the_memory_monitors_kill_fails_the_attempt_alone() -> None:
    """Of an error that Tune does not know it would end the sweep."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.scheduling.ray.memory_hog"],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    kind, text = found["task"]
    assert kind == "RayActorError" and found["actor"] == found["task"]
    assert text.startswith("ray.exceptions.OutOfMemoryError: ")
    fault = _fault_of_surroundings(text)
    assert fault is not None and "memory monitor" in fault


@pytest.mark.parametrize("error", [OutOfMemoryError, OutOfDiskError, ObjectStoreFullError])
def test_what_tune_does_not_know_becomes_a_death(error: type[Exception]) -> None:
    found = as_death(error("why"))
    assert isinstance(found, RayActorError) and found.__cause__ is not None
    assert str(found).startswith(f"ray.exceptions.{error.__name__}: ") and "why" in str(found)


def test_what_tune_knows_and_what_is_not_rays_stays() -> None:
    errors = (ActorDiedError(), ActorUnavailableError("x", None), ValueError("a fault of ours"))
    for error in errors:
        assert as_death(error) is error
