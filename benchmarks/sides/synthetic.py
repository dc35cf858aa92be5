"""OOF probabilities of many correlated members, made from a seed: numpy alone.

Row i has a difficulty and 12 families have each their own view of it; a member mixes two views, and
has its skill, its own errors and its own sharpness (some are over-, some under-confident). The
margin of the true class is their sum; its probability is the logistic function of it. Full rows,
where a side wants them, spread the rest over the other classes by weights that all members share.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

_FAMILIES = 12
_BLOCK = 50  # members made at once
_EDGE = 1e-6  # float32 softmax gives hardly less


def true_prob_blocks(members: int, rows: int, seed: int = 0) -> Iterator[NDArray[np.float32]]:
    """(m, N) blocks that make (M, N) when stacked; the first members of a larger M are the same."""
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(0.0, 2.0, rows)
    views = rng.normal(0.0, 1.2, (_FAMILIES, rows)) + difficulty
    for start in range(0, members, _BLOCK):
        block = np.random.default_rng((seed, start)).spawn(_BLOCK)
        yield np.stack([_member(own, views) for own in block[: members - start]])


def true_prob(members: int, rows: int, seed: int = 0) -> NDArray[np.float32]:
    """(M, N)"""
    matrix = np.empty((members, rows), dtype=np.float32)
    start = 0
    for block in true_prob_blocks(members, rows, seed):
        matrix[start : start + len(block)] = block
        start += len(block)
    return matrix


def _member(rng: np.random.Generator, views: NDArray[np.float64]) -> NDArray[np.float32]:
    """(N,)"""
    skill, sharpness = rng.normal(1.5, 0.2), rng.lognormal(0.0, 0.35)
    errors = rng.normal(0.0, rng.uniform(1.5, 2.5), views.shape[1])
    one, other = rng.choice(len(views), 2, replace=False)
    share = rng.uniform(0.5, 1.0)
    margin = sharpness * (skill + share * views[one] + (1 - share) * views[other] + errors)
    prob = 1.0 / (1.0 + np.exp(-margin))
    clipped: NDArray[np.float32] = np.clip(prob, _EDGE, 1 - _EDGE).astype(np.float32)
    return clipped


def labels(rows: int, classes: int) -> NDArray[np.int64]:
    """(N,)"""
    return np.arange(rows, dtype=np.int64) % classes


def full_rows(
    true: NDArray[np.float32], true_classes: NDArray[np.int64], classes: int
) -> NDArray[np.float32]:
    """(M, N, C): rows sum to 1, the true class has `true` (M, N)."""
    n_rows = true.shape[1]
    at = (np.arange(n_rows), true_classes)
    others = np.random.default_rng(1).exponential(1.0, (n_rows, classes)).astype(np.float32)
    others[at] = 0.0
    others /= others.sum(axis=1, keepdims=True)
    full = np.empty((len(true), n_rows, classes), dtype=np.float32)
    for member, row in enumerate(true):
        np.multiply(others, (1.0 - row)[:, None], out=full[member])
        full[member][at] = row
    return full
