"""The loss of softmax(sum of a_m z_m + sum of z_m W_m + b), and where it is least.

Takes a `Pool`, from which the centred log-probabilities z of a few members are read once, as a
stack (m, N, C): in memory, or in a temporary file where they are many. Every pass converts one
block of rows after another to float64. The loss is convex. Its targets may be smoothed as in Platt,
Probabilistic Outputs for Support Vector Machines, 1999.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray

from foldrace.core.errors import EnvironmentProblem
from foldrace.ensemble.pool import Pool
from foldrace.ensemble.pooling import centred_logs

_IN_MEMORY = 1 << 27
"""Numbers in a stack that is kept in memory: 512 MiB. A larger one lies in a file, from which the
system keeps what fits."""
_READ_BLOCK = 1 << 15
"""Numbers centred at a time, in float64: 256 KiB, so that they stay in the cache."""


def log_stack(
    pool: Pool, members: NDArray[np.intp], rows: NDArray[np.intp] | None = None
) -> NDArray[np.float32]:
    """(m, n, C) centred log-probabilities of these members on n rows, or on all.

    A few more (N, C) float32 are in memory while they are read.
    """
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
    step = max(1, _READ_BLOCK // kept.shape[1])
    for start in range(0, len(kept), step):
        block = slice(start, start + step)
        centred[block] = centred_logs(kept[block])
    return centred


def thinned_rows(pool: Pool, member: int, most: int) -> NDArray[np.intp]:
    """At most `most` rows, evenly from all by class and by what the member gives to it.

    All members decide a tie: a fair sample in a fair order, and the same whatever the order of the
    pool's rows.
    """
    of_all = np.round(pool.true_prob.mean(axis=0), 6)
    order = np.lexsort((of_all, pool.true_prob[member], pool.labels))
    return order[:: math.ceil(len(order) / max(1, most))]


def _in_file(
    logs: Iterable[NDArray[np.float32]], shape: tuple[int, int, int]
) -> NDArray[np.float32]:
    """The stack in a file that has no name and goes with the array; read-only.

    It is written before it is mapped: a full disk is then an error and not the end of the process.
    """
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


LARGEST_SCALE = 20.0
"""Largest a_m: where every row is right, the loss falls for ever with the sum of the a_m."""
_DIGITS = 6
"""Digits of log-probabilities that count: the order of members must not choose between equals."""
_BLOCK = 1 << 17
"""Numbers converted to float64 at a time: 1 MiB, so that they stay in the cache."""


@dataclass(frozen=True, eq=False)
class Coefficients:
    """Coefficients of m members, the first J of which have a matrix."""

    scales: NDArray[np.float64]  # (m,) a
    matrices: NDArray[np.float64]  # (J, C, C) W
    intercept: NDArray[np.float64]  # (C,) b


@dataclass(frozen=True, eq=False)
class Objective:
    """The mean loss + penalty / (2 N) * (|W|^2 + |b|^2), to be minimised."""

    stack: NDArray[np.float32]  # (m, N, C)
    labels: NDArray[np.int64]  # (N,)
    bounds: NDArray[np.float64]
    """(m, 2) the least and the largest a_m."""
    penalty: float = math.inf
    """Penalty on the scale of the sum over rows; infinite: W and b are 0."""
    runner_up: NDArray[np.int64] | None = None
    """(N,) classes; one row more, the mean of the rows with these labels, counts beside the N. Rows
    that are all right do not promise that the next one is."""


def scales_alone(scales: NDArray[np.float64], n_classes: int, n_matrices: int = 0) -> Coefficients:
    """Log-linear pooling; with matrices of zeros for a search to start from."""
    return Coefficients(scales, np.zeros((n_matrices, n_classes, n_classes)), np.zeros(n_classes))


def minimise(objective: Objective, start: Coefficients) -> Coefficients:
    """The minimum, by L-BFGS-B from `start`, whose matrices say how many there are."""
    from scipy.optimize import minimize

    free = math.isfinite(objective.penalty)
    others = start.matrices.size + start.intercept.size if free else 0
    bounds = np.concatenate([objective.bounds, np.tile([-np.inf, np.inf], (others, 1))])
    # The penalty curves the loss far more than the data do: in these units both do alike.
    units = np.ones(len(bounds))
    units[len(start.scales) :] /= math.sqrt(1.0 + objective.penalty / len(objective.labels))

    def scaled(vector: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        loss, gradient = _loss_and_gradient(objective, _unpacked(vector * units, start))
        return loss, gradient * units

    first = np.concatenate([start.scales, start.matrices.ravel(), start.intercept])
    found = minimize(
        scaled,
        first[: len(bounds)] / units,
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options={"maxiter": 300, "maxcor": 20, "ftol": 1e-10, "gtol": 1e-7},
    )
    return _unpacked(found.x * units, start)


def row_losses(
    stack: NDArray[np.float32], labels: NDArray[np.int64], coefficients: Coefficients
) -> NDArray[np.float64]:
    """(N,) the log loss of each row of stack (m, N, C) for labels (N,), without a penalty."""
    blocks = _blocks(stack, coefficients)
    return np.concatenate([
        _block_losses(logits, labels[start : start + len(logits)])[0]
        for start, _, logits in blocks
    ])  # fmt: skip


def runner_up(stack: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """(N,) the likeliest class but the label, for the members of stack (m, N, C).

    The lowest on a tie up to rounding; the label itself where there is no other.
    """
    m, _, n_classes = stack.shape
    if n_classes < 2:
        return labels
    found = np.empty_like(labels)
    for start, _, logits in _blocks(stack, scales_alone(np.full(m, 1.0 / m), n_classes)):
        rows = np.arange(len(logits))
        logits[rows, labels[start : start + len(rows)]] = -np.inf
        found[start : start + len(rows)] = np.round(logits, _DIGITS).argmax(axis=1)
    return found


def _unpacked(vector: NDArray[np.float64], like: Coefficients) -> Coefficients:
    """The coefficients in a vector; one that ends after the scales has W = 0 and b = 0."""
    m, size = len(like.scales), like.matrices.size
    if len(vector) == m:
        return Coefficients(vector, np.zeros_like(like.matrices), np.zeros_like(like.intercept))
    matrices = vector[m : m + size].reshape(like.matrices.shape)
    return Coefficients(vector[:m], matrices, vector[m + size :])


def _loss_and_gradient(objective: Objective, at: Coefficients) -> tuple[float, NDArray[np.float64]]:
    """At these coefficients; the gradient as the vector that `_unpacked` reads."""
    n_rows, free = len(objective.labels), math.isfinite(objective.penalty)
    loss, scales = 0.0, np.zeros_like(at.scales)
    matrices, intercept = np.zeros_like(at.matrices), np.zeros_like(at.intercept)
    for start, logs, logits in _blocks(objective.stack, at):
        rows = slice(start, start + len(logits))
        others = None if objective.runner_up is None else objective.runner_up[rows]
        losses, residual = _block_losses(logits, objective.labels[rows], others, 1.0 / (n_rows + 1))
        loss += float(losses.sum())
        scales += logs.reshape(len(logs), -1) @ residual.ravel()
        if free:
            intercept += residual.sum(axis=0)
            for owner in range(len(matrices)):
                matrices[owner] += logs[owner].T @ residual
    if not free:
        return loss / n_rows, scales / n_rows
    loss += objective.penalty / 2 * float((at.matrices**2).sum() + (at.intercept**2).sum())
    matrices += objective.penalty * at.matrices
    intercept += objective.penalty * at.intercept
    return loss / n_rows, np.concatenate([scales, matrices.ravel(), intercept]) / n_rows


def _blocks(
    stack: NDArray[np.float32], at: Coefficients
) -> Iterator[tuple[int, NDArray[np.float64], NDArray[np.float64]]]:
    """Blocks of n rows: the first row, logs (m, n, C), logits (n, C)."""
    m, n_rows, n_classes = stack.shape
    step = max(1, _BLOCK // (m * n_classes))
    has_matrices = bool(at.matrices.any())
    for start in range(0, n_rows, step):
        logs = stack[:, start : start + step].astype(np.float64)
        logits = (at.scales @ logs.reshape(m, -1)).reshape(-1, n_classes)
        logits += at.intercept
        if has_matrices:
            for owner, matrix in enumerate(at.matrices):
                logits += logs[owner] @ matrix
        yield start, logs, logits


def _block_losses(
    logits: NDArray[np.float64],
    labels: NDArray[np.int64],
    runner_up: NDArray[np.int64] | None = None,
    share: float = 0.0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The log losses (n,), and p - y (n, C), made in the memory of the logits.

    With `runner_up` the targets are 1 - share of the label and a share of these classes.
    """
    rows = np.arange(len(labels))
    logits -= logits.max(axis=1, keepdims=True)
    targets = [(labels, 1.0)] if runner_up is None else [(labels, 1.0 - share), (runner_up, share)]
    of_truth = np.zeros(len(labels))
    for classes, part in targets:
        of_truth += part * logits[rows, classes]
    residual = np.exp(logits, out=logits)
    sums = residual.sum(axis=1)
    residual /= sums[:, None]
    for classes, part in targets:
        residual[rows, classes] -= part
    return np.log(sums) - of_truth, residual
