"""The members that a blend may choose from, and the rows that a choice may look at.

`MemberRows` holds everything that is known of M members on N scored rows; it gives a `Pool`, which
is what a method sees: all rows, or one side of a split with the temperatures fitted on its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from foldrace.core.metrics import log_loss_of_true
from foldrace.core.temperature import at_temperature, part_temperatures, true_prob_at
from foldrace.ensemble.blend import first_of_equals
from foldrace.ensemble.uncertainty import Groups, whole_group_parts
from foldrace.run_folder.variants import RAW

_PARTS = 5
_SEED = 0
_ABOVE_ZERO = 1e-3
"""Rounding may lift a float16 log-probability above 0, by less than this."""


@dataclass(frozen=True)
class Member:
    """One set of OOF probabilities: a candidate's variant, or predictions made elsewhere."""

    candidate: str
    variant: str = RAW
    backbone: str = ""
    run: str = ""
    """The run folder that holds it; empty: the one that is blended."""

    @property
    def rank(self) -> tuple[str, str, bool, str]:
        """Ties go to the member of the lowest rank: this run's, the oldest candidate's, raw."""
        return self.run, self.candidate, self.variant != RAW, self.variant


@dataclass(frozen=True, eq=False)
class Pool:
    """M members on N rows, after the members' temperatures: what a method looks at."""

    members: tuple[Member, ...]
    true_prob: NDArray[np.floating]
    """(M, N) probability of the true class."""
    labels: NDArray[np.int64]
    """(N,)"""
    n_classes: int
    log_prob: Callable[[int], NDArray[np.float32]]
    """Member -> (N, C) natural-log probabilities; rows of probabilities sum to 1. Read anew at
    each call: (M, N, C) may be larger than any memory."""
    groups: Groups = None

    def take(self, members: NDArray[np.intp]) -> Pool:
        """Only these members, in this order."""
        return replace(
            self,
            members=tuple(self.members[i] for i in members),
            true_prob=self.true_prob[members],
            log_prob=lambda member: self.log_prob(int(members[member])),
        )


@dataclass(frozen=True, eq=False)
class MemberRows:
    """M members on all N scored rows, with the temperatures of every side of the cross-fitting.

    Arrays may be memory-mapped. `parts` are the K parts that are held out in turn.
    """

    members: tuple[Member, ...]
    labels: NDArray[np.int64]  # (N,)
    parts: NDArray[np.int64]  # (N,) 0..K-1
    n_classes: int
    temperatures: NDArray[np.float64]
    """(1 + K, M): [0] fitted on all rows, [1 + k] on the rows outside part k."""
    raw: NDArray[np.floating]
    """(M, N) probability of the true class, uncalibrated."""
    calibrated: NDArray[np.floating]
    """(1 + K, M, N) the same at `temperatures`."""
    read: Callable[[int], NDArray[np.float32]]
    """Member -> (N, C) uncalibrated log-probabilities."""
    duplicates: tuple[tuple[Member, ...], ...] = ()
    """Members with the same OOF probabilities: the first of each is in `members`, the rest not."""
    groups: Groups = None
    """(N,) rows of one group are not independent; None: all are."""

    @property
    def n_parts(self) -> int:
        """Number K of parts that are held out in turn."""
        return len(self.temperatures) - 1

    def pool(self, calibrated: bool) -> Pool:
        """All rows; calibrated: with the temperatures fitted on them."""
        return self._rows(None, None, calibrated)

    def training(self, part: int, calibrated: bool) -> Pool:
        """The rows outside the part; calibrated: with the temperatures fitted on them."""
        return self._rows(part, np.flatnonzero(self.parts != part), calibrated)

    def scored(self, part: int, calibrated: bool) -> Pool:
        """All rows with the temperatures of `training`."""
        return self._rows(part, None, calibrated)

    def _rows(self, part: int | None, rows: NDArray[np.intp] | None, calibrated: bool) -> Pool:
        """`rows` None: all of them, where they lie."""
        index = 0 if part is None else 1 + part
        source = self.calibrated[index] if calibrated else self.raw
        temperatures = self.temperatures[index] if calibrated else np.ones(len(self.members))
        return Pool(
            members=self.members,
            true_prob=source if rows is None else take_rows(source, rows),
            labels=self.labels if rows is None else self.labels[rows],
            n_classes=self.n_classes,
            log_prob=lambda m: at_temperature(
                self.read(m) if rows is None else self.read(m)[rows], float(temperatures[m])
            ),
            groups=self.groups if rows is None or self.groups is None else self.groups[rows],
        )


def take_rows(true_prob: NDArray[np.floating], rows: NDArray[np.intp]) -> NDArray[np.floating]:
    """(M, n) of (M, N), each member's rows adjacent.

    `true_prob[:, rows]` would lay the members side by side, and every pass over one of them would
    then read them all.
    """
    return np.take(np.asarray(true_prob), rows, axis=1)


def cross_fit_parts(folds: ArrayLike, groups: Groups = None) -> NDArray[np.int64]:
    """(N,) the part 0..K-1 of each row: its fold, or a fixed random fifth where there is one fold.

    One fold is `k: 1`; its parts are made of whole groups, where there are several. Raises
    ValueError on fewer than two rows or values that are no integers.
    """
    values = np.asarray(folds)
    if values.ndim != 1:
        raise ValueError(f"folds have shape {values.shape}, should be (rows,)")
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"folds have the type {values.dtype}, should be an integer type")
    if len(values) < 2:
        raise ValueError("one row cannot be cross-fitted: at least 2 are needed")
    names, parts = np.unique(values, return_inverse=True)
    if len(names) > 1:
        return parts.astype(np.int64, copy=False)
    order = np.random.default_rng(_SEED).permutation(len(values))
    drawn = np.empty(len(values), dtype=np.int64)
    if groups is not None and (groups != groups[0]).any():
        drawn[order] = whole_group_parts(groups[order], _PARTS)
    else:
        drawn[order] = np.arange(len(values)) % min(_PARTS, len(values))
    return drawn


def member_rows(
    log_probs: Sequence[NDArray[np.floating]],
    labels: ArrayLike,
    folds: ArrayLike,
    members: Sequence[Member] | None = None,
    groups: ArrayLike | None = None,
) -> MemberRows:
    """Fit the temperatures of M members held in memory.

    log_probs: for each member its (N, C) natural-log probabilities, -inf allowed; labels (N,) in
    0..C-1; folds and groups (N,) as for `cross_fit_parts`. Raises ValueError on other shapes or
    values.
    """
    numbers = None if groups is None else np.unique(groups, return_inverse=True)[1].reshape(-1)
    if numbers is not None and numbers.shape != np.shape(labels):
        raise ValueError(f"groups have shape {numbers.shape}, should be {np.shape(labels)}")
    truth, parts = np.asarray(labels), cross_fit_parts(folds, numbers)
    check_log_probs(log_probs, len(truth))
    _check_labels(truth, len(parts), log_probs[0].shape[1])
    named = default_members(len(log_probs)) if members is None else tuple(members)
    if len(named) != len(log_probs):
        raise ValueError(f"{len(named)} members are named, should be {len(log_probs)}")
    columns = [_columns(log_prob, truth, parts) for log_prob in _checked(log_probs)]
    return MemberRows(
        members=named,
        labels=truth.astype(np.int64, copy=False),
        parts=parts,
        n_classes=log_probs[0].shape[1],
        temperatures=np.stack([temperatures for temperatures, _ in columns], axis=1),
        raw=np.stack([true_prob[0] for _, true_prob in columns]),
        calibrated=np.stack([true_prob[1:] for _, true_prob in columns], axis=1),
        read=lambda member: np.asarray(log_probs[member], dtype=np.float32),
        groups=numbers,
    )


def kept_rows(rows: MemberRows, kept: NDArray[np.intp]) -> MemberRows:
    """The same members as if only these of their rows existed, at least 2.

    Temperatures and parts are made anew of these rows alone: nothing of the others is left in them.
    """
    labels = rows.labels[kept]
    groups = None if rows.groups is None else rows.groups[kept]
    parts = cross_fit_parts(rows.parts[kept], groups)
    columns = [_columns(rows.read(m)[kept], labels, parts) for m in range(len(rows.members))]
    return replace(
        rows,
        labels=labels,
        parts=parts,
        temperatures=np.stack([temperatures for temperatures, _ in columns], axis=1),
        raw=np.stack([true_prob[0] for _, true_prob in columns]),
        calibrated=np.stack([true_prob[1:] for _, true_prob in columns], axis=1),
        read=lambda member: rows.read(member)[kept],
        groups=groups,
    )


def _columns(
    log_prob: NDArray[np.floating], labels: NDArray[np.int64], parts: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """(1 + K,) temperatures of one member, and (2 + K, N) its true-class probabilities.

    The probabilities are without and with each of the temperatures.
    """
    temperatures = part_temperatures(log_prob, labels, parts)
    return temperatures, np.stack([true_prob_at(log_prob, labels, t) for t in (1, *temperatures)])


def _checked(log_probs: Sequence[NDArray[np.floating]]) -> Iterator[NDArray[np.float32]]:
    """Each member's log-probabilities; ValueError where one is no logarithm of a probability."""
    for member, given in enumerate(log_probs):
        log_prob = np.asarray(given, dtype=np.float32)
        wrong = ~(log_prob <= _ABOVE_ZERO).all(axis=1)
        if wrong.any():
            row = int(wrong.argmax())
            value = log_prob[row][~(log_prob[row] <= _ABOVE_ZERO)][0]
            raise ValueError(
                f"member {member}, row {row}: {value} is not the logarithm of a probability"
            )
        yield log_prob


def _check_labels(labels: NDArray[np.int64], n_rows: int, n_classes: int) -> None:
    if labels.shape != (n_rows,) or not np.issubdtype(labels.dtype, np.integer):
        given = f"labels have shape {labels.shape} and the type {labels.dtype}"
        raise ValueError(f"{given}, should be ({n_rows},) like the folds, of an integer type")
    wrong = (labels < 0) | (labels >= n_classes)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(f"row {row}: the label is {labels[row]}, should be 0 to {n_classes - 1}")


def default_members(count: int) -> tuple[Member, ...]:
    """Names for arrays without a run folder: m0000, m0001, ..."""
    return tuple(Member(f"m{i:04d}") for i in range(count))


def check_log_probs(log_probs: Sequence[NDArray[np.floating]], n_rows: int) -> None:
    """Raise ValueError unless all are (N, C) of one C."""
    shapes = sorted({array.shape for array in log_probs})
    if len(shapes) != 1 or len(shapes[0]) != 2 or shapes[0][0] != n_rows or shapes[0][1] == 0:
        raise ValueError(
            f"log-probabilities have shapes {shapes}, should all have one, ({n_rows}, classes)"
        )


def own_losses(pool: Pool) -> NDArray[np.float64]:
    """(M,) log loss of each member alone, in nats."""
    return np.array([log_loss_of_true(row) for row in pool.true_prob])


def distinct_members(pool: Pool, forced: tuple[int, ...] = ()) -> NDArray[np.intp]:
    """One member of each set of exact duplicates, ascending: the lowest, or those forced.

    Where members have equal say, a copy would count twice.
    """
    losses = own_losses(pool)
    if not forced:
        return first_of_equals(pool.true_prob, losses)
    first = np.unique(forced)
    order = np.concatenate([first, np.setdiff1d(np.arange(len(losses)), first)])
    distinct = order[first_of_equals(pool.true_prob[order], losses[order])]
    return np.union1d(distinct, first)
