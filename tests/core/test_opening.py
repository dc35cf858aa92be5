"""Only regular files of bounded size are opened; nothing else is waited for or read."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from foldrace.core.files import LocalFiles
from foldrace.core.opening import UnfitFile, file_fault, open_regular, read_regular, unreadable


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def bound_socket(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(path))
    return path


def link_to_a_pipe(path: Path) -> Path:
    path.symlink_to(pipe(path.with_name("other")))
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def sparse(path: Path) -> Path:
    path.touch()
    os.truncate(path, 5 * 10**9)
    return path


UNFIT: dict[str, tuple[Callable[[Path], Path], str]] = {
    "pipe": (pipe, "is a pipe"),
    "link": (link_to_a_pipe, "is a pipe"),
    "socket": (bound_socket, "is a socket"),
    "folder": (folder, "is a folder"),
    "large": (sparse, "has 5 GB; allowed: at most 1 MB"),
    "endless": (lambda path: Path("/dev/zero"), "is a device"),
    "proc": (lambda path: Path("/proc/self/status"), "holds more than its size of 0 bytes"),
    "NUL": (lambda path: Path("a\0b"), "has a NUL character in its name"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_is_no_bounded_file_is_refused_at_once(tmp_path: Path, case: str) -> None:
    make, reason = UNFIT[case]
    path = make(tmp_path / "x")
    with pytest.raises(UnfitFile) as refused:
        read_regular(path, 10**6)
    assert reason in unreadable(refused.value)
    assert refused.value.filename == str(path)
    if case not in ("large", "proc"):
        with pytest.raises(UnfitFile):
            open_regular(path, 10**6)
        assert file_fault(path) is not None


def test_a_file_of_the_largest_size_is_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"0123456789")
    (tmp_path / "link").symlink_to("x")
    assert read_regular(tmp_path / "link", 10) == b"0123456789"
    assert file_fault(tmp_path / "link") is None
    with pytest.raises(UnfitFile):
        read_regular(tmp_path / "x", 9)


def test_a_missing_file_and_one_that_may_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        read_regular(tmp_path / "x", 10)
    assert unreadable(missing.value) == "cannot be read: No such file or directory"
    assert file_fault(tmp_path / "x") == "does not exist"
    assert file_fault(tmp_path / ("x" * 5000)) == "is no file: File name too long"


def test_a_run_folder_is_read_through_it(tmp_path: Path) -> None:
    pipe(tmp_path / "trial.json")
    with pytest.raises(UnfitFile, match="is a pipe"):
        LocalFiles(tmp_path).read("trial.json")
