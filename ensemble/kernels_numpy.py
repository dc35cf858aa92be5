"""The kernels in plain numpy: what numba's are checked against, and faster on small problems.

Each takes rows of members (k, N), a vector (N,), and fills one float64 a member.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ensemble.blend import clipped


def mean_log(
    rows: NDArray[np.floating], offset: NDArray[np.float64], means: NDArray[np.float64]
) -> None:
    """means (k,) = mean_i log(offset_i + t_mi)."""
    sums = clipped(rows)
    sums += offset
    np.log(sums, out=sums).mean(axis=1, out=means)


def mean_product(
    rows: NDArray[np.floating], factor: NDArray[np.float64], means: NDArray[np.float64]
) -> None:
    """means (k,) = mean_i t_mi * factor_i."""
    np.matmul(clipped(rows), factor, out=means)
    means /= len(factor)
