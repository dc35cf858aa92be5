"""The cache of unpacked archives: bounded, held while in use, made anew where it was changed."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from foldrace.core.errors import DataError, EnvironmentProblem
from foldrace.dataset import unpacked
from foldrace.dataset.archive import unpack

KILOBYTE = 1000
UNPACK = """
import sys
from pathlib import Path
from foldrace.dataset.archive import unpack

print(unpack(Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""


def archive(folder: Path, name: str) -> Path:
    """A zip of 1 kB that unpacks to two files of as much together."""
    path = folder / f"{name}.zip"
    with zipfile.ZipFile(path, "w") as file:
        for number in range(2):
            file.writestr(f"a/{number}.txt", name[:1] * (KILOBYTE // 2))
    return path


@pytest.fixture
def archives(tmp_path: Path) -> list[Path]:
    return [archive(tmp_path, name) for name in ("first", "second", "third")]


def later() -> None:
    """As another command: what this process used it uses no more."""
    for lock in unpacked._held.values():
        os.close(lock)
    unpacked._held.clear()


def test_what_was_changed_is_unpacked_again(
    archives: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = unpack(archives[0])
    file = folder / "a/1.txt"
    as_it_was = file.read_text()
    damages = {
        "other content": lambda: file.write_text("x" * len(as_it_was)),
        "gone": file.unlink,
        "one more": lambda: (folder / "b.txt").write_text("x"),
        "a link": lambda: (file.unlink(), file.symlink_to(archives[1])),
        "a note of something else": lambda: unpacked._note_of(folder).write_text('{"bytes": 1}'),
        "no note": lambda: unpacked._note_of(folder).unlink(),
    }
    for damage, make in damages.items():
        later()
        time.sleep(0.02)  # a file system's clock may be a coarse one
        make()
        assert unpack(archives[0]) == folder, damage
        assert file.read_text() == as_it_was and not file.is_symlink(), damage
        assert not (folder / "b.txt").exists()
    assert "was changed since it was unpacked" in caplog.text
    later()
    stamp = file.stat().st_mtime_ns
    assert unpack(archives[0]) == folder and file.stat().st_mtime_ns == stamp


def test_a_link_in_its_place_is_not_trusted(archives: list[Path], tmp_path: Path) -> None:
    folder = unpack(archives[0])
    later()
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert unpack(archives[0]) == folder and not folder.is_symlink()
    assert (tmp_path / "elsewhere" / "a").is_dir()


def test_the_longest_unused_go_first(archives: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLDRACE_CACHE_GB", str(2.5 * KILOBYTE / 1e9))
    first, second = map(unpack, archives[:2])
    for folder, age in ((first, 200), (second, 100)):
        os.utime(unpacked._lock_of(folder), (time.time() - age,) * 2)
    later()
    unpack(archives[0])  # used again
    later()
    third = unpack(archives[2])
    assert first.exists() and third.exists() and not second.exists()
    assert not unpacked._note_of(second).exists()
    assert unpack(archives[1]).exists() and not first.exists()


def test_what_another_process_uses_stays(
    archives: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOLDRACE_CACHE_GB", str(1.5 * KILOBYTE / 1e9))
    other = subprocess.Popen(
        [sys.executable, "-c", UNPACK, archives[0]],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with other:
        assert other.stdout is not None and other.stdin is not None
        held = Path(other.stdout.readline().strip())
        with pytest.raises(DataError, match=r"are in use: set FOLDRACE_CACHE_GB to more"):
            unpack(archives[1])
        assert (held / "a/1.txt").exists()
        (held / "b.txt").write_text("x")
        with pytest.raises(DataError, match="another process uses it"):
            unpack(archives[0])
        other.kill()
    assert unpack(archives[1]).exists() and not held.exists()


def test_an_archive_beyond_the_bound_removes_nothing(
    archives: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = unpack(archives[0])
    later()
    monkeypatch.setenv("FOLDRACE_CACHE_GB", str(0.5 * KILOBYTE / 1e9))
    with pytest.raises(DataError, match="FOLDRACE_CACHE_GB"):
        unpack(archives[1])
    assert first.exists()


@pytest.mark.parametrize("text", ["many", "nan", "-"])
def test_a_bound_that_is_no_number(
    archives: list[Path], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("FOLDRACE_CACHE_GB", text)
    with pytest.raises(EnvironmentProblem, match=f"FOLDRACE_CACHE_GB: got '{text}'; allowed"):
        unpack(archives[0])


def test_folders_that_may_go_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setenv("FOLDRACE_CACHE_GB", str(2.5 * KILOBYTE / 1e9))
    for number, name in enumerate("abcd"):
        folder = tmp_path / "matrices" / name
        folder.mkdir(parents=True)
        (folder / "raw.npy").write_bytes(bytes(KILOBYTE))
        os.utime(folder, (time.time() - 10_000 + number,) * 2)
    unpacked.remove_oldest(tmp_path / "matrices", keep="a")
    assert sorted(os.listdir(tmp_path / "matrices")) == ["a", "d"]
