"""Every pixel mode that turns up in real folders, against values computed by hand."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from foldrace.dataset.images import (
    IMAGE_SUFFIXES,
    ImageError,
    check_image,
    find_files,
    find_images,
    natural_key,
    read_rgb,
)

RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)


def pixel(path: Path, x: int = 0, y: int = 0) -> tuple[int, ...]:
    image = read_rgb(path)
    assert image.mode == "RGB"
    value = image.getpixel((x, y))
    assert isinstance(value, tuple)
    return value


def photo(width: int, height: int) -> Image.Image:
    """Smooth but not constant, so that JPEG keeps it and scaling can be checked."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [x / width, y / height, (x + y) / (width + height)]
    return Image.fromarray((np.stack(channels, axis=-1) * 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, WHITE),
        ("L", 77, (77, 77, 77)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("RGBA", (255, 0, 0, 255), RED),
        ("RGBA", (255, 0, 0, 0), WHITE),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),  # 255 * (1 - 51/255)
        ("LA", (0, 0), WHITE),
        ("LA", (10, 255), (10, 10, 10)),
        ("I;16", 257 * 90, (90, 90, 90)),
        ("I;16", 65535, WHITE),
        ("I;16", 300, (1, 1, 1)),  # scaled; clipping would give 255
    ],
)
def test_png_modes(
    tmp_path: Path, mode: str, colour: float | tuple[int, ...], expected: tuple[int, ...]
) -> None:
    path = tmp_path / "x.png"
    Image.new(mode, (3, 2), colour).save(path)
    assert pixel(path) == expected


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "clear.png", transparency=1)
    assert [pixel(tmp_path / "opaque.png", x) for x in (0, 1)] == [RED, (0, 0, 255)]
    assert [pixel(tmp_path / "clear.png", x) for x in (0, 1)] == [RED, WHITE]


@pytest.mark.parametrize(("mode", "key"), [("RGB", (9, 9, 9)), ("L", 9)])
def test_png_colour_key_is_transparent(
    tmp_path: Path, mode: str, key: int | tuple[int, int, int]
) -> None:
    Image.new(mode, (2, 2), key).save(tmp_path / "x.png", transparency=key)
    assert pixel(tmp_path / "x.png") == WHITE


@pytest.mark.parametrize("name", ["adobe.jpg", "plain.tif"])  # Pillow writes JPEG CMYK inverted
def test_cmyk(tmp_path: Path, name: str) -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # magenta + yellow = red
    image.paste((0, 0, 0, 255), (8, 0, 16, 16))
    image.save(tmp_path / name, quality=100)
    np.testing.assert_allclose(pixel(tmp_path / name, 2, 2), RED, atol=3)
    np.testing.assert_allclose(pixel(tmp_path / name, 13, 2), BLACK, atol=3)


def test_16_bit_pgm_and_tiff_are_scaled(tmp_path: Path) -> None:
    (tmp_path / "x.pgm").write_bytes(b"P5 2 1 65535\n" + bytes([0x80, 0x80, 0xFF, 0xFF]))
    Image.fromarray(np.array([[0, 257 * 128]], dtype=np.int32)).save(tmp_path / "x.tif")
    assert [pixel(tmp_path / "x.pgm", x)[0] for x in (0, 1)] == [128, 255]
    assert [pixel(tmp_path / "x.tif", x)[0] for x in (0, 1)] == [0, 128]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_check_tells_16_bits_a_value(
    tmp_path: Path, suffix: str, channels: int, dtype: type
) -> None:
    """Written by OpenCV, which keeps 48-bit colours."""
    path = tmp_path / f"x{suffix}"
    shape = (20, 30) if channels == 1 else (20, 30, 3)
    assert cv2.imwrite(str(path), np.full(shape, 200, dtype))
    assert check_image(path.read_bytes(), path).sixteen_bit == (dtype is np.uint16)


@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"hevc"])
def test_a_kind_that_another_package_reads_is_named(tmp_path: Path, brand: bytes) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(b"\0\0\0\x18ftyp" + brand + bytes(100))
    with pytest.raises(ImageError, match="needs another package: HEIC: pillow-heif"):
        read_rgb(path)


def test_heic_is_read_where_its_package_is_installed(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    image = photo(64, 48)
    pillow_heif.from_pillow(image).save(tmp_path / "x.heic", quality=95)
    found = read_rgb(tmp_path / "x.heic")
    assert found.size == (64, 48)
    assert np.abs(np.asarray(found, float) - np.asarray(image, float)).mean() < 8
    assert find_files(tmp_path).images == ("x.heic",)


def test_avif_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.avif"
    photo(64, 48).save(path, quality=90)
    assert read_rgb(path).size == (64, 48)
    assert find_files(tmp_path).images == ("x.avif",)


def test_floating_point_pixels_are_refused_with_advice(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    Image.new("F", (2, 2), 0.5).save(path)
    with pytest.raises(ImageError, match="floating-point numbers; save it with 8 or 16 bits"):
        read_rgb(path)
    with pytest.raises(ImageError, match="floating-point"):
        check_image(path.read_bytes(), path)


# What each orientation did to an upright image, as numpy operations on (rows, columns).
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    upright = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    stored = np.ascontiguousarray(STORED[orientation](upright))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(read_rgb(tmp_path / "x.png")), upright)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_the_small_image_of_a_check_is_upright(
    tmp_path: Path, suffix: str, orientation: int
) -> None:
    upright = photo(1200, 800)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED[orientation](np.asarray(upright)))
    path = tmp_path / f"x{suffix}"
    Image.fromarray(stored).save(path, exif=exif)
    checked = check_image(path.read_bytes(), path)
    size, small = checked.size, checked.small
    assert size == stored.shape[1::-1]
    assert (small.mode, small.size) == ("RGB", (64, 43))
    reference = upright.resize(small.size, Image.Resampling.BOX)
    difference = np.abs(np.asarray(small, dtype=float) - np.asarray(reference, dtype=float))
    assert difference.max() < 4


WHITE_IN: dict[str, int | tuple[int, ...]] = {
    **{"1": 1, "L": 255, "P": 255, "I;16": 65535, "LA": (255, 255)},
    **{"RGBA": (255, 255, 255, 255), "CMYK": (0, 0, 0, 0)},
}


@pytest.mark.parametrize("mode", WHITE_IN)
def test_the_small_image_is_rgb_whatever_the_mode(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image = Image.new(mode, (200, 100), WHITE_IN[mode])
    if mode == "P":
        image.putpalette([255] * 768)
    image.save(path)
    checked = check_image(path.read_bytes(), path)
    size, small = checked.size, checked.small
    assert (size, small.mode, small.size) == ((200, 100), "RGB", (64, 32))
    np.testing.assert_array_equal(np.asarray(small), 255)


def test_damaged_exif_does_not_spoil_the_image(tmp_path: Path) -> None:
    photo(16, 8).save(tmp_path / "x.jpg", exif=b"Exif\0\0not a TIFF header")
    assert read_rgb(tmp_path / "x.jpg").size == (16, 8)


def test_names_with_spaces_and_hangul(tmp_path: Path) -> None:
    path = tmp_path / "사진 폴더" / "고양이 (1).PNG"
    path.parent.mkdir()
    Image.new("RGB", (2, 2), RED).save(path)
    assert pixel(path) == RED


@pytest.mark.parametrize("shorter_side", [450, 99, 30])
@pytest.mark.parametrize("size", [(800, 600), (600, 800)])
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_shorter_side_scales_down_like_the_whole_image(
    tmp_path: Path, suffix: str, size: tuple[int, int], shorter_side: int
) -> None:
    path = tmp_path / f"x{suffix}"
    photo(*size).save(path, quality=95)
    small = read_rgb(path, shorter_side)
    assert small.size == (size[0] * shorter_side // 600, size[1] * shorter_side // 600)
    reference = Image.open(path).convert("RGB").resize(small.size, Image.Resampling.BOX)
    difference = np.abs(np.asarray(small, float) - np.asarray(reference, float))
    assert difference.mean() < 1


def test_shorter_side_of_a_rotated_image_and_never_up(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(80, 40).save(tmp_path / "x.jpg", exif=exif)
    assert read_rgb(tmp_path / "x.jpg", 10).size == (10, 20)
    assert read_rgb(tmp_path / "x.jpg", 1000).size == (40, 80)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_longer_side_is_at_most_four_times_the_bound(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    photo(3000, 60).save(path)
    assert read_rgb(path, 100).size == (400, 8)
    photo(60, 300).save(path)
    assert read_rgb(path, 20).size == (16, 80)
    photo(60, 300).save(path)
    assert read_rgb(path, 80).size == (60, 300)


def noisy(suffix: str, **options: object) -> bytes:
    pixels = np.random.default_rng(1).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, Image.registered_extensions()[suffix], **options)
    return file.getvalue()


TRUNCATABLE = [
    (".jpg", {}),
    (".jpg", {"progressive": True}),
    (".jpg", {"subsampling": 0, "quality": 100}),
    (".png", {}),
    (".bmp", {}),
    (".webp", {}),
    (".tif", {}),
]


@pytest.mark.parametrize(("suffix", "options"), TRUNCATABLE)
@pytest.mark.parametrize("kept", [0.3, 0.9, 0.99])
def test_truncation_is_found_also_in_draft_mode(
    tmp_path: Path, suffix: str, options: dict[str, object], kept: float
) -> None:
    whole = noisy(suffix, **options)
    path = tmp_path / f"x{suffix}"
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(ImageError) as full:
        read_rgb(path)
    with pytest.raises(ImageError):
        read_rgb(path, shorter_side=8)
    with pytest.raises(ImageError):
        check_image(path.read_bytes(), path)
    assert str(path) in str(full.value)
    assert check_image(whole, path).size == (48, 64)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"hello, I am text", "is not an image of a supported kind"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image of a supported"),
        (b"P5 0 5 255\n", "cannot be decoded|has no pixels|is not an image"),
    ],
)
def test_files_that_are_no_images(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=reason):
        read_rgb(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"no\.jpg: does not exist"):
        read_rgb(tmp_path / "no.jpg")
    with pytest.raises(ImageError, match="is a folder; allowed: a regular file"):
        read_rgb(tmp_path)


def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.png"
    Image.new("L", (100, 100)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="is too large: Image size"):
        read_rgb(path)


PROGRAMS = {
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) (w) file closefile\nshowpage\n",
    "PDF": b"%PDF-1.4\n1 0 obj<</Type/Catalog/OpenAction<</S/JavaScript/JS(1)>>>>endobj\n%%EOF\n",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>',
    "WMF": b"\xd7\xcd\xc6\x9a" + bytes(40),
    "ICNS": b"icns\0\0\0\x08",
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_programs_are_no_images(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(PROGRAMS[kind])
    with pytest.raises(ImageError, match="is not an image of a supported kind"):
        read_rgb(path)


def test_find_images_is_natural_sorted_and_leaves_out_the_rest(tmp_path: Path) -> None:
    for name in ("b/10.jpg", "b/2.JPG", "a/x.png", ".hidden/x.png", "a/._x.png", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(tmp_path) == ["a/x.png", "b/2.JPG", "b/10.jpg"]


def test_natural_key() -> None:
    names = ["10", "2", "02", "b", "B", "a10", "a9", "", "9" * 5000]
    ordered = ["", "02", "2", "10", "9" * 5000, "a9", "a10", "B", "b"]
    assert sorted(names, key=natural_key) == ordered
    assert sorted(ordered, key=natural_key) == ordered


def test_every_suffix_is_one_that_pillow_knows() -> None:
    assert set(Image.registered_extensions()) >= IMAGE_SUFFIXES
