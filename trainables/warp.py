"""Maps of the plane, and images pulled through them.

Shear and perspective, which an affine map of crop, turn and zoom does not cover: takes numbers,
gives (n, 3, 3) homographies of the square output image, to be multiplied before anything is
interpolated. Coordinates are those of pixel centres: 0 to size - 1.
"""

from __future__ import annotations

import cv2
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


def averaged(
    image: NDArray[np.uint8], matrix: NDArray[np.float64], block: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Means of blocks of `block` rows and columns, and the map from there; a rest at the bottom or
    right that fills no block is left out. `matrix`: (2, 3) affine or (3, 3)."""
    rows, columns = block.tolist()
    if rows == columns == 1:
        return image, matrix
    height, width = image.shape[0] // rows, image.shape[1] // columns
    whole = image[: height * rows, : width * columns]
    means = cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA)
    x, y = (columns - 1) / 2, (rows - 1) / 2  # the first block's centre
    spread = np.array([[columns, 0, x], [0, rows, y], [0, 0, 1]])
    return np.asarray(means, np.uint8), matrix @ spread


class Warper:
    """Pulls RGB images of the given shapes, (n, 2) height and width, to squares. It works on a
    fourth channel that nobody sees: the values are the same, and cv2 takes a third less time."""

    def __init__(self, shapes: NDArray[np.int64], size: int) -> None:
        self._source = np.empty(int(shapes.prod(axis=1).max()) * 4, np.uint8)
        self._warped = np.empty((size, size, 4), np.uint8)

    def warp(
        self, image: NDArray[np.uint8], matrix: NDArray[np.float64], out: NDArray[np.uint8]
    ) -> None:
        """Into `out`. `matrix`: (2, 3) affine or (3, 3), from the image's pixels to those of
        `out`; the image's edge goes on beyond it."""
        height, width, _ = image.shape
        source = self._source[: height * width * 4].reshape(height, width, 4)
        cv2.cvtColor(image, cv2.COLOR_RGB2RGBA, dst=source)
        (cv2.warpAffine if len(matrix) == 2 else cv2.warpPerspective)(
            source,
            matrix,
            self._warped.shape[:2],
            dst=self._warped,
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        )
        cv2.cvtColor(self._warped, cv2.COLOR_RGBA2RGB, dst=out)
