"""Files appear whole or not at all, on a disk and in an object store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from foldrace.core.errors import RunFolderError
from foldrace.core.files import (
    Files,
    LocalFiles,
    RemoteFiles,
    atomic_folder,
    atomic_write,
    open_files,
)

OLD, NEW = b"o" * 100, b"n" * 50_000_000


@pytest.fixture(params=["local", "file-url", "s3-url", "s3-variables"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    """An empty folder of each kind."""
    if request.param == "local":
        return open_files(tmp_path / "run")
    if request.param == "file-url":
        return open_files((tmp_path / "내 run").as_uri())
    endpoint = request.getfixturevalue("s3_environment")
    if request.param == "s3-url":
        query = f"endpoint_override=http://{endpoint}&scheme=http&region=us-east-1"
        return open_files(f"s3://runs/{tmp_path.name}?{query}")
    request.getfixturevalue("monkeypatch").setenv("AWS_ENDPOINT_URL", f"http://{endpoint}")
    return open_files(f"s3://runs/{tmp_path.name}/내 run")


def test_contract_of_every_kind_of_folder(files: Files) -> None:
    assert not files.exists("a/b/c.txt")
    assert files.names() == files.names("a/b") == []
    files.write("a/b/c.txt", b"one")
    files.write("a/b/c.txt", b"two")
    files.write("a/b/빈 파일", b"")
    files.write("a/d.txt", bytes(range(256)))
    assert files.read("a/b/c.txt") == b"two"
    assert files.read("a/b/빈 파일") == b""
    assert files.read("a/d.txt") == bytes(range(256))
    assert files.exists("a/b/c.txt") and files.exists("a/b")
    assert files.names("a") == ["b", "d.txt"]
    assert files.names("a/b") == ["c.txt", "빈 파일"]
    files.delete("a/d.txt")
    files.delete("a/b")
    files.delete("never there")
    assert not files.exists("a/b/c.txt")
    assert files.names("a") == []
    with pytest.raises(OSError):
        files.read("a/d.txt")


def test_sizes(files: Files) -> None:
    files.write("a/빈 파일", b"")
    files.write("a/c.bin", bytes(1234))
    assert (files.size("a/빈 파일"), files.size("a/c.bin")) == (0, 1234)
    with pytest.raises(FileNotFoundError):
        files.size("a/never there")


def test_stamps_follow_the_files(files: Files) -> None:
    assert files.stamps("a") == {}
    for name in ("a/x", "a/b/c/빈 파일", "a/b/y", "other/z"):
        files.write(name, b"one")
    before = files.stamps("a")
    assert before.keys() == {"a/x", "a/b/c/빈 파일", "a/b/y"}
    assert files.stamps("a") == before
    files.write("a/b/y", b"other")
    files.delete("a/x")
    after = files.stamps("a")
    assert after.keys() == {"a/b/c/빈 파일", "a/b/y"}
    assert after["a/b/c/빈 파일"] == before["a/b/c/빈 파일"] and after["a/b/y"] != before["a/b/y"]


def test_files_being_written_have_no_stamps(tmp_path: Path) -> None:
    LocalFiles(tmp_path).write("a/x", OLD)
    (tmp_path / "a" / ".part-0123-y").write_bytes(b"half")
    (tmp_path / "a" / "broken").symlink_to(tmp_path / "nowhere")
    assert LocalFiles(tmp_path).stamps("a").keys() == {"a/x"}


def test_file_urls_are_local(tmp_path: Path) -> None:
    assert isinstance(open_files(tmp_path.as_uri()), LocalFiles)


@pytest.mark.parametrize("url", ["hdfs://host/x", "foo://bar", "http://host/x", "s3:///nothing"])
def test_other_urls_are_refused_with_what_is_allowed(url: str) -> None:
    with pytest.raises(RunFolderError, match="allowed: a local path, or s3://"):
        RemoteFiles(url)


def test_files_being_written_are_invisible_and_replaced_files_leave_nothing(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    files.write("x", OLD)
    files.write("x", b"new")
    (tmp_path / ".part-0123-y").write_bytes(b"half")
    assert files.names() == ["x"]
    assert not files.exists("y")
    assert sorted(os.listdir(tmp_path)) == [".part-0123-y", "x"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = LocalFiles(tmp_path)
    files.write("x", OLD)

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write("x", b"new")
    assert files.read("x") == OLD
    assert os.listdir(tmp_path) == ["x"]


def test_a_block_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a" / "x") as file:
        file.write(OLD)
        assert os.listdir(tmp_path / "a") != ["x"]
    with pytest.raises(ValueError), atomic_write(tmp_path / "a" / "x") as file:
        file.write(b"new")
        raise ValueError
    assert (tmp_path / "a" / "x").read_bytes() == OLD
    assert os.listdir(tmp_path / "a") == ["x"]


def test_a_file_being_written_can_be_read(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "x") as file:
        file.write(OLD)
        file.seek(0)
        assert file.read() == OLD


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "a" / "x"
    with pytest.raises(ValueError), atomic_folder(target) as part:
        (part / "1").write_bytes(OLD)
        raise ValueError
    assert os.listdir(tmp_path / "a") == []
    with atomic_folder(target) as part:
        (part / "1").write_bytes(OLD)
        assert not target.exists()
    assert os.listdir(tmp_path / "a") == ["x"]
    assert (target / "1").read_bytes() == OLD


def test_the_folder_of_a_faster_process_stays(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "x") as part:
        (part / "2").write_bytes(b"late")
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "1").write_bytes(b"first")
    assert os.listdir(tmp_path) == ["x"]
    assert os.listdir(tmp_path / "x") == ["1"]
    with pytest.raises(OSError), atomic_folder(tmp_path / "y") as part:
        (tmp_path / "y").write_bytes(b"a file is in the way")


WRITER = """
import sys
from pathlib import Path
from foldrace.core.files import LocalFiles
files = LocalFiles(Path(sys.argv[1]))
print("ready", flush=True)
while True:
    files.write("x", b"n" * 50_000_000)
"""


@pytest.mark.parametrize("delay", [0.005, 0.02, 0.05, 0.1])
def test_kill_in_mid_write_leaves_the_old_or_the_new_file(tmp_path: Path, delay: float) -> None:
    files = LocalFiles(tmp_path)
    files.write("x", OLD)
    root = Path(__file__).resolve().parents[2]
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, cwd=root
    )
    assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
    try:
        writer.wait(delay)
    except subprocess.TimeoutExpired:
        os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert files.read("x") in (OLD, NEW)
    assert files.names() == ["x"]


WAYS_OUT = {
    "a file": ("trials/c0000/trial.json", "trials/c0000/trial.json"),
    "a folder": ("trials/c0000", "trials/c0000/trial.json"),
    "a link to a link": ("link", "link/trial.json"),
    "no link": (None, "../secret/trial.json"),
}


@pytest.mark.parametrize("way", WAYS_OUT)
def test_a_link_does_not_lead_out_of_the_folder(tmp_path: Path, way: str) -> None:
    secret, run = tmp_path / "secret", tmp_path / "run"
    secret.mkdir()
    (run / "trials").mkdir(parents=True)
    (secret / "trial.json").write_bytes(OLD)
    link, name = WAYS_OUT[way]
    (run / "within").symlink_to(secret)
    if link is not None:
        (run / link).parent.mkdir(parents=True, exist_ok=True)
        target = {"a file": secret / "trial.json", "a folder": secret}.get(way, run / "within")
        (run / link).symlink_to(target)
    files = LocalFiles(run)
    with pytest.raises(RunFolderError, match=f"leads out of {run}, to {tmp_path}"):
        files.read(name)
    if way != "a file":  # a link that is replaced or removed goes itself
        for change in (lambda: files.write(name, b""), lambda: files.delete(name)):
            with pytest.raises(RunFolderError, match="leads out"):
                change()
    else:
        files.write(name, b"new")
        assert files.read(name) == b"new"
    assert (secret / "trial.json").read_bytes() == OLD
    assert os.listdir(secret) == ["trial.json"]


def test_links_within_the_folder_are_followed_once(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    files.write("a/x", OLD)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for name in ("round", "and round"):
        (tmp_path / "a" / name).symlink_to(tmp_path / "a")
    assert files.read("b/x") == files.read("a/round/and round/x") == OLD
    assert files.stamps("a").keys() == {"a/x", "a/round", "a/and round"}
