"""The decoded images: the same as the files, built once, whole or not at all."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiment.images import ImageError, read_rgb
from trainables import pixel_cache
from trainables.pixel_cache import DecodedImages, EncodedImages, cache_bytes, open_images

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


def assert_as_decoded(source: pixel_cache.ImageSource, files: list[Path], side: int) -> None:
    assert len(source) == len(files)
    for row, file in enumerate(files):
        np.testing.assert_array_equal(source.image(row), np.asarray(read_rgb(file, side)))


def entries(cache: Path) -> list[str]:
    return sorted(p.name for p in (cache / "pixels").iterdir() if not p.name.endswith(".lock"))


def test_equal_to_the_files_at_one_and_a_half_times_the_size(files: list[Path]) -> None:
    for size, side in ((32, 48), (224, 336), (16, 24)):
        source = open_images(files, size, 2)
        assert isinstance(source, DecodedImages)
        assert_as_decoded(source, files, side)
        assert max(max(source.image(row).shape) for row in range(5)) <= side


def test_the_upper_bound_is_one(files: list[Path], own_cache: Path) -> None:
    open_images(files, 32, 1)
    (folder,) = [p for p in (own_cache / "pixels").iterdir() if p.is_dir()]
    assert (folder / "pixels.bin").stat().st_size <= cache_bytes(len(files), 32)


def test_built_once(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    open_images(files, 32, 1)
    monkeypatch.setattr(pixel_cache, "read_rgb", None)
    assert isinstance(open_images(files, 32, 1), DecodedImages)


def test_a_changed_file_is_decoded_anew(files: list[Path]) -> None:
    open_images(files, 32, 1)
    Image.new("RGB", (10, 14), "red").save(files[0])
    os.utime(files[0], ns=(1, 1))
    assert_as_decoded(open_images(files, 32, 1), files, 48)


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
from trainables import pixel_cache
builds = 0
original = pixel_cache._write_pixels
def counted(*arguments):
    global builds
    builds += 1
    return original(*arguments)
pixel_cache._write_pixels = counted
sys.stdin.readline()
source = pixel_cache.open_images([Path(p) for p in sys.argv[1:]], 32, 1)
sha = hashlib.sha256(b"".join(source.image(i).tobytes() for i in range(len(source))))
print(builds, type(source).__name__, sha.hexdigest())
"""


def test_two_processes_at_once_build_it_once(files: list[Path], own_cache: Path) -> None:
    root = Path(__file__).resolve().parents[2]
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
    def interrupted(file: Path, side: int) -> Image.Image:
        if file == files[3]:
            raise KeyboardInterrupt
        return read_rgb(file, side)

    monkeypatch.setattr(pixel_cache, "read_rgb", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_images(files, 32, 1)
    assert entries(own_cache) == []
    monkeypatch.undo()
    monkeypatch.setenv("FOLDRACE_CACHE", str(own_cache))
    assert_as_decoded(open_images(files, 32, 1), files, 48)


def test_what_a_killed_build_left_is_swept_away(files: list[Path], own_cache: Path) -> None:
    open_images(files, 32, 1)
    (name,) = entries(own_cache)
    folder = own_cache / "pixels" / name
    folder.rename(folder.with_name(f".part-{name}"))
    assert isinstance(open_images(files, 32, 1), DecodedImages)
    assert entries(own_cache) == [name]


@pytest.mark.parametrize("chunk", [256, 1])
def test_without_room_images_are_decoded_from_their_files(
    files: list[Path], own_cache: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    usage = shutil.disk_usage("/")._replace(free=5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(pixel_cache, "_CHUNK", chunk)
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
