"""The log-probabilities of a few members on all rows, read once for many passes over them.

Takes a `Pool`, gives centred log-probabilities (m, n, C) float32: in memory, or in a temporary file
where they are many.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable
from typing import IO

import numpy as np
from numpy.typing import NDArray

from ensemble.combine import centred_logs
from ensemble.pool import Pool
from experiment.errors import EnvironmentProblem

_IN_MEMORY = 1 << 27
"""Numbers in a stack that is kept in memory: 512 MiB. A larger one lies in a file, from which the
system keeps what fits."""
_BLOCK = 1 << 15
"""Numbers centred at a time, in float64: 256 KiB, so that they stay in the cache."""


def log_stack(
    pool: Pool, members: NDArray[np.intp], rows: NDArray[np.intp] | None = None
) -> NDArray[np.float32]:
    """(m, n, C) centred log-probabilities of these members on n rows, or on all; a few more (N, C)
    float32 are in memory while they are read."""
    n_rows = len(pool.labels) if rows is None else len(rows)
    shape = (len(members), n_rows, pool.n_classes)
    logs = (_rows_of(pool.log_prob(int(m)), rows) for m in members)
    if math.prod(shape) > _IN_MEMORY:
        return _in_file(logs, shape)
    stack = np.empty(shape, dtype=np.float32)
    for place, of_member in enumerate(logs):
        stack[place] = of_member
    return stack


def _rows_of(log_prob: NDArray[np.floating], rows: NDArray[np.intp] | None) -> NDArray[np.float32]:
    """(n, C) centred, in float32 only when that is done; one block of rows after another."""
    kept = log_prob if rows is None else log_prob[rows]
    centred = np.empty(kept.shape, dtype=np.float32)
    step = max(1, _BLOCK // kept.shape[1])
    for start in range(0, len(kept), step):
        block = slice(start, start + step)
        centred[block] = centred_logs(kept[block])
    return centred


def thinned_rows(pool: Pool, member: int, most: int) -> NDArray[np.intp]:
    """At most so many rows, evenly from all by class and by what the member gives to it, all
    members on a tie: a fair sample in a fair order, and the same whatever the order of the pool's
    rows."""
    of_all = np.round(pool.true_prob.mean(axis=0), 6)
    order = np.lexsort((of_all, pool.true_prob[member], pool.labels))
    return order[:: math.ceil(len(order) / max(1, most))]


def _in_file(
    logs: Iterable[NDArray[np.float32]], shape: tuple[int, int, int]
) -> NDArray[np.float32]:
    """Read-only; the file has no name and goes with the array. It is written before it is mapped:
    a full disk is then an error and not the end of the process."""
    with tempfile.TemporaryFile(buffering=0) as file:
        for of_member in logs:
            _append(file, of_member.data.cast("B"), 4 * math.prod(shape))
        return np.memmap(file, dtype=np.float32, mode="r", shape=shape)


def _append(file: IO[bytes], left: memoryview, size: int) -> None:
    """All that is left; one write may take a part of it."""
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        raise EnvironmentProblem.single(
            tempfile.gettempdir(),
            f"a temporary file of {size:,} bytes cannot be written ({error.strerror}); set TMPDIR "
            "to a folder with more room, or use another ensemble.method",
        ) from error
