"""Charts of the blend, one function each: weights, rounds, loss against time, reliability.

Takes plain records, gives the bytes of a PNG.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from foldrace.reporting.charts.style import COLOURS, INK, MUTED, WIDTH, Palette, png
from foldrace.reporting.formats import difference
from foldrace.run_folder.blend_records import CurvePoint, Reliability

_ROW = 0.27
"""Height of one horizontal bar [inches]."""
_GAIN_COLOUR = "#8a959e"
_NUMBERED = 15
"""Most points of a curve that have room for a number each."""


@dataclass(frozen=True)
class Bar:
    """A blend member's weight, and what the blend loses without it."""

    label: str
    backbone: str
    weight: float
    gain: float | None


def weights(bars: Sequence[Bar], palette: Palette) -> bytes:
    """Draw one bar a member, heaviest on top, and the gains beside them where any is known."""
    with_gains = any(bar.gain is not None for bar in bars)

    def draw(left: Axes, right: Axes | None = None) -> None:
        values = [bar.weight for bar in bars]
        colours = [palette[bar.backbone][0] for bar in bars]
        _bars(left, values, colours, [_weight(value) for value in values])
        left.set_yticks(range(len(bars)), [bar.label for bar in bars])
        left.set_xlabel("weight in the blend")
        if right is not None:
            gains = [bar.gain for bar in bars]
            shown = ["not measured" if gain is None else difference(gain) for gain in gains]
            _bars(right, [gain or 0.0 for gain in gains], [_GAIN_COLOUR] * len(bars), shown)
            right.set_yticks([])
            right.spines["left"].set_visible(False)
            right.axvline(0.0, color=INK, linewidth=0.8)
            right.set_xlabel("rise of the OOF log loss without it")

    return png(
        draw,
        height=0.9 + _ROW * len(bars),
        columns=2 if with_gains else 1,
        width=WIDTH + 1.4 if with_gains else WIDTH,
    )


def _weight(value: float) -> str:
    return "<0.001" if 0 < value < 0.0005 else f"{value:.3f}"


def _bars(axes: Axes, values: list[float], colours: list[str], shown: list[str]) -> None:
    drawn = axes.barh(range(len(values)), values, color=colours, height=0.7)
    axes.bar_label(drawn, shown, padding=3, fontsize=8.5, color=MUTED)
    axes.set_ylim(len(values) - 0.4, -0.6)
    low, high = min(0.0, *values), max(0.0, *values)
    room = (high - low) * (0.5 if low < 0 else 0.3) or 1.0  # for the numbers beside the bars
    axes.set_xlim(low - room if low < 0 else 0.0, high + room)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.3g}")
    axes.grid(axis="y", visible=False)


def trajectory(
    rounds: Sequence[int], losses: Sequence[float], best_single: float, bound: float | None
) -> bytes:
    """Draw the blend's OOF log loss after each round.

    Lines beside it are the best single member and the loss below which no weights reach.
    """
    digits = 4 if max(losses) - min(losses) > 0.01 else 6

    def draw(axes: Axes) -> None:
        best = int(np.argmin(losses))
        axes.plot(rounds, losses, color=COLOURS[0], linewidth=2, label="blend")
        axes.plot(
            rounds[best], losses[best], "o", color=COLOURS[1], markersize=8,
            label=f"least: {losses[best]:.{digits}f} at round {rounds[best]}",
        )  # fmt: skip
        if math.isfinite(best_single):
            axes.axhline(
                best_single, color=MUTED, linestyle="--", linewidth=1.2,
                label=f"best single member: {best_single:.{digits}f}",
            )  # fmt: skip
        if bound is not None:
            axes.axhline(
                bound, color=COLOURS[2], linestyle=":", linewidth=1.8,
                label=f"lower bound for any weights: {bound:.{digits}f}",
            )  # fmt: skip
        axes.set_xlabel("round")
        axes.set_ylabel("OOF log loss")
        axes.locator_params(axis="x", integer=True)
        axes.legend()

    return png(draw, height=3.2)


def loss_against_time(curve: Sequence[CurvePoint], chosen: tuple[float, float] | None) -> bytes:
    """Draw the least OOF log loss within each limit of time.

    `chosen` is the blend's own (ms per image, OOF log loss).
    """
    points = sorted(curve, key=lambda p: p.ms_per_image)
    times = [p.ms_per_image for p in points]

    def draw(axes: Axes) -> None:
        axes.plot(
            times, [p.oof_logloss for p in points], "o-", color=COLOURS[0], markersize=4.5,
            drawstyle="steps-post", label="best blend within the time",
        )  # fmt: skip
        if len(points) <= _NUMBERED:
            for p in points:
                axes.annotate(
                    str(p.members), (p.ms_per_image, p.oof_logloss), (4, 5),
                    textcoords="offset points", fontsize=8, color=MUTED,
                )  # fmt: skip
        if chosen is not None:
            axes.plot(*chosen, "D", color=COLOURS[1], markersize=8, label="this blend")
        if times[0] > 0 and times[-1] > 20 * times[0]:
            axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.set_xlabel("ms per image")
        axes.set_ylabel("OOF log loss")
        axes.legend()

    return png(draw, height=3.2)


def reliability(panels: Sequence[tuple[str, Reliability]]) -> bytes:
    """Draw accuracy against confidence, and below it the rows of each bin; a column a panel."""
    n = len(panels)
    most = max(b.rows for _, found in panels for b in found.bins)

    def draw(*axes: Axes) -> None:
        for above, below, (title, found) in zip(axes[:n], axes[n:], panels, strict=True):
            _accuracy_of_bins(above, found)
            _rows_of_bins(below, found)
            above.set_title(title)
            below.set_ylim(0.5, 0.5 * (2 * most) ** 2)  # half of it for the numbers
        axes[0].set_ylabel("accuracy")
        axes[n].set_ylabel("rows, log scale")

    return png(draw, height=4.9, columns=n, rows=(2.4, 1.0))


def _accuracy_of_bins(axes: Axes, found: Reliability) -> None:
    bins = [b for b in found.bins if b.rows]
    confidence = [b.confidence for b in bins]
    accuracy = [b.accuracy for b in bins]
    errors = [math.sqrt(b.accuracy * (1 - b.accuracy) / b.rows) for b in bins]
    axes.plot([0, 1], [0, 1], color=MUTED, linestyle="--", linewidth=1.0, label="calibrated")
    axes.errorbar(
        confidence, accuracy, errors, fmt="o-", color=COLOURS[0], linewidth=1.4, markersize=5,
        capsize=2, label=f"ECE {found.ece:.4f}",
    )  # fmt: skip
    axes.set(xlim=(0, 1.02), ylim=(-0.02, 1.04))
    axes.tick_params(labelbottom=False)
    axes.legend(loc="lower right")


def _rows_of_bins(axes: Axes, found: Reliability) -> None:
    bins = [b for b in found.bins if b.rows]
    drawn = axes.bar(
        [b.confidence for b in bins], [b.rows for b in bins], width=0.035, color=COLOURS[4]
    )
    axes.bar_label(
        drawn, [f"{b.rows:,}" for b in bins], rotation=90, padding=2, fontsize=7, color=INK
    )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("confidence")
    axes.grid(axis="x", visible=False)
