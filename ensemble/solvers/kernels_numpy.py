"""The kernels in plain numpy: what numba's are checked against, and faster on small problems.

Each takes members (M, N), which of them (k,), a vector (N,), and fills one float64 each.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from foldrace.ensemble.blend import clipped

_FACTORS = 16
"""Multiplied before one logarithm: sums of at least 1e-15 and at most 1e5 (rounds and picks) leave
a product within 1e-240 and 1e80."""


def mean_log(
    members: NDArray[np.floating],
    index: NDArray[np.intp],
    offset: NDArray[np.float64],
    means: NDArray[np.float64],
) -> None:
    """means (k,) = mean_i log(offset_i + t_mi), as logarithms of products."""
    sums = clipped(members[index])
    sums += offset
    width = -(-sums.shape[1] // _FACTORS)
    product = sums[:, :width].copy()
    for start in range(width, sums.shape[1], width):
        part = sums[:, start : start + width]  # the last one may be narrower
        product[:, : part.shape[1]] *= part
    np.log(product, out=product).sum(axis=1, out=means)
    means /= len(offset)


def mean_product(
    members: NDArray[np.floating],
    index: NDArray[np.intp],
    factor: NDArray[np.float64],
    means: NDArray[np.float64],
) -> None:
    """means (k,) = mean_i t_mi * factor_i; no BLAS, whose threads would fight with ours."""
    products = clipped(members[index])
    products *= factor
    products.mean(axis=1, out=means)
