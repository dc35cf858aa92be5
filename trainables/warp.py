"""Maps of the plane that an affine map of crop, turn and zoom does not cover, one an image.

Takes numbers, gives (n, 3, 3) homographies of the square output image, which are multiplied before
anything is interpolated. Coordinates are those of pixel centres: 0 to size - 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Maps = NDArray[np.float64]  # (n, 3, 3)


def homogeneous(affine: NDArray[np.float64]) -> Maps:
    """(n, 2, 3) affine maps as homographies."""
    last = np.broadcast_to((0.0, 0.0, 1.0), (len(affine), 1, 3))
    return np.concatenate([affine, last], axis=1)


def shear(degrees: NDArray[np.float64], size: int) -> Maps:
    """Rows slide along x around the centre: x - tan(angle) * (y - centre)."""
    slope = np.tan(np.deg2rad(degrees))
    maps = np.tile(np.eye(3), (len(degrees), 1, 1))
    maps[:, 0, 1], maps[:, 0, 2] = -slope, slope * (size - 1) / 2
    return maps


def perspective(inset: NDArray[np.float64], size: int) -> Maps:
    """Each corner moves inwards. `inset` (n, 4, 2): x and y, fractions of the side, of the top
    left, top right, bottom right and bottom left corner.

    Source: Heckbert, "Fundamentals of Texture Mapping and Image Warping", master's thesis,
    University of California, Berkeley, 1989 (unit square to quadrilateral)."""
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    p = corners + np.where(corners == 0, inset, -inset)
    (ax, ay), (bx, by) = (p[:, 1] - p[:, 2]).T, (p[:, 3] - p[:, 2]).T
    sx, sy = (p[:, 0] - p[:, 1] + p[:, 2] - p[:, 3]).T
    area = ax * by - bx * ay
    maps = np.empty((len(inset), 3, 3))
    maps[:, 2, 0], maps[:, 2, 1] = (sx * by - bx * sy) / area, (ax * sy - sx * ay) / area
    maps[:, 2, 2] = 1.0
    maps[:, :2, 0] = p[:, 1] - p[:, 0] + maps[:, 2, :1] * p[:, 1]
    maps[:, :2, 1] = p[:, 3] - p[:, 0] + maps[:, 2, 1:2] * p[:, 3]
    maps[:, :2, 2] = p[:, 0]
    span = np.array([size - 1.0, size - 1.0, 1.0]).clip(min=1)  # a single pixel has no span
    scaled: Maps = span[:, None] * maps / span
    return scaled
