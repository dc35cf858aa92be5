"""The cache's room: a bound that holds, the least recently used go first, nothing in use goes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foldrace.config.schema import CacheConfig
from foldrace.run_folder.oof import npy
from foldrace.trainables.data import cache_build
from foldrace.trainables.data.cache_folder import (
    DecodedImages,
    NoRoom,
    new_part,
    publish,
    reserve,
)
from foldrace.trainables.data.pixel_cache import EncodedImages, open_images

ROOT = Path(__file__).resolve().parents[3]
SIDE = 32
BYTES = 3 * SIDE * SIDE * 3  # of three square images
ROOM_FOR_TWO = CacheConfig(shorter_side=SIDE, max_gb=(2 * BYTES + 3000) / 1e9)


def image_files(folder: Path, seed: int) -> list[Path]:
    rng = np.random.default_rng(seed)
    folder.mkdir()
    files = [folder / f"{i}.png" for i in range(3)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(file)
    return files


@pytest.fixture
def lists(tmp_path: Path) -> list[list[Path]]:
    return [image_files(tmp_path / str(seed), seed) for seed in range(4)]


def keep(files: list[Path], config: CacheConfig = ROOM_FOR_TWO, age: float = 0.0) -> str:
    """Open and close, used `age` seconds ago; gives the entry's name."""
    source = open_images(files, SIDE, 1, config)
    assert isinstance(source, DecodedImages)
    folder = Path(source.__reduce__()[1][0])
    used = (folder / "in_use").stat().st_mtime - age
    os.utime(folder / "in_use", (used, used))
    return folder.name


def entries(cache: Path) -> set[str]:
    return {p.name for p in (cache / "pixels").iterdir() if p.is_dir()}


def test_the_least_recently_used_go_first(lists: list[list[Path]], own_cache: Path) -> None:
    first, second = keep(lists[0], age=100), keep(lists[1], age=200)
    assert entries(own_cache) == {first, second}
    third = keep(lists[2], age=50)
    assert entries(own_cache) == {first, third}
    keep(lists[0])  # used again: now the newest
    fourth = keep(lists[3])
    assert entries(own_cache) == {first, fourth}


def test_the_folder_stays_within_its_bound(lists: list[list[Path]], own_cache: Path) -> None:
    for files in lists:
        keep(files)
        pixels = sum(p.stat().st_size for p in (own_cache / "pixels").glob("*/pixels.bin"))
        assert pixels <= ROOM_FOR_TWO.max_gb * 1e9


def test_what_is_in_use_stays(
    lists: list[list[Path]], own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held = [open_images(files, SIDE, 1, ROOM_FOR_TWO) for files in lists[:2]]
    before = entries(own_cache)
    with caplog.at_level(logging.WARNING, "foldrace"):
        third = open_images(lists[2], SIDE, 1, ROOM_FOR_TWO)
    assert isinstance(third, EncodedImages)
    assert entries(own_cache) == before
    (line,) = caplog.messages
    assert "cache.max_gb" in line and "decoded again" in line
    np.testing.assert_array_equal(held[0].image(0), np.asarray(Image.open(lists[0][0])))
    del held
    assert isinstance(open_images(lists[2], SIDE, 1, ROOM_FOR_TWO), DecodedImages)


def test_a_session_without_room_does_not_try_again(
    lists: list[list[Path]],
    own_cache: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = CacheConfig(shorter_side=SIDE, max_gb=100 / 1e9)
    with monkeypatch.context() as patch:
        open_images(lists[0], SIDE, 1, small, "a")
        patch.setattr(cache_build, "_stat", None)  # nor looks at the files
        patch.setattr(cache_build, "decode_rgb", None)
        assert isinstance(open_images(lists[0], SIDE, 1, ROOM_FOR_TWO, "a"), EncodedImages)
        with pytest.raises(TypeError):
            open_images(lists[0], SIDE, 1, small, "b")
    first, second = caplog.messages
    assert first == second and "cache.max_gb" in first  # told once where texts are told once
    assert isinstance(open_images(lists[0], SIDE, 1, ROOM_FOR_TWO, "b"), DecodedImages)
    assert isinstance(open_images(lists[0], SIDE, 1, ROOM_FOR_TWO, "a"), DecodedImages)


HOLDER = """
import sys
import time
from pathlib import Path
from foldrace.config.schema import CacheConfig
from foldrace.trainables.data.pixel_cache import open_images
source = open_images([Path(p) for p in sys.argv[2:]], 32, 1, CacheConfig(shorter_side=32))
print("open", flush=True)
sys.stdin.read()
"""


def test_another_process_holds_its_entry_until_it_is_killed(
    lists: list[list[Path]], own_cache: Path
) -> None:
    one = CacheConfig(shorter_side=SIDE, max_gb=(BYTES + 3000) / 1e9)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, "", *map(str, lists[0])],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert holder.stdout is not None and holder.stdout.readline() == "open\n"
    assert isinstance(open_images(lists[1], SIDE, 1, one), EncodedImages)
    holder.send_signal(signal.SIGKILL)
    holder.wait(timeout=60)
    assert isinstance(open_images(lists[1], SIDE, 1, one), DecodedImages)
    assert len(entries(own_cache)) == 1


def test_what_a_killed_build_left_is_swept_away(lists: list[list[Path]], own_cache: Path) -> None:
    root = own_cache / "pixels"
    root.mkdir(parents=True)
    killed, alive = new_part(root), new_part(root)
    (killed.folder / "pixels.bin").write_bytes(b"half")
    killed.held.close()
    name = keep(lists[0])
    assert entries(own_cache) == {name, alive.folder.name}


def test_what_nobody_used_for_a_month_goes(lists: list[list[Path]], own_cache: Path) -> None:
    day, roomy = 24 * 3600, CacheConfig(shorter_side=SIDE)
    young = keep(lists[1], roomy, age=29 * day)
    held = open_images(lists[2], SIDE, 1, roomy)
    old = keep(lists[2], roomy, age=31 * day)
    gone = keep(lists[0], roomy, age=31 * day)
    record = next((own_cache / "pixels").glob("*.json"))
    os.utime(record, (1, 1))
    new = keep(lists[3], roomy)
    assert entries(own_cache) == {young, old, new} and gone not in entries(own_cache)
    assert not record.exists() and len(held) == 3


BUILDER = """
import sys, time
from pathlib import Path
from foldrace.trainables.data import cache_build, pixel_cache
def half(data, path, side):
    if path.name == "2.png":
        print("half", flush=True)
        time.sleep(600)
    return real(data, path, side)
real, cache_build.decode_rgb = cache_build.decode_rgb, half
pixel_cache.open_images([Path(p) for p in sys.argv[1:]], 32, 1)
"""


def test_a_build_that_is_killed_half_way(lists: list[list[Path]], own_cache: Path) -> None:
    builder = subprocess.Popen(
        [sys.executable, "-c", BUILDER, *map(str, lists[0])],
        stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert builder.stdout is not None and builder.stdout.readline() == "half\n"
    (part,) = entries(own_cache)
    assert part.startswith(".part-")
    builder.kill()
    builder.wait(timeout=60)
    source = open_images(lists[0], SIDE, 1)
    np.testing.assert_array_equal(source.image(2), np.asarray(Image.open(lists[0][2])))
    (name,) = entries(own_cache)
    assert not name.startswith(".")


def test_builds_at_the_same_time_know_of_each_other(own_cache: Path) -> None:
    root = own_cache / "pixels"
    root.mkdir(parents=True)
    one, other = new_part(root), new_part(root)
    reserve(one.folder, 600, 1000)
    reserve(other.folder, 400, 1000)
    with pytest.raises(NoRoom, match="may be taken"):
        reserve(other.folder, 401, 1000)
    reserve(one.folder, 500, 1000)
    reserve(other.folder, 500, 1000)


def test_four_fifths_of_the_free_disk(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = own_cache / "pixels"
    root.mkdir(parents=True)
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    one, other = new_part(root), new_part(root)
    reserve(one.folder, 500, 10**9)
    reserve(other.folder, 400, 10**9)  # four fifths of what is not promised
    with pytest.raises(NoRoom):
        reserve(other.folder, 401, 10**9)


def test_whoever_publishes_second_takes_the_first(lists: list[list[Path]], own_cache: Path) -> None:
    name = keep(lists[0])
    part = new_part(own_cache / "pixels")
    reserve(part.folder, 1, 10**9)
    assert publish(part.folder, own_cache / "pixels" / name).key == name
    assert part.folder.exists()  # left to the builder, who removes it


def _later(path: Path, data: bytes) -> None:
    """Written over an hour after it was made."""
    path.write_bytes(data)
    os.utime(path, (time.time() + 3600,) * 2)


def _header(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _index(path: Path, data: bytes) -> None:
    """An index that the header has the checksum of."""
    path.write_bytes(data)
    _header(path.with_name("header.json"), index=hashlib.sha256(data).hexdigest())


DAMAGES = {
    "pixels.bin": lambda path: os.truncate(path, 1000),
    "index.npy": lambda path: path.write_bytes(path.read_bytes()[:-8] + b"\0" * 7 + b"\1"),
    "header.json": lambda path: path.write_text("{"),
    "header.json version": lambda path: path.write_text(
        json.dumps(json.loads(path.read_text()) | {"version": 1})
    ),
    "in_use": os.unlink,
    "pixels.bin other pixels": lambda path: _later(path, bytes(path.stat().st_size)),
    "index.npy with its own checksum": lambda path: _index(path, b"\x93NUMPY\x01\x00v\x00{'descr'"),
    "index.npy out of bounds": lambda path: _index(path, npy(np.full((3, 4), 10**12))),
    "index.npy of texts": lambda path: _index(path, npy(np.array([["a"] * 4] * 3))),
    "header.json format": lambda path: _header(path, format="nope"),
    "header.json texts": lambda path: _header(path, pixel_bytes="1"),
    "header.json negative": lambda path: _header(path, images=-1),
    "header.json deep": lambda path: path.write_text("[" * 100_000),
    "pixels.bin gone": os.unlink,
}


@pytest.mark.parametrize("session", [None, "run"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_anew(
    lists: list[list[Path]],
    own_cache: Path,
    caplog: pytest.LogCaptureFixture,
    damage: str,
    session: str | None,
) -> None:
    open_images(lists[0], SIDE, 1, session=session)
    (name,) = entries(own_cache)
    DAMAGES[damage](own_cache / "pixels" / name / damage.split()[0])
    with caplog.at_level(logging.WARNING, "foldrace"):
        source = open_images(lists[0], SIDE, 1, session=session)
    np.testing.assert_array_equal(source.image(2), np.asarray(Image.open(lists[0][2])))
    (line,) = caplog.messages
    assert name in line and "made again" in line
    assert entries(own_cache) == {name}
    open_images(lists[0], SIDE, 1, session=session)
    assert len(caplog.messages) == 1


NO_RECORDS = (
    *("", "{", "[]", '{"key": 1}'),
    *('{"key": "../x"}', '{"sessions": 5}', '{"refused": {"a": 1}}'),
)


@pytest.mark.parametrize("content", NO_RECORDS)
def test_a_damaged_record_of_a_list_is_no_matter(
    lists: list[list[Path]], own_cache: Path, content: str
) -> None:
    keep(lists[0])
    (record,) = (own_cache / "pixels").glob("*.json")
    record.write_text(content)
    keep(lists[0])
    assert json.loads(record.read_text())["key"] in entries(own_cache)
