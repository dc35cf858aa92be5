"""All fuzz targets, over examples that are made in a process of their own."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.sides.fuzz_commands import CommandTargets
from benchmarks.sides.fuzz_config import ConfigTargets
from benchmarks.sides.fuzz_data import DataTargets
from benchmarks.sides.fuzz_guard import Target
from benchmarks.sides.fuzz_runs import RunTargets
from benchmarks.sides.fuzz_scene import Examples, make_examples


def all_targets(root: Path) -> tuple[Target, ...]:
    """Every target; examples are made in `root`, and no case changes them."""
    file, folder = root / "examples.pickle", root / "data"
    # This process is forked, so it starts no threads.
    child = started(lambda: file.write_bytes(pickle.dumps(make_examples(root))))
    if os.waitpid(child, 0)[1] != 0:
        raise RuntimeError("the examples could not be made")
    examples = pickle.loads(file.read_bytes())
    assert isinstance(examples, Examples)
    return (
        *DataTargets(examples, folder).targets(),
        *ConfigTargets(examples.config, folder).targets(),
        *RunTargets(examples, folder).targets(),
        *CommandTargets(examples, folder).targets(),
    )


def started(call: Callable[[], object]) -> int:
    """Number of a forked process that ends with 0 if the call does well."""
    pid = os.fork()
    if pid == 0:
        try:
            call()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    return pid
