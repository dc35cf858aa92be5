"""Rows and whole groups dealt to the sides of a split, so that sizes and classes come out even.

Takes labels, groups and the sides' fractions as arrays, gives each row's or group's side. The time
grows with the rows, not with rows × classes: a million rows, 100,000 groups and 5,000 classes take
some seconds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_SIZE = 2.0  # weight of even sizes, where that of even classes is 1
_MIXED = 0.7  # least factor of a size: splits then differ as by chance, and classes stay as even


def deal_rows(labels: NDArray[np.int64], k: int, seed: int) -> NDArray[np.int64]:
    """Fold of each row, (n,), 0 .. k-1; every class is spread evenly.

    The folds of scikit-learn's StratifiedKFold, which looks at all rows once for each class.
    """
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    label = np.argsort(np.argsort(first))[inverse]  # classes by their first row
    in_order = np.sort(label)
    counts = np.array([np.bincount(in_order[i::k], minlength=len(first)) for i in range(k)])
    rng = np.random.RandomState(seed % 2**32)
    dealt = []
    for of_class in counts.T:
        folds = np.repeat(np.arange(k), of_class)
        rng.shuffle(folds)
        dealt.append(folds)
    fold = np.empty(len(labels), dtype=np.int64)
    fold[np.argsort(label, kind="stable")] = np.concatenate(dealt)
    return fold


def deal_groups(
    group: NDArray[np.int64],
    labels: NDArray[np.int64],
    size: NDArray[np.float64],
    fractions: NDArray[np.float64],
    rng: np.random.Generator,
    mixed: bool = False,
) -> NDArray[np.int64]:
    """Side of each of the G groups, (G,): an index into `fractions` (S,), which sum to 1.

    `group` (n,) is each row's group, 0 .. G-1; `size` (G,) each group's part of the whole, which
    sums to 1. The largest comes first, each to the side that lacks it most: it lowers most
    sum_s |lacking_s|² / fraction_s over the size and, with half its weight, the classes' rows. Then
    each is taken up once more, and put where it is lacked most now. No side stays empty where there
    are as many groups. Where groups have many sizes, that is one split whatever `rng` draws; with
    `mixed` a group may come before one of up to 1.4 times its size.
    """
    start, column, share, weight = _shares(group, labels, size)
    lacking = np.repeat(fractions[:, None], int(column.max()) + 1, axis=1)  # (S, C + 1)
    half, weighted = share / 2, share * weight
    order = rng.permutation(len(size))
    rows = np.bincount(group)[order] * (rng.uniform(_MIXED, 1, len(order)) if mixed else 1)
    order = order[np.argsort(-rows, kind="stable")]
    side = np.full(len(size), -1, dtype=np.int64)
    for g in (*order, *order):
        own = slice(start[g], start[g + 1])
        of = column[own]
        if side[g] >= 0:
            lacking[side[g], of] += share[own]
        side[g] = np.argmax(((lacking[:, of] - half[own]) @ weighted[own]) / fractions)
        lacking[side[g], of] -= share[own]
    for s in range(len(fractions)):  # of very few groups, a small side may have got none
        if not (side == s).any():
            several = np.flatnonzero(np.bincount(side, minlength=len(fractions))[side] > 1)
            if len(several):
                smallest = order[np.isin(order, several)][-1]
                side[smallest] = s
    return side


def _shares(
    group: NDArray[np.int64], labels: NDArray[np.int64], size: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """What each group has of each class and of the whole, without the zeros.

    Group g has the entries start[g] .. start[g + 1] of the others: the column (its class, or C for
    the whole), the share of that column, and the column's weight.
    """
    n_groups, n_classes = len(size), int(labels.max()) + 1
    pair, rows = np.unique(group * n_classes + labels, return_counts=True)
    owner, column = np.divmod(pair, n_classes)
    share = rows / np.bincount(labels)[column]
    owner = np.append(owner, np.arange(n_groups))
    column = np.append(column, np.full(n_groups, n_classes))
    share = np.append(share, size)
    order = np.argsort(owner, kind="stable")
    start = np.append(0, np.cumsum(np.bincount(owner)))
    weight = np.where(column == n_classes, _SIZE, 1 / n_classes)
    return start, column[order], share[order], weight[order]
