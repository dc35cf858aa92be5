"""Charts of the race, one function each: candidates as lanes, the blend's loss over epochs.

Takes plain records, gives the bytes of a PNG.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from foldrace.reporting.charts.style import COLOURS, INK, MUTED, WIDTH, png, short

State = Literal[
    "goes on", "parked", "set aside", "stopped", "cut", "complete", "finished", "failed",
    "diverged", "none",
]  # fmt: skip


@dataclass(frozen=True)
class FoldStyle:
    """Colour, mark and legend of the folds in one state."""

    colour: str
    label: str
    mark: str = ""


FOLD_STYLES: dict[State, FoldStyle] = {
    "goes on": FoldStyle("#b5dcf5", "finished, candidate went on"),
    "complete": FoldStyle("#4a9fd8", "last fold: complete, joins the blend"),
    "parked": FoldStyle("#d8e8c8", "finished, candidate waits for its turn"),
    "set aside": FoldStyle("#e9dfa6", "parked in mid-training (filled: share of its epochs)"),
    "stopped": FoldStyle("#f08a4b", "finished, candidate stopped"),
    "cut": FoldStyle("#f2d43d", "stopped in mid-training (filled: share of its epochs)"),
    "finished": FoldStyle("#aab4bb", "finished, nothing decided"),
    "failed": FoldStyle("#cc79a7", "failed", "×"),
    "diverged": FoldStyle("#b59ad0", "diverged", "∞"),
    "none": FoldStyle("#f3f5f6", "not trained"),
}
"""In the order of the legend. Light, so that numbers can be read on them; hues after Okabe and Ito,
and a mark where they are close."""

_DETAILED = 36
"""Most lanes that have room for a backbone's name and for numbers."""
_COLUMN = 60
"""Lanes in a column of the dense picture."""
MOST_LANES = 4 * _COLUMN
_FULL_TEXT, _SHORT_TEXT = 5, 9
"""Folds up to which a cell has room for `+0.0031 ±0.0009`, and for `+0.0031`."""


@dataclass(frozen=True)
class Fold:
    """One fold of a candidate; `share` of its epochs was trained, in (0, 1]."""

    state: State
    share: float = 1.0
    gain: float | None = None
    gain_se: float | None = None


@dataclass(frozen=True)
class Lane:
    """One candidate with its K folds."""

    candidate: str
    backbone: str
    folds: tuple[Fold, ...]


def lanes(listed: Sequence[Lane]) -> bytes:
    """Draw one row per candidate, the first on top, and one cell per fold.

    At most `MOST_LANES` of them, in columns where they are many.
    """
    detailed = len(listed) <= _DETAILED
    rows = math.ceil(len(listed) / (1 if detailed else max(2, math.ceil(len(listed) / _COLUMN))))
    parts = [listed[i : i + rows] for i in range(0, len(listed), rows)]
    row = 0.27 if detailed else 0.165  # inches

    def draw(*columns: Axes) -> None:
        for axes, part in zip(columns, parts, strict=True):
            _lanes(axes, part, rows, detailed)
        figure = columns[0].get_figure()
        if figure is not None:
            figure.legend(handles=_legend(listed), loc="outside lower center", ncols=2)

    return png(
        draw,
        height=1.5 + row * rows,
        columns=len(parts),
        width=WIDTH + 1.0 if detailed else WIDTH + 0.6,
    )


def _lanes(axes: Axes, part: Sequence[Lane], rows: int, detailed: bool) -> None:
    k = len(part[0].folds)
    for state, style in FOLD_STYLES.items():
        _fields(axes, part, state, style)
    if detailed:
        _gains(axes, part)
    labels = [_name(lane) if detailed else lane.candidate for lane in part]
    axes.set_yticks(range(len(part)), labels, fontsize=9 if detailed else 6.5)
    axes.set_ylim(rows - 0.4, -0.6)
    axes.set_xlim(-0.005 * k, 1.005 * k)
    step = math.ceil(k / (20 if detailed else 10))
    ticks = range(0, k, step)
    named = detailed and k <= 10
    axes.set_xticks([i + 0.5 for i in ticks], [f"fold {i}" if named else f"{i}" for i in ticks])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    if not named:
        axes.set_title("fold", fontsize=9, color=MUTED, loc="center")


def _fields(axes: Axes, part: Sequence[Lane], state: State, style: FoldStyle) -> None:
    """Draw the fields of one state; one that was trained in part is filled in part."""
    found = [
        (row, k, fold.share)
        for row, lane in enumerate(part)
        for k, fold in enumerate(lane.folds)
        if fold.state == state
    ]
    if not found:
        return
    gap = min(0.06, 0.012 * len(part[0].folds))  # between two fields; they are 1 apart
    rows = [row for row, _, _ in found]
    left = [k + gap / 2 for _, k, _ in found]
    if state in ("cut", "set aside"):
        empty = FOLD_STYLES["none"].colour
        axes.barh(rows, 1 - gap, 0.8, left, color=empty, edgecolor=MUTED, linewidth=0.5)
    axes.barh(rows, [(1 - gap) * share for _, _, share in found], 0.8, left, color=style.colour)
    for row, k, _ in found if style.mark else ():
        _write(axes, row, k, style.mark, 8)


def _gains(axes: Axes, part: Sequence[Lane]) -> None:
    """Write as much of the gains as the fields have room for."""
    k = len(part[0].folds)
    if k > _SHORT_TEXT:
        return
    for row, lane in enumerate(part):
        for column, fold in enumerate(lane.folds):
            if fold.gain is None:
                continue
            shown = f"{fold.gain:+.{_digits(fold.gain)}f}"
            if k <= _FULL_TEXT and fold.gain_se is not None:
                shown += f" ±{fold.gain_se:.{_digits(fold.gain_se)}f}"
            _write(axes, row, column, shown, 7)


def _digits(value: float) -> int:
    return 4 if abs(value) < 1 else 2


def _write(axes: Axes, row: int, column: int, shown: str, size: float) -> None:
    axes.text(column + 0.5, row, shown, color=INK, fontsize=size, ha="center", va="center_baseline")


def _name(lane: Lane) -> str:
    return f"{lane.candidate}  {short(lane.backbone, 26)}"


def _legend(listed: Sequence[Lane]) -> list[Patch]:
    present = {fold.state for lane in listed for fold in lane.folds}
    return [
        Patch(facecolor=style.colour, edgecolor=MUTED, linewidth=0.4, label=_labelled(style))
        for state, style in FOLD_STYLES.items()
        if state in present
    ]


def _labelled(style: FoldStyle) -> str:
    return f"{style.mark} {style.label}".strip()


@dataclass(frozen=True)
class BlendPoint:
    """Log loss of the race's blend when so many epochs were trained."""

    epochs: int
    logloss: float
    joined: bool
    """True where a candidate had just become complete."""


def blend_loss(points: Sequence[BlendPoint], singles: Sequence[tuple[int, float]]) -> bytes:
    """Draw the blend's log loss over the epochs trained.

    `singles` are (epochs, log loss) of the best complete candidate by then.
    """
    joined = [p for p in points if p.joined]
    values = [*(p.logloss for p in points), *(loss for _, loss in singles)]

    def draw(axes: Axes) -> None:
        end = max(points[-1].epochs, singles[-1][0] if singles else 0)
        if singles:
            x, y = _to_the_end(singles, end)
            axes.step(
                x, y, where="post", color=MUTED, linestyle="--", linewidth=1.4,
                label=f"best single candidate: {singles[-1][1]:.4f}",
            )  # fmt: skip
        x, y = _to_the_end([(p.epochs, p.logloss) for p in points], end)
        axes.step(
            x, y, where="post", color=COLOURS[0], linewidth=2,
            label=f"race's blend: {points[-1].logloss:.4f}",
        )  # fmt: skip
        axes.plot(
            [p.epochs for p in joined], [p.logloss for p in joined], "o", color=COLOURS[1],
            markersize=5 if len(joined) <= 60 else 3, label="a candidate joined",
        )  # fmt: skip
        axes.set_xlabel("epochs trained, all fold trials together")
        axes.set_ylabel("OOF log loss")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
        if min(values) > 0 and max(values) > 4 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
        axes.legend()

    return png(draw, height=3.2)


def _to_the_end(points: Sequence[tuple[int, float]], end: int) -> tuple[list[int], list[float]]:
    epochs, losses = [x for x, _ in points], [y for _, y in points]
    return [*epochs, end], [*losses, losses[-1]]
