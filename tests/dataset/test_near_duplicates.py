"""Nearly equal images are found whatever was done to them, and different ones are not."""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagehash
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from foldrace.core.errors import RunFolderError
from foldrace.core.files import LocalFiles
from foldrace.dataset import similarity as likeness
from foldrace.dataset.demo import write_demo
from foldrace.dataset.duplicates import NearDuplicate, near_duplicate_rows, save_near_duplicates
from foldrace.dataset.folds import read_folds
from foldrace.dataset.images import check_image, find_images
from foldrace.dataset.similarity import (
    ImageHashes,
    Match,
    PerceptualHash,
    nearest_matches,
    perceptual_hashes,
    stack_hashes,
)

Bicubic = Image.Resampling.BICUBIC


def jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def scaled(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((round(image.width * factor), round(image.height * factor)), Bicubic)


def brighter(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(factor)


COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG 90": lambda image: jpeg(image, 90),
    "JPEG 40": lambda image: jpeg(image, 40),
    "half size": lambda image: jpeg(scaled(image, 0.5), 92),
    "larger": lambda image: jpeg(scaled(image, 1.7), 92),
    "darker": lambda image: jpeg(brighter(image, 0.8), 95),
    "brighter": lambda image: jpeg(brighter(image, 1.1), 95),
    "all of it": lambda image: jpeg(brighter(scaled(image, 0.75), 1.1), 60),
}


def hash_of(data: bytes) -> PerceptualHash:
    return perceptual_hashes([check_image(data, Path("x")).small])[0]


def of(image: Image.Image) -> PerceptualHash:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return hash_of(buffer.getvalue())


def matches(a: list[PerceptualHash], b: list[PerceptualHash]) -> list[Match]:
    """Of images of one set in another."""
    with ThreadPoolExecutor(2) as pool:
        left = stack_hashes(a, np.zeros(len(a), np.int64))
        right = stack_hashes(b, np.ones(len(b), np.int64))
        return nearest_matches(left, right, pool)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The demo's handwritten digits, training and test."""
    folder = tmp_path_factory.mktemp("digits")
    write_demo(folder)
    return [(folder / "data" / name).read_bytes() for name in find_images(folder / "data")]


@pytest.fixture(scope="module")
def prints(digits: list[bytes]) -> list[PerceptualHash]:
    """The hash of each digit."""
    return [hash_of(data) for data in digits]


def test_no_two_handwritten_digits_are_alike(prints: list[PerceptualHash]) -> None:
    with ThreadPoolExecutor(2) as pool:
        images = stack_hashes(prints, np.arange(len(prints)))
        assert len(prints) == 1797
        assert nearest_matches(images, images, pool) == []


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES.keys())
def test_copies_of_digits_are_found(
    digits: list[bytes], prints: list[PerceptualHash], copy: Callable[[Image.Image], bytes]
) -> None:
    kept = digits[::30]
    copies = [hash_of(copy(Image.open(io.BytesIO(data)).convert("RGB"))) for data in kept]
    found = matches(copies, prints)
    assert [(m.row, m.other) for m in found] == [(i, 30 * i) for i in range(len(kept))]


def scene(seed: int, width: int = 300, height: int = 200) -> Image.Image:
    """Coloured blobs, smooth as photos are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Bicubic)


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES.keys())
def test_copies_of_scenes_are_found(copy: Callable[[Image.Image], bytes]) -> None:
    scenes = [scene(seed) for seed in range(20)]
    found = matches([hash_of(copy(s)) for s in scenes], [of(s) for s in scenes])
    assert [(m.row, m.other) for m in found] == [(i, i) for i in range(20)]


def test_a_photo_turned_by_its_exif_and_one_turned_for_good() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    scene(0).transpose(Image.Transpose.ROTATE_90).save(buffer, "JPEG", quality=95, exif=exif)
    assert len(matches([hash_of(buffer.getvalue())], [of(scene(0))])) == 1


def test_colour_and_brightness_tell_images_apart() -> None:
    shape = np.zeros((64, 64, 3), dtype=np.uint8)
    shape[16:48, 20:50] = (200, 40, 40)
    red, blue = Image.fromarray(shape), Image.fromarray(shape[:, :, ::-1].copy())
    assert matches([of(red)], [of(blue)]) == []
    white, black = (Image.new("RGB", (64, 64), name) for name in ("white", "black"))
    assert matches([of(white)], [of(black)]) == []
    assert len(matches([of(white)], [of(Image.new("RGB", (90, 90), (250, 250, 250)))])) == 1


def test_the_hash_is_that_of_the_library() -> None:
    small = scene(1, 64, 48)
    assert f"{perceptual_hashes([small])[0].hash:016x}" == str(imagehash.phash(small))


def brute_force(images: ImageHashes, others: ImageHashes) -> list[Match]:
    """One pair after another, with Python's integers."""
    found = []
    for i, row in enumerate(images.rows):
        pairs = [
            ((int(images.hashes[i]) ^ int(others.hashes[j])).bit_count(), int(other))
            for j, other in enumerate(others.rows)
            if images.sides[i] != others.sides[j]
            and alike(images.thumbs[i].astype(float), others.thumbs[j].astype(float))
        ]
        if pairs and min(pairs)[0] <= 8:
            found.append(Match(int(row), min(pairs)[1], min(pairs)[0]))
    return found


def alike(a: NDArray[np.float64], b: NDArray[np.float64]) -> bool:
    if abs(a.mean() - b.mean()) > 50:
        return False
    first, second = ((x - x.mean()) / max(x.std(), 8.0) for x in (a, b))
    return bool(np.sqrt(((first - second) ** 2).mean()) <= 0.11)


@pytest.mark.parametrize("block", [1, 700, 2**22])
def test_agrees_with_brute_force(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(likeness, "_BLOCK", block)
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 6, dtype=np.uint64)[rng.integers(0, 6, 150)]
    for _ in range(5):
        hashes ^= np.uint64(1) << rng.integers(0, 64, 150, dtype=np.uint64)
    thumbs = rng.integers(60, 200, (3, 16, 16, 3))[rng.integers(0, 3, 150)]
    thumbs = (thumbs + rng.normal(0, 3, thumbs.shape)).round().astype(np.uint8)
    found = [PerceptualHash(int(h), t) for h, t in zip(hashes, thumbs, strict=True)]
    every = [None if i % 13 == 0 else one for i, one in enumerate(found)]
    images = stack_hashes(every, rng.integers(0, 3, 150))
    with ThreadPoolExecutor(2) as pool:
        got = nearest_matches(images, images, pool)
        assert got == brute_force(images, images)
        assert 20 < len(got) < 138
        assert all(m.row % 13 and m.other % 13 for m in got)
        nobody = stack_hashes([None, None], np.arange(2))
        assert nearest_matches(nobody, images, pool) == nearest_matches(images, nobody, pool) == []


def test_many_with_one_hash_take_bounded_memory_and_find_the_copy() -> None:
    rng = np.random.default_rng(0)
    blank = of(Image.new("RGB", (64, 64), "white"))
    prints = [blank] * 3000
    prints[7] = PerceptualHash(blank.hash, rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    with ThreadPoolExecutor(2) as pool:
        images = stack_hashes(prints, np.arange(3000) % 2)
        found = nearest_matches(images, images, pool)
    assert {m.row for m in found} == set(range(3000)) - {7}


FOLDS = 'image_path,target,group,fold\na.jpg,x,,0\n"나,1.jpg",y,,1\nc.jpg,x,,1\n'


def test_the_file_and_its_rows(tmp_path: Path) -> None:
    files, folds = LocalFiles(tmp_path), read_folds(FOLDS)
    assert near_duplicate_rows(files, folds) is None
    save_near_duplicates(files, [])
    rows = near_duplicate_rows(files, folds)
    assert rows is not None
    assert rows.tolist() == []
    found = [
        NearDuplicate("나,1.jpg", "a.jpg", "fold", 2),
        NearDuplicate("a.jpg", "나,1.jpg", "fold", 2),
        NearDuplicate("a.jpg", "t/1.jpg", "test", 0),
    ]
    save_near_duplicates(files, found)
    assert (tmp_path / "near_duplicates.csv").read_text(encoding="utf-8") == (
        "image_path,other,kind,distance\n"
        '"나,1.jpg",a.jpg,fold,2\na.jpg,"나,1.jpg",fold,2\na.jpg,t/1.jpg,test,0\n'
    )
    rows = near_duplicate_rows(files, folds)
    assert rows is not None
    assert rows.tolist() == [0, 1]


@pytest.mark.parametrize("text", ["", "a,b\n", "image_path,other,kind,distance\nno.jpg,a,fold,1\n"])
def test_a_file_of_other_folds_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "near_duplicates.csv").write_text(text)
    with pytest.raises(RunFolderError, match=r"near_duplicates.csv: is damaged or not of this"):
        near_duplicate_rows(LocalFiles(tmp_path), read_folds(FOLDS))
