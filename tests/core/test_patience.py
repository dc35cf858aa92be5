"""Disks and stores that fail for a while; a real full disk where one can be mounted."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from foldrace.core.files import LocalFiles, at_once
from foldrace.core.patience import Patience


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_waited_for(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(900_000))
    said: list[str] = []
    files = LocalFiles(small_disk / "run")
    files.patience = Patience(60.0, said.append)
    threading.Timer(1.0, (small_disk / "ballast").unlink).start()
    files.write("trial.json", bytes(500_000))
    assert (small_disk / "run" / "trial.json").stat().st_size == 500_000
    assert len(said) == 2 and "trial.json: [Errno 28] No space left" in said[0]
    assert " MB free)" in said[0] and said[1].endswith("is well again")
    assert [path.name for path in (small_disk / "run").iterdir()] == ["trial.json"]


def test_what_can_be_made_again_is_not_waited_for(small_disk: Path) -> None:
    files = LocalFiles(small_disk)
    files.patience = Patience(60.0)
    began = time.monotonic()
    with at_once(files), pytest.raises(OSError, match="No space left"):
        files.write("leaderboard.csv", bytes(2_000_000))
    assert time.monotonic() - began < 5


def failing(error: OSError, times: int) -> list[int]:
    """Calls that the answer took."""
    calls = [0]

    def call() -> None:
        calls[0] += 1
        if calls[0] <= times:
            raise error

    Patience(3.0).ask("/x", call)
    return calls


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.EROFS, errno.EDQUOT])
def test_what_may_pass_is_asked_again(code: int) -> None:
    assert failing(OSError(code, os.strerror(code)), times=1) == [2]


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "no file"),
        PermissionError(errno.EACCES, "not yours"),
        OSError("When reading: AWS Error ACCESS_DENIED during HeadObject"),
    ],
)
def test_what_does_not_pass_is_raised_at_once(error: OSError) -> None:
    began = time.monotonic()
    with pytest.raises(OSError, match=r"no file|not yours|ACCESS_DENIED"):
        failing(error, times=1)
    assert time.monotonic() - began < 0.4


def test_it_ends_with_the_error_and_with_ctrl_c(tmp_path: Path) -> None:
    error = OSError(errno.EIO, "Input/output error")
    with pytest.raises(OSError, match="Input/output"):
        failing(error, times=99)

    def broken() -> None:
        raise error

    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        Patience(600.0, given_up=stop.is_set).ask("/x", broken)
    assert time.monotonic() - began < 5
