"""The kernels compiled: one pass over the members at the speed of memory, without a copy.

Each takes members (M, N), which of them (k,), a vector (N,), and fills one float64 each. They
release the GIL, and keep their machine code beside this file or in the user's cache folder.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from foldrace.core.metrics import CLIP

_Kernel = Callable[
    [NDArray[np.floating], NDArray[np.intp], NDArray[np.float64], NDArray[np.float64]], None
]
_LANES = 64
_FACTORS = 16
"""Multiplied before the exponent is taken off: sums of at least 1e-15 and at most 1e5 (rounds and
picks) leave a product within 1e-240 and 1e80."""
_FRACTION = (1 << 52) - 1
_EXPONENT_OF_1 = 1023
_ONE = _EXPONENT_OF_1 << 52
_LOG_2 = float(np.log(2.0))


def _compiled(**options: Any) -> Callable[[_Kernel], _Kernel]:
    """Compile with a cache, or without where no folder for it can be written."""

    def compiled(kernel: _Kernel) -> _Kernel:
        uncached: _Kernel = njit(nogil=True, **options)(kernel)
        try:
            cached: _Kernel = njit(nogil=True, cache=True, **options)(kernel)
        except RuntimeError:
            return uncached
        return _unless_broken(cached, uncached)

    return compiled


def _unless_broken(cached: _Kernel, uncached: _Kernel) -> _Kernel:
    """The cached kernel until its cache fails, which shows at the first call.

    A full disk, or a file cut short. A fault of the kernel's own shows again without the cache.
    """
    best = cached

    @functools.wraps(uncached)
    def kernel(
        members: NDArray[np.floating],
        index: NDArray[np.intp],
        vector: NDArray[np.float64],
        means: NDArray[np.float64],
    ) -> None:
        nonlocal best
        try:
            best(members, index, vector, means)
        except Exception:  # unpickling damaged bytes can raise anything
            if best is uncached:
                raise
            best = uncached
            best(members, index, vector, means)

    return kernel


@njit(inline="always")
def _floored(value: np.floating) -> float:
    wide = np.float64(value)
    return wide if wide > CLIP else CLIP


@_compiled()
def mean_log(
    members: NDArray[np.floating],
    index: NDArray[np.intp],
    offset: NDArray[np.float64],
    means: NDArray[np.float64],
) -> None:
    """Fill means (k,) with mean_i log(offset_i + t_mi), with _LANES logarithms a member.

    The log of a product is the sum of the logs. Each lane multiplies every 64th sum; before the
    product can leave the range of float64, its exponent goes to an integer and the fraction stays.
    N multiplications of relative error 1e-16 in a mean of N terms: an error of about 1e-16.
    """
    n_rows = members.shape[1]
    product = np.empty(_LANES)
    bits = product.view(np.int64)
    chunk = _LANES * _FACTORS
    whole = n_rows - n_rows % chunk
    for k in range(len(index)):
        row = members[index[k]]
        product[:] = 1.0
        exponent = 0
        for start in range(0, whole, chunk):
            for first in range(start, start + chunk, _LANES):
                for lane in range(_LANES):
                    product[lane] *= offset[first + lane] + _floored(row[first + lane])
            for lane in range(_LANES):
                exponent += (bits[lane] >> 52) - _EXPONENT_OF_1
                bits[lane] = (bits[lane] & _FRACTION) | _ONE
        total = exponent * _LOG_2
        for lane in range(_LANES):
            total += np.log(product[lane])
        for i in range(whole, n_rows):
            total += np.log(offset[i] + _floored(row[i]))
        means[k] = total / n_rows


# Reassociation lets each sum run in parallel lanes; all terms are >= 0, so its relative error stays
# below N * 1e-16, and in practice below that of adding one by one.
@_compiled(fastmath={"reassoc", "contract"})
def mean_product(
    members: NDArray[np.floating],
    index: NDArray[np.intp],
    factor: NDArray[np.float64],
    means: NDArray[np.float64],
) -> None:
    """Fill means (k,) with mean_i t_mi * factor_i; four members at a time take half the time."""
    n_rows = members.shape[1]
    last = len(index) - 1
    for k in range(0, len(index), 4):
        k1, k2, k3 = min(k + 1, last), min(k + 2, last), min(k + 3, last)  # the last one again
        row0, row1 = members[index[k]], members[index[k1]]
        row2, row3 = members[index[k2]], members[index[k3]]
        total0 = total1 = total2 = total3 = 0.0
        for i in range(n_rows):
            total0 += _floored(row0[i]) * factor[i]
            total1 += _floored(row1[i]) * factor[i]
            total2 += _floored(row2[i]) * factor[i]
            total3 += _floored(row3[i]) * factor[i]
        means[k], means[k1] = total0 / n_rows, total1 / n_rows
        means[k2], means[k3] = total2 / n_rows, total3 / n_rows
