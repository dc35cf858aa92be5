"""The two sums over rows that every blend is made of, for any choice of members.

Takes true_prob (M, N), a vector (N,) and member indices; gives one float64 a member. Two backends
give the same numbers to 1e-12: numba (every core, no copies) and plain numpy (blocks of 2 MiB).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ensemble import kernels_numpy

Backend = Literal["numba", "numpy"]
Floats = NDArray[np.float64]
Kernel = Callable[[NDArray[np.floating], NDArray[np.intp], Floats, Floats], None]
"""Members (M, N), the (k,) to take, a vector (N,), the (k,) to fill. Values below CLIP count as
CLIP."""

BLOCK = 1 << 18
"""Numbers handled at a time: 2 MiB in float64, so that they stay in the cache."""
_NUMBA_FROM = 1 << 22
"""Members x rows from which numba pays: importing and loading it takes up to a second, and numpy
needs less for all 50 greedy rounds of a smaller problem."""


@dataclass(frozen=True, eq=False)
class MemberSums:
    """Sums over the rows of true_prob, which stays where it is, also when memory-mapped."""

    members: NDArray[np.floating]
    """(M, N) float32 or float64 in [0, 1]."""
    backend: Backend
    _mean_log: Kernel
    _mean_product: Kernel

    def mean_logs(self, index: NDArray[np.intp], offset: Floats) -> Floats:
        """(k,) mean_i log(offset_i + t_mi) of the members in index (k,), for offset (N,) >= 0."""
        return self._each(self._mean_log, index, offset)

    def mean_products(self, index: NDArray[np.intp], factor: Floats) -> Floats:
        """(k,) mean_i t_mi * factor_i of the members in index (k,), for factor (N,) >= 0."""
        return self._each(self._mean_product, index, factor)

    def _each(self, kernel: Kernel, index: NDArray[np.intp], vector: Floats) -> Floats:
        sums = np.empty(len(index))
        step = max(1, BLOCK // self.members.shape[1])
        blocks = [slice(start, start + step) for start in range(0, len(index), step)]

        def fill(block: slice) -> None:
            kernel(*self._rows(index[block]), vector, sums[block])

        if len(blocks) < 2 or _cores() < 2:
            for block in blocks:
                fill(block)
        else:
            with ThreadPoolExecutor(min(_cores(), len(blocks))) as threads:
                list(threads.map(fill, blocks))
        return sums

    def _rows(self, index: NDArray[np.intp]) -> tuple[NDArray[np.floating], NDArray[np.intp]]:
        """An array with adjacent rows that holds the members, and where: a copy of the block only
        where the members themselves do not lie row by row."""
        if self.members.flags.c_contiguous:
            return self.members, index
        return np.ascontiguousarray(self.members[index]), np.arange(len(index))


def member_sums(members: NDArray[np.floating], backend: Backend | None = None) -> MemberSums:
    """The sums of checked members (M, N); backend None: numba where it pays by the size alone, so
    that the same input takes the same way. ValueError on another name."""
    if backend is None:
        backend = backend_for(members.size)
    if backend not in ("numba", "numpy"):
        raise ValueError(f"backend is {backend!r}, should be 'numba', 'numpy' or None")
    members = members.view(np.ndarray)
    members.flags.writeable = False  # one type to compile for, memory-mapped or not
    if backend == "numpy":
        return MemberSums(members, backend, kernels_numpy.mean_log, kernels_numpy.mean_product)
    from ensemble import kernels_numba  # costs a good part of a second

    return MemberSums(members, backend, kernels_numba.mean_log, kernels_numba.mean_product)


def backend_for(size: int) -> Backend:
    """The one that takes less time for so many members x rows."""
    return "numba" if size >= _NUMBA_FROM else "numpy"


def _cores() -> int:
    """Threads to start: OMP_NUM_THREADS where it is set, as Ray does for its workers.

    Threads of our own instead of numba's: its default threading layer aborts the process when two
    threads call it at once.
    """
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    if allowed.isdigit() and int(allowed) > 0:
        return int(allowed)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
