"""The sums over rows that every blend is made of, and the bound on what a blend could still gain.

Takes true_prob (M, N), a vector (N,) and member indices, gives one float64 a member; with weights
(M,), the `Blend` and its certificate. Two backends give the same numbers to 1e-12: numba (every
core, no copies) and plain numpy (blocks of 2 MiB), which is faster on small problems.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from foldrace.core.metrics import log_loss_of_true
from foldrace.ensemble.blend import Blend, checked_members, checked_weights, clipped, mixture

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


_FACTORS = 16
"""Multiplied before one logarithm: sums of at least 1e-15 and at most 1e5 (rounds and picks) leave
a product within 1e-240 and 1e80."""


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
        """An array with adjacent rows that holds the members, and their places in it.

        A copy of the block only where the members themselves do not lie row by row.
        """
        if self.members.flags.c_contiguous:
            return self.members, index
        return np.ascontiguousarray(self.members[index]), np.arange(len(index))


def member_sums(members: NDArray[np.floating], backend: Backend | None = None) -> MemberSums:
    """The sums of checked members (M, N).

    backend None: numba where it pays by the size alone, so that the same input takes the same way.
    ValueError on another name.
    """
    if backend is None:
        backend = backend_for(members.size)
    if backend not in ("numba", "numpy"):
        raise ValueError(f"backend is {backend!r}, should be 'numba', 'numpy' or None")
    members = members.view(np.ndarray)
    members.flags.writeable = False  # one type to compile for, memory-mapped or not
    if backend == "numpy":
        return MemberSums(members, backend, _mean_log, _mean_product)
    from foldrace.ensemble.solvers import kernels_numba

    return MemberSums(members, backend, kernels_numba.mean_log, kernels_numba.mean_product)


def backend_for(size: int) -> Backend:
    """The backend that takes less time for this number of members and rows."""
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


def certificate(true_prob: ArrayLike, weights: ArrayLike, backend: Backend | None = None) -> float:
    """An upper bound on loss(weights) - min over the simplex of the loss, in nats, >= 0.

    With q = weights @ t, any other blend w' has loss(weights) - loss(w') = mean log(w' @ t / q)
    <= log mean(w' @ t / q) <= log max_m mean(t_m / q), by Jensen. The loss is convex and the bound
    is 0 at its minimum (Boyd and Vandenberghe 2004, 4.2.3). float64: float32 certifies to 2e-7.
    """
    members = checked_members(true_prob)
    mixed = mixture(members, checked_weights(weights, len(members)))
    return _bound(member_sums(members, backend), mixed)


def certified(
    true_prob: ArrayLike,
    weights: ArrayLike,
    path: Sequence[int] = (),
    path_losses: Sequence[float] = (),
    sums: MemberSums | None = None,
) -> Blend:
    """The `Blend` of these weights, with its loss and certificate.

    `sums` are those of true_prob, where its values have been checked before.
    """
    sums = sums or member_sums(checked_members(true_prob))
    members = sums.members
    checked = checked_weights(weights, len(members))
    mixed = mixture(members, checked)
    loss = log_loss_of_true(mixed)
    return Blend(checked, loss, _bound(sums, mixed), tuple(path), tuple(path_losses))


def _bound(sums: MemberSums, mixed: NDArray[np.float64]) -> float:
    """The bound log max_m mean_i(t_mi / q_i), for mixed q (N,)."""
    ratios = sums.mean_products(np.arange(len(sums.members)), 1.0 / mixed)
    return max(0.0, math.log(float(ratios.max())))


def _mean_log(
    members: NDArray[np.floating],
    index: NDArray[np.intp],
    offset: NDArray[np.float64],
    means: NDArray[np.float64],
) -> None:
    """Fill means (k,) with mean_i log(offset_i + t_mi), as logarithms of products."""
    sums = clipped(members[index])
    sums += offset
    width = -(-sums.shape[1] // _FACTORS)
    product = sums[:, :width].copy()
    for start in range(width, sums.shape[1], width):
        part = sums[:, start : start + width]  # the last one may be narrower
        product[:, : part.shape[1]] *= part
    np.log(product, out=product).sum(axis=1, out=means)
    means /= len(offset)


def _mean_product(
    members: NDArray[np.floating],
    index: NDArray[np.intp],
    factor: NDArray[np.float64],
    means: NDArray[np.float64],
) -> None:
    """Fill means (k,) with mean_i t_mi * factor_i; no BLAS, whose threads would fight with ours."""
    products = clipped(members[index])
    products *= factor
    products.mean(axis=1, out=means)
