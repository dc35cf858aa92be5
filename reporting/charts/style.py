"""The style that all charts share: size, fonts, colours, labels, and the way to a PNG.

Takes a function that draws on axes, gives the bytes of a PNG. No pyplot: figures are objects, so
that nothing is left behind and any thread may draw.
"""

from __future__ import annotations

import io
import itertools
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray

from foldrace.reporting.fonts import chart_families

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

WIDTH = 7.6
"""Inches; with `_DPI` about twice the pixels that the page gives a chart."""
_DPI = 160

# Okabe and Ito (2008), without yellow and black: told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, MUTED, GRID = "#1f2933", "#5b6770", "#e3e7ea"

_STYLE: dict[RcKeyType, Any] = {
    "text.parse_math": False,  # a class may be called $5$
    "axes.edgecolor": "#aab4bb",
    "axes.labelcolor": MUTED,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "font.size": 9.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}

SOFTWARE = "Foldrace"
"""What the pictures say that they were made with."""


def png(
    draw: Callable[..., None],
    height: float,
    columns: int = 1,
    width: float = WIDTH,
    rows: Sequence[float] = (1.0,),
) -> bytes:
    """Draw a figure of `width` x `height` inches.

    `draw` gets its axes row by row: `columns` side by side, in `rows` of these relative heights.
    """
    with (
        matplotlib.rc_context({**_STYLE, "font.family": chart_families()}),
        warnings.catch_warnings(),
    ):
        # A class name may be in a script that no font here has: the page itself shows it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(width, height), dpi=_DPI, layout="compressed")
        grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=list(rows))
        draw(*grid.flat)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", facecolor="white", metadata={"Software": SOFTWARE})
    return buffer.getvalue()


def short(label: str, limit: int = 30) -> str:
    """Cut the middle out of a long label.

    `limit` counts Latin letters; Hangul and other wide ones take one and a half.
    """
    clean = "".join(c if c.isprintable() else " " for c in unicodedata.normalize("NFC", label))
    if letters(clean) <= limit:
        return clean
    half = (limit - 1) // 2
    tail = _fitting(clean[::-1], half)[::-1]
    return f"{_fitting(clean, limit - 1 - half)}…{tail}"


def letters(label: str) -> float:
    """Width of a label [Latin letters]."""
    return sum(map(_width, label))


def _fitting(text: str, limit: float) -> str:
    """Start of the text that is no wider than the limit."""
    widths = itertools.accumulate(map(_width, text))
    return text[: sum(width <= limit for width in widths)]


def _width(character: str) -> float:
    return 1.5 if unicodedata.east_asian_width(character) in "WF" else 1.0


Palette = dict[str, tuple[str, str]]
"""Colour and marker of each name."""


def palette(names: Iterable[str]) -> Palette:
    """Give each name a colour and a marker; the pairs repeat only after 36 names."""
    ordered = sorted(set(names))
    n = len(COLOURS)
    return {
        name: (COLOURS[i % n], MARKERS[(i + i // n) % len(MARKERS)])
        for i, name in enumerate(ordered)
    }


def heat(
    axes: Axes,
    values: NDArray[np.float64],
    rows: Sequence[str],
    columns: Sequence[str],
    low: float,
    high: float,
    colours: str,
    size: float,
) -> AxesImage:
    """Draw a heat map of (rows, columns) values."""
    image = axes.imshow(values, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=size)
    axes.set_yticks(range(len(rows)), rows, fontsize=size)
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def annotate(axes: Axes, image: AxesImage, texts: list[list[str]], size: float) -> None:
    """Write a text into each field of a heat map, in black or white, whichever can be read."""
    array = np.asarray(image.get_array(), dtype=np.float64)
    fields = np.asarray(image.cmap(image.norm(array)))[..., :3]  # (n, n, 3)
    dark = fields @ np.array([0.299, 0.587, 0.114]) < 0.55
    for (row, column), is_dark in np.ndenumerate(dark):
        colour = "white" if is_dark else INK
        axes.text(
            column, row, texts[row][column],
            ha="center", va="center", color=colour, fontsize=size,
        )  # fmt: skip
