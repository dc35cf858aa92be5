"""Charts of candidates and classes, one function each.

Takes plain records and arrays, gives the bytes of a PNG.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from foldrace.reporting.charts.style import (
    COLOURS,
    INK,
    MARKERS,
    WIDTH,
    Palette,
    annotate,
    heat,
    letters,
    png,
    short,
)

_ROW = 0.27
"""Height of one dot's row [inches]."""


@dataclass(frozen=True)
class Curve:
    """Losses of one fold trial by epoch."""

    epochs: NDArray[np.float64]  # (E,)
    val_calibrated_logloss: NDArray[np.float64]  # (E,)
    train_loss: NDArray[np.float64]  # (E,)


@dataclass(frozen=True)
class CandidateCurves:
    """The curves of a candidate's folds."""

    label: str
    folds: tuple[Curve, ...]


@dataclass(frozen=True)
class Dot:
    """OOF accuracy of one candidate."""

    candidate: str
    backbone: str
    accuracy: float


def learning_curves(candidates: Sequence[CandidateCurves]) -> bytes:
    """Draw calibrated validation log loss on the left, training loss on the right."""

    def draw(left: Axes, right: Axes) -> None:
        for i, candidate in enumerate(candidates):
            colour = COLOURS[i % len(COLOURS)]
            marker = MARKERS[i % len(MARKERS)]
            _curve_lines(left, candidate, "val_calibrated_logloss", colour, marker)
            _curve_lines(right, candidate, "train_loss", colour, marker)
        left.set_title("Validation log loss")
        right.set_title("Training loss")
        for axes in (left, right):
            axes.set_xlabel("epoch")
            axes.locator_params(axis="x", integer=True)
        figure = left.get_figure()
        if figure is not None:
            handles, labels = left.get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=2)

    return png(draw, height=3.5 + 0.1 * len(candidates), columns=2)


def _curve_lines(
    axes: Axes, candidate: CandidateCurves, column: str, colour: str, marker: str
) -> None:
    for fold in candidate.folds:
        values = getattr(fold, column)
        axes.plot(fold.epochs, values, color=colour, linewidth=0.8, alpha=0.35)
    epochs, mean = shared_mean(candidate.folds, column)
    axes.plot(
        epochs, mean, color=colour, linewidth=2, marker=marker, markersize=4.5,
        markevery=max(1, len(epochs) // 8), label=candidate.label,
    )  # fmt: skip


def shared_mean(
    folds: Sequence[Curve], column: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Epochs (E,) that every fold has reached, and the mean over the folds there (E,).

    A mean over the folds that happened to last longest would jump where one ends.
    """
    shared = min((len(fold.epochs) for fold in folds), default=0)
    if shared == 0:
        return np.empty(0), np.empty(0)
    values = np.stack([getattr(fold, column)[:shared] for fold in folds])  # (K, E)
    return folds[0].epochs[:shared], values.mean(axis=0)


def accuracy(dots: Sequence[Dot], blend: float | None, palette: Palette) -> bytes:
    """Draw one dot a candidate, best on top, and the blend as a line."""
    shown = sorted({dot.backbone for dot in dots})

    def draw(axes: Axes) -> None:
        for row, dot in enumerate(dots):
            colour, marker = palette[dot.backbone]
            axes.plot(dot.accuracy, row, marker, color=colour, markersize=7)
        axes.set_yticks(range(len(dots)), [dot.candidate for dot in dots])
        axes.set_ylim(len(dots) - 0.4, -0.6)
        axes.set_xlabel("OOF accuracy")
        axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.4g} %")
        axes.margins(x=0.08)
        handles = [
            Line2D(
                [], [], color=palette[b][0], marker=palette[b][1], linestyle="", label=short(b, 44)
            )
            for b in shown
        ]
        if blend is not None:
            handles.append(axes.axvline(blend, color=INK, linestyle="--", label="blend"))
        figure = axes.get_figure()
        if figure is not None:
            figure.legend(handles=handles, loc="outside lower center", ncols=2)

    return png(draw, height=1.3 + _ROW * len(dots) + 0.1 * len(shown))


def correlation(values: NDArray[np.float64], ids: list[str], names: list[str]) -> bytes:
    """Draw (M, M) correlations in the order given; rows have names and ids, columns ids."""
    n = len(ids)
    rows = [f"{name}  {id_}" for id_, name in zip(ids, names, strict=True)]
    off_diagonal = values[~np.eye(n, dtype=bool)]
    low = min(0.9, math.floor(10 * float(off_diagonal.min())) / 10)
    size = 9 if n <= 20 else 7.5
    side = n * (0.4 if n <= 14 else 0.25 if n <= 20 else 0.19)  # inches of the map
    columns = [short(id_, 18) for id_ in ids]
    left, below = (size / 72 * 0.62 * max(map(letters, names)) for names in (rows, columns))

    def draw(axes: Axes) -> None:
        image = heat(axes, values, rows, columns, low, 1.0, "cividis", size)
        if n <= 14:
            shown = [[f"{v:.2f}" for v in row] for row in values]
            annotate(axes, image, shown, 8)
        figure = axes.get_figure()
        if figure is not None:
            figure.colorbar(image, ax=axes, shrink=0.7).outline.set_visible(False)  # type: ignore[operator,unused-ignore]

    return png(draw, height=max(1.6, side) + below + 0.2, width=max(WIDTH, side + left + 1.2))


def confusion(counts: NDArray[np.int64], names: Sequence[str]) -> bytes:
    """Draw (C, C) counts, one row per label; the colour is the share of the row."""
    n = len(names)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)

    def draw(axes: Axes) -> None:
        size = 9.5 if n <= 15 else 8 if n <= 30 else 7
        labels = [short(name, 24) for name in names]
        image = heat(axes, shares, labels, labels, 0.0, 1.0, "Blues", size)
        shown = [[f"{v}" if v else "" for v in row] for row in counts]
        annotate(axes, image, shown, 9 if n <= 15 else 6.5)
        axes.set_xlabel("predicted")
        axes.set_ylabel("label")

    side = min(9.0, 2.6 + 0.26 * n)
    return png(draw, height=side, width=max(WIDTH, side))
