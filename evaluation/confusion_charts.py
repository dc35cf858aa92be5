"""The confusion matrix as a picture that can be read at 10 classes and at 396.

Takes counts, gives the bytes of a PNG. Few classes: the whole matrix. Many: the classes that are
confused most, ordered so that those confused with one another lie side by side, and all others
together in one row and column, so that the rows still add up.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from foldrace.evaluation.scores import ConfusedPair, confused_pairs
from foldrace.reporting.charts.candidates import confusion
from foldrace.reporting.charts.style import COLOURS, MUTED, WIDTH, png, short

WHOLE = 40
"""Most classes whose matrix is drawn whole."""
_SHOWN = 28
"""Classes of the part that is drawn of a larger one."""
_PAIRS = 30
OTHERS = "all others"


def confusion_png(counts: NDArray[np.int64], names: tuple[str, ...]) -> bytes:
    """Draw (C, C) counts, row = label."""
    if len(names) <= WHOLE:
        return confusion(counts, names)
    shown = most_confused(counts, _SHOWN)
    return confusion(with_others(counts, shown), [*(names[c] for c in shown), OTHERS])


def most_confused(counts: NDArray[np.int64], most: int) -> list[int]:
    """Classes of the most frequent confusions, each beside what it is most confused with."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    both = wrong + wrong.T
    upper = np.triu(both)
    chosen: dict[int, None] = {}
    for place in np.argsort(-upper, axis=None, kind="stable")[: np.count_nonzero(upper)]:
        pair = divmod(int(place), len(counts))
        if len(chosen.keys() | set(pair)) > most:
            break
        chosen |= dict.fromkeys(pair)
    return _side_by_side(both, list(chosen)) if chosen else list(range(min(most, len(counts))))


def _side_by_side(both: NDArray[np.int64], classes: list[int]) -> list[int]:
    """The classes in an order in which each follows the one that it is most confused with."""
    order, left = [classes[0]], classes[1:]
    while left:
        nearest = max(left, key=lambda c: (both[order[-1], c], max(both[o, c] for o in order)))
        order.append(nearest)
        left.remove(nearest)
    return order


def with_others(counts: NDArray[np.int64], shown: list[int]) -> NDArray[np.int64]:
    """(S + 1, S + 1) counts of the shown classes, and of all others together."""
    part = np.full(len(counts), len(shown))
    part[shown] = np.arange(len(shown))
    size = len(shown) + 1
    place = (part[:, None] * size + part[None, :]).ravel()
    return np.bincount(place, counts.ravel(), size * size).reshape(size, size).astype(np.int64)


def pairs_png(counts: NDArray[np.int64], names: tuple[str, ...]) -> bytes | None:
    """Draw the most frequent confusions as bars; None where there is no confusion."""
    pairs = list(confused_pairs(counts, names))[:_PAIRS]
    if not pairs:
        return None

    def draw(axes: Axes) -> None:
        bars = axes.barh(range(len(pairs)), [p.rows for p in pairs], color=COLOURS[0], height=0.7)
        axes.bar_label(bars, [_bar_text(p) for p in pairs], padding=3, fontsize=8.5, color=MUTED)
        labels = [f"{short(p.label, 24)} → {short(p.predicted, 24)}" for p in pairs]
        axes.set_yticks(range(len(pairs)), labels)
        axes.set_ylim(len(pairs) - 0.4, -0.6)
        axes.set_xlim(0, 1.3 * pairs[0].rows)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("rows of the label that are predicted as the other class")
        axes.grid(axis="y", visible=False)

    return png(draw, height=0.9 + 0.24 * len(pairs), width=WIDTH)


def _bar_text(pair: ConfusedPair) -> str:
    return f"{pair.rows:,} ({100 * pair.share:.0f} %)"
