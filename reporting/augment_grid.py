"""A picture of augmentation: one row per image, first as it is scored, then as training sees it.

Takes uint8 images by row and column, gives the bytes of a PNG.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from foldrace.reporting.charts.style import png, short

_WIDTH = 11.0  # inches
_LABELS = 1.6  # inches that the class names may take
_GAP = 0.04  # of an image's side
_TITLE = 110  # characters of a line


def augment_grid(
    images: Sequence[Sequence[NDArray[np.uint8]]], labels: Sequence[str], title: str
) -> bytes:
    """Draw `images[row][column]` (size, size, 3), the first column as scored, with row labels."""
    rows, columns, size = len(images), len(images[0]), images[0][0].shape[0]
    step = size + max(1, round(_GAP * size))
    canvas = np.full((rows * step, columns * step, 3), 255, np.uint8)
    for (row, column), _ in np.ndenumerate(np.empty((rows, columns))):
        place = np.s_[row * step : row * step + size, column * step : column * step + size]
        canvas[place] = images[row][column]

    def draw(axes: Axes) -> None:
        axes.imshow(canvas, interpolation="nearest" if size < 100 else "antialiased")
        centres = [(i * step + size / 2, i) for i in range(max(rows, columns))]
        names = ["as scored", *(f"training {i}" for i in range(1, columns))]
        axes.set_xticks([at for at, _ in centres[:columns]], names)
        axes.set_yticks([at for at, _ in centres[:rows]], [short(label, 20) for label in labels])
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.set_title(title, fontsize=10)

    title = textwrap.fill(title, _TITLE)
    height = (_WIDTH - _LABELS) * rows / columns + 0.6 + 0.2 * len(title.splitlines())
    return png(draw, height, width=_WIDTH)
