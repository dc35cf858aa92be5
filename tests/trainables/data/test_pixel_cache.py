"""The decoded images: the same as the files, built once, whole or not at all."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foldrace.config.schema import CacheConfig
from foldrace.dataset.images import ImageError, decode_rgb, read_rgb
from foldrace.trainables.data import cache_build
from foldrace.trainables.data.cache_folder import DecodedImages, JpegImages
from foldrace.trainables.data.pixel_cache import (
    EncodedImages,
    ImageSource,
    cache_bytes,
    open_images,
)

SIZES = ((10, 14), (40, 40), (90, 31), (1, 1), (300, 200))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = []
    for i, (height, width) in enumerate(SIZES):
        path = tmp_path / f"그림 {i}.{'jpg' if i == 4 else 'png'}"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        paths.append(path)
    return paths


def assert_as_decoded(source: ImageSource, files: list[Path], side: int) -> None:
    assert len(source) == len(files)
    for row, file in enumerate(files):
        np.testing.assert_array_equal(source.image(row), np.asarray(read_rgb(file, side)))


def entries(cache: Path) -> list[str]:
    return sorted(p.name for p in (cache / "pixels").iterdir() if p.is_dir())


def test_equal_to_the_files_at_one_and_a_half_times_the_size(files: list[Path]) -> None:
    for size, side in ((32, 48), (224, 336), (16, 24)):
        source = open_images(files, size, 2)
        assert isinstance(source, DecodedImages)
        assert_as_decoded(source, files, side)
        shapes = [source.image(row).shape[:2] for row in range(5)]
        assert max(min(shape) for shape in shapes) <= side
        assert max(max(shape) for shape in shapes) <= 4 * side


def test_a_screens_photo_keeps_its_shorter_side(tmp_path: Path, own_cache: Path) -> None:
    """And an endless one takes no more room than one of four times as long as it is wide."""
    sizes = ((1920, 1080), (1080, 1920), (1080, 1080), (6000, 60), (300, 200), (3000, 1))
    files = [tmp_path / f"{i}.jpg" for i in range(len(sizes))]
    for file, size in zip(files, sizes, strict=True):
        Image.new("RGB", size, "teal").save(file)
    source = open_images(files, 224, 1)
    stored = [source.image(row).shape[:2] for row in range(len(files))]
    assert stored == [(336, 597), (597, 336), (336, 336), (13, 1344), (200, 300), (1, 1344)]
    (name,) = entries(own_cache)
    written = (own_cache / "pixels" / name / "pixels.bin").stat().st_size
    assert written == 3 * sum(height * width for height, width in stored)
    assert written <= cache_bytes(sizes, [224]) <= 1.01 * written
    twice = cache_bytes(sizes, [224, 112, 224])
    assert twice == cache_bytes(sizes, [224]) + cache_bytes(sizes, [112])
    jpeg, small = CacheConfig(format="jpeg"), CacheConfig(max_gb=1e-3)
    assert cache_bytes(sizes, [224], jpeg) == pytest.approx(written / 6, rel=0.01)
    assert cache_bytes(sizes, [224], small) == 1_000_000
    assert cache_bytes([], [224]) == 0


def test_the_upper_bound_is_one(files: list[Path], own_cache: Path) -> None:
    open_images(files, 32, 1)
    (folder,) = [p for p in (own_cache / "pixels").iterdir() if p.is_dir()]
    assert (folder / "pixels.bin").stat().st_size <= cache_bytes(SIZES, [32])


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that building decodes, as it goes."""
    seen: list[Path] = []

    def noted(data: bytes, path: Path, side: int) -> Image.Image:
        seen.append(path)
        return decode_rgb(data, path, side)

    monkeypatch.setattr(cache_build, "decode_rgb", noted)
    return seen


@pytest.mark.parametrize("session", [None, "run 1"])
def test_built_once(files: list[Path], decoded: list[Path], session: str | None) -> None:
    for _ in range(3):
        source = open_images(files, 32, 1, session=session)
        assert isinstance(source, DecodedImages)
    assert sorted(decoded) == sorted(files)


def test_a_changed_file_is_decoded_anew(files: list[Path]) -> None:
    """Of the same size, with the same time of change."""
    red, blue = (np.full((10, 14, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
    for pixels in (red, blue):
        Image.fromarray(pixels).save(files[0].with_suffix(".bmp"))
        os.utime(files[0].with_suffix(".bmp"), ns=(1, 1))
        time.sleep(0.05)  # the clock of file systems ticks every few milliseconds
        listed = [files[0].with_suffix(".bmp"), *files[1:]]
        source = open_images(listed, 32, 1, session=str(pixels[0, 0]))
        np.testing.assert_array_equal(source.image(0), pixels)
    assert_as_decoded(source, listed, 48)


def test_within_a_session_only_the_cache_is_read(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_images(files, 32, 1, session="run 1")
    monkeypatch.setattr(cache_build, "_stat", None)
    again = open_images(files, 32, 1, session="run 1")
    for row in range(len(files)):
        np.testing.assert_array_equal(source.image(row), again.image(row))
    with pytest.raises(TypeError):
        open_images(files, 32, 1, session="run 2")


def test_the_same_content_elsewhere_is_not_decoded_again(
    files: list[Path], decoded: list[Path], tmp_path: Path, own_cache: Path
) -> None:
    open_images(files, 32, 1)
    copies = [shutil.copy(file, tmp_path / f"copy {i}") for i, file in enumerate(files)]
    decoded.clear()
    assert_as_decoded(open_images([Path(c) for c in copies], 32, 1), files, 48)
    assert decoded == [] and len(entries(own_cache)) == 1
    open_images([Path(c) for c in copies[::-1]], 32, 1)
    assert len(entries(own_cache)) == 2  # in another order it is another entry


def test_a_file_that_was_only_touched_is_not_decoded_again(
    files: list[Path], decoded: list[Path]
) -> None:
    open_images(files, 32, 1)
    decoded.clear()
    files[0].touch()
    assert_as_decoded(open_images(files, 32, 1), files, 48)
    assert decoded == []


def test_the_shorter_side_is_the_configs(files: list[Path], own_cache: Path) -> None:
    open_images(files, 32, 1)
    config = CacheConfig(shorter_side=20)
    assert_as_decoded(open_images(files, 32, 1, config), files, 20)
    assert len(entries(own_cache)) == 2


def test_jpegs_are_smaller_and_nearly_the_same(tmp_path: Path, own_cache: Path) -> None:
    y, x = np.mgrid[0:200, 0:300]
    photo = np.stack([128 + 90 * np.sin(x / 15), 128 + 90 * np.cos(y / 15), x * 0.8], axis=2)
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for file in files:
        Image.fromarray(photo.astype(np.uint8)).save(file)
    source = open_images(files, 100, 1, CacheConfig(format="jpeg"))
    assert isinstance(source, JpegImages)
    for row in range(2):
        exact = np.asarray(read_rgb(files[row], 150)).astype(float)
        assert source.image(row).shape == exact.shape
        assert np.abs(source.image(row) - exact).mean() < 2
    (name,) = entries(own_cache)
    assert (own_cache / "pixels" / name / "pixels.bin").stat().st_size < exact.size * 2 / 8
    assert pickle.loads(pickle.dumps(source)).image(1).shape == exact.shape


def test_sessions_at_the_same_time_do_not_disturb_each_other(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for session in ("a", "b"):
        open_images(files, 32, 1, session=session)
    monkeypatch.setattr(cache_build, "_stat", None)
    for session in ("a", "b"):
        assert isinstance(open_images(files, 32, 1, session=session), DecodedImages)
    monkeypatch.undo()
    monkeypatch.setenv("FOLDRACE_CACHE", str(files[0].parent / "foldrace-cache"))
    Image.new("RGB", (5, 5), "red").save(files[0])
    open_images(files, 32, 1, session="c")
    assert open_images(files, 32, 1, session="a").image(0).shape == (5, 5, 3)


def test_travels_to_another_process_as_a_path(files: list[Path]) -> None:
    source = open_images(files, 32, 1)
    sent = pickle.dumps(source)
    assert len(sent) < 1000
    assert_as_decoded(pickle.loads(sent), files, 48)
    with pytest.raises(ValueError, match="read-only"):
        source.image(0)[0, 0, 0] = 1


BUILDER = """
import sys, hashlib
from pathlib import Path
from foldrace.trainables.data import cache_build, pixel_cache
builds = 0
original = cache_build._write_pixels
def counted(*arguments):
    global builds
    builds += 1
    return original(*arguments)
cache_build._write_pixels = counted
sys.stdin.readline()
source = pixel_cache.open_images([Path(p) for p in sys.argv[1:]], 32, 1)
sha = hashlib.sha256(b"".join(source.image(i).tobytes() for i in range(len(source))))
print(builds, type(source).__name__, sha.hexdigest())
"""


def test_two_processes_at_once_build_it_once(files: list[Path], own_cache: Path) -> None:
    root = Path(__file__).resolve().parents[3]
    both = [
        subprocess.Popen(
            [sys.executable, "-c", BUILDER, *map(str, files)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
        )
        for _ in range(2)
    ]
    for process in both:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=60)[0].split() for process in both]
    assert sorted(a[0] for a in answers) == ["0", "1"]
    assert answers[0][1:] == answers[1][1:]
    assert answers[0][1] == "DecodedImages"
    assert len(entries(own_cache)) == 1


def test_an_interrupted_build_leaves_nothing(
    files: list[Path], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(data: bytes, file: Path, side: int) -> Image.Image:
        if file == files[3]:
            raise KeyboardInterrupt
        return decode_rgb(data, file, side)

    monkeypatch.setattr(cache_build, "decode_rgb", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_images(files, 32, 1)
    assert entries(own_cache) == []
    monkeypatch.undo()
    monkeypatch.setenv("FOLDRACE_CACHE", str(own_cache))
    assert_as_decoded(open_images(files, 32, 1), files, 48)


@pytest.mark.parametrize("chunk", [256, 1])
def test_without_room_images_are_decoded_from_their_files(
    files: list[Path], own_cache: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    usage = shutil.disk_usage("/")._replace(free=5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(cache_build, "_CHUNK", chunk)
    source = open_images(files, 32, 1)
    assert isinstance(source, EncodedImages)
    assert_as_decoded(source, files, 48)
    assert entries(own_cache) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_read_only_disk_is_no_error(
    files: list[Path], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(path: Path, *args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert_as_decoded(open_images(files, 32, 1), files, 48)


def test_a_damaged_image_is_named(files: list[Path], own_cache: Path) -> None:
    files[2].write_bytes(b"no image")
    with pytest.raises(ImageError, match="그림 2"):
        open_images(files, 32, 1)
    assert entries(own_cache) == []
