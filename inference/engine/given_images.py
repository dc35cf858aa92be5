"""Images as whoever asks has them: paths, arrays or PIL images.

Takes them in any mixture, gives an `ImageSource` of what a run's trials would have seen of them;
nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from foldrace.config.schema import CacheConfig
from foldrace.dataset.images import MOST_PIXELS, ImageError, read_rgb, upright_rgb
from foldrace.trainables.data.cache_build import as_stored
from foldrace.trainables.data.pixel_cache import stored_side

GivenImage = str | Path | NDArray[np.uint8] | Image.Image
"""A path; (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) uint8: grey, RGB, RGBA; or a PIL image."""
_CHANNELS = (1, 3, 4)


class GivenImages:
    """Images decoded at each use, at the size and in the format of a run's pixel cache."""

    def __init__(
        self,
        images: Sequence[GivenImage],
        image_size: int,
        config: CacheConfig,
        max_pixels: int = MOST_PIXELS,
    ) -> None:
        self._images, self._max_pixels = images, max_pixels
        self._side, self._format = stored_side(image_size, config), config.format

    def __len__(self) -> int:
        return len(self._images)

    def image(self, row: int) -> NDArray[np.uint8]:
        """(height, width, 3) RGB. Raises ImageError."""
        given = self._images[row]
        if isinstance(given, str | Path):
            rgb = read_rgb(Path(given), self._side, self._max_pixels)
        else:
            name = Path(f"image {row}")
            picture = given if isinstance(given, Image.Image) else _picture(given, name)
            rgb = upright_rgb(picture, name, self._side, self._max_pixels)
        return as_stored(np.asarray(rgb), self._format)


def _picture(array: NDArray[np.uint8], name: Path) -> Image.Image:
    """The array as PIL has it; ImageError where it is no image."""
    if not isinstance(array, np.ndarray):
        allowed = "a path, a NumPy array or a PIL image"
        raise ImageError(name, f"is of the type {type(array).__name__}; allowed: {allowed}")
    is_shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in _CHANNELS)
    if array.dtype != np.uint8 or not is_shaped or 0 in array.shape:
        raise ImageError(
            name,
            f"is an array of {array.dtype} {array.shape}; allowed: uint8 of (height, width) or "
            "(height, width, 1, 3 or 4 channels)",
        )
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)
