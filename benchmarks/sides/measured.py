"""How a side of `ensemble_peers.py` measures itself, in its own process, without our packages.

`DATA OUT ROUNDS SIDE` on the command line: loads the arrays in DATA, calls the side, writes OUT.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import synthetic
from numpy.typing import NDArray

_ENOUGH = 2.0  # seconds of calls, after which no further one is made
_MOST = 15


@dataclass(frozen=True, eq=False)
class Data:
    """What a side is given."""

    folder: Path
    true_prob: NDArray[np.float32]  # (M, N)
    labels: NDArray[np.int64]  # (N,)

    def full(self) -> NDArray[np.floating]:
        """(M, N, C) probabilities: the file's, else made from the true ones."""
        path = self.folder / "prob.npy"
        if path.is_file():
            return np.load(path)
        return synthetic.full_rows(self.true_prob, self.labels, int(self.labels.max()) + 1)


@dataclass(frozen=True, eq=False)
class Answer:
    """What a side gives: either the weights, or the blend's own probabilities of the true class."""

    weights: NDArray[np.float64] | None = None  # (M,)
    blended: NDArray[np.float64] | None = None  # (N,)
    members: int = 0


@dataclass(frozen=True)
class Prepared:
    """A side that has its data in the form it wants."""

    call: Callable[[], Answer]
    """What is measured."""
    held: int
    """Bytes of that data."""


Side = Callable[[Data, int], Prepared]
"""Data and rounds -> what is measured."""


def main(sides: Mapping[str, Side], more: Callable[[Data, str, int], dict[str, float]]) -> None:
    """`more`: further figures, taken after the measured calls."""
    folder, out, rounds, name = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    mapped = "r" if (folder / "mapped").exists() else None
    data = Data(
        folder, np.load(folder / "true_prob.npy", mmap_mode=mapped), np.load(folder / "labels.npy")
    )
    side = sides[name](data, rounds)
    gc.collect()
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    seconds, answer = _timed(side.call)
    peak = _memory("VmHWM")
    times = [seconds]
    while sum(times) < _ENOUGH and len(times) < _MOST:
        times.append(_timed(side.call)[0])
    figures = {
        "seconds": median(times),
        "repeats": len(times),
        "data_mb": side.held / 1e6,
        "extra_mb": (peak - before) / 1e6,
        "peak_mb": peak / 1e6,
        "members": answer.members or int(np.count_nonzero(answer.weights)),
        "loss": float(-np.log(np.maximum(_blended(answer, data), 1e-15)).mean()),
    }
    out.write_text(json.dumps(figures | more(data, name, rounds)))


def _timed(call: Callable[[], Answer]) -> tuple[float, Answer]:
    mark = time.perf_counter()
    answer = call()
    return time.perf_counter() - mark, answer


def _blended(answer: Answer, data: Data) -> NDArray[np.float64]:
    """(N,)"""
    if answer.weights is None:
        assert answer.blended is not None
        return answer.blended
    used = np.flatnonzero(answer.weights)
    return np.asarray(answer.weights[used] @ data.true_prob[used])


def _memory(key: str) -> float:
    """Bytes; VmRSS is what is held now, VmHWM the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return float(line.split()[1]) * 1024
    raise KeyError(key)
