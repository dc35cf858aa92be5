"""The standard error of a mean over rows, some of which may belong together.

Takes values (N,) with the group of each row, gives nats or whatever the values are. Source: Liang
and Zeger, Longitudinal Data Analysis Using Generalized Linear Models, Biometrika 1986, for a mean.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from foldrace.core.standard_errors import error_of_mean

Groups = NDArray[np.int64] | None
"""(N,) number of each row's group, from 0; None where every row is one of its own."""


def standard_error(values: NDArray[np.floating], groups: Groups = None) -> float:
    """Standard error of the mean of values (N,), in their unit; NaN of one row.

    Rows of different groups are independent, those of one group may be anything: with S_g the sum
    of the deviations from the mean in group g, sqrt(G / (G - 1) sum_g S_g²) / N. Of groups of one
    row that is sd (N - 1 in it) / sqrt(N). One group alone says nothing of others; its rows are
    then taken as independent.
    """
    alone = groups is None or bool((groups == groups[0]).all())
    found = error_of_mean(np.asarray(values, dtype=np.float64), None if alone else groups)
    return math.nan if found is None else found


def whole_group_parts(groups: NDArray[np.int64], n_parts: int) -> NDArray[np.int64]:
    """(N,) the part 0..n_parts-1 of each row, no group divided, the parts as even as can be.

    The largest group first, each to the smallest part; equal ones in the order of their first rows.
    Of fewer groups than parts each is a part.
    """
    _, first, number, size = np.unique(
        groups, return_index=True, return_inverse=True, return_counts=True
    )
    filled = np.zeros(min(n_parts, len(size)), dtype=np.int64)
    part = np.empty(len(size), dtype=np.int64)
    for group in np.lexsort((first, -size)):
        part[group] = filled.argmin()
        filled[part[group]] += size[group]
    return part[number]
