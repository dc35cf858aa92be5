"""The exported code's pixels, against those that the trials see (Pillow, then OpenCV)."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foldrace.dataset.images import decode_rgb
from foldrace.export.shipped.blend_images import META, decode, square
from foldrace.trainables.data.framing import resize
from foldrace.trainables.data.meta_features import META_FEATURES

SHAPES = [(8, 8), (64, 64), (96, 96), (40, 100), (100, 40), (77, 32), (31, 33), (300, 20), (1, 50)]


@pytest.mark.parametrize("how", ["squash", "pad", "crop"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_squares_are_those_of_opencv_up_to_rounding(shape: tuple[int, int], how: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for size in (32, 48):
        [expected] = resize([image], size, how)
        found = square(image, size, how)
        assert found.shape == expected.shape and found.dtype == np.uint8
        difference = np.abs(found.astype(int) - expected)
        assert difference.max() <= 1 and (difference > 0).mean() < 0.2


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _files() -> dict[str, bytes]:
    rng = np.random.default_rng(1)
    rgb = Image.fromarray(rng.integers(0, 256, (150, 230, 3), dtype=np.uint8))
    rgb = rgb.resize((460, 300), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    alpha = rgb.convert("RGBA")
    alpha.putalpha(rgb.convert("L"))
    deep = Image.fromarray(rng.integers(0, 65536, (40, 30), dtype=np.uint16))
    return {
        "jpeg": _encoded(rgb, "JPEG"),
        "turned": _encoded(rgb, "JPEG", exif=exif),
        "cmyk": _encoded(rgb.convert("CMYK"), "JPEG"),
        "grey": _encoded(rgb.convert("L"), "PNG"),
        "palette": _encoded(rgb.convert("P"), "GIF"),
        "alpha": _encoded(alpha, "PNG"),
        "16 bits": _encoded(deep, "PNG"),
        "webp": _encoded(rgb, "WEBP"),
    }


@pytest.mark.parametrize("kind", _files())
@pytest.mark.parametrize("side", [36, 400])
def test_files_are_decoded_as_for_the_trials(kind: str, side: int) -> None:
    data = _files()[kind]
    expected = np.asarray(decode_rgb(data, Path(kind), side))
    np.testing.assert_array_equal(decode(data, side, 10**8), expected)


@pytest.mark.parametrize("name", META_FEATURES)
def test_meta_features_are_those_of_the_trials(name: str) -> None:
    image = np.random.default_rng(2).integers(0, 256, (31, 70, 3), dtype=np.uint8)
    expected = META_FEATURES[name].compute(image)
    np.testing.assert_allclose(META[name](image), expected, atol=1e-12)
    assert META.keys() == META_FEATURES.keys()


def test_what_is_no_image_says_why() -> None:
    with pytest.raises(ValueError, match="is no image"):
        decode(b"nonsense", 32, 10**8)
    large = _encoded(Image.new("RGB", (50, 50)), "PNG")
    with pytest.raises(ValueError, match="has 50 x 50 pixels; allowed: 2,000"):
        decode(large, 32, 2000)
