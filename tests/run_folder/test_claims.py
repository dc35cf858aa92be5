"""One owner at a time, on a mounted folder and in an object store; real processes and server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Barrier, Thread

import pytest

from foldrace.console.machine import is_at_work, only_driver
from foldrace.core.errors import RunFolderError
from foldrace.core.files import open_files
from foldrace.run_folder import claims
from foldrace.run_folder.claims import Claims
from foldrace.run_folder.store import RunStore

HOLDER = """
import sys, time
from foldrace.core.files import open_files
from foldrace.run_folder.claims import Claims
with Claims(open_files(sys.argv[1]), "logs/driver").hold("resume"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def store_at(s3_environment: str, tmp_path: Path) -> str:
    """A URL in an object store, of this test alone."""
    query = f"endpoint_override={s3_environment}&scheme=http&region=us-east-1"
    return f"s3://runs/{tmp_path.name}?{query}"


@pytest.fixture(params=["mounted", "object store"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "mounted":
        return str(tmp_path / "run")
    url: str = request.getfixturevalue("store_at")
    return url


@pytest.fixture
def holder(root: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the claim."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, root], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_owner_is_refused_and_told_who_is_first(
    root: str, holder: subprocess.Popen[str]
) -> None:
    claims = Claims(open_files(root), "logs/driver")
    with pytest.raises(RunFolderError, match=rf"`resume` on .*, process {holder.pid}, since"):
        claims.hold("run").__enter__()
    assert [claim.pid for claim in claims.alive()] == [holder.pid]
    holder.kill()  # no word of its own
    holder.wait()
    assert claims.alive() == []
    with claims.hold("run") as held:
        assert [claim.pid for claim in claims.alive()] == [os.getpid()] and not held.lost
    assert claims.alive() == [] and open_files(root).names("logs/driver") == []


def test_of_many_that_come_at_once_one_wins(root: str) -> None:
    """In an object store nobody may win at first; never two."""
    count, inside, most, wins = 6, [0], [0], [0]
    barrier = Barrier(count)

    def come() -> None:
        own = Claims(open_files(root), "logs/driver")
        barrier.wait()
        with ExitStack() as stack:
            try:
                stack.enter_context(own.hold("run", patience=30.0))
            except RunFolderError:
                return
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            wins[0] += 1
            time.sleep(0.05)
            inside[0] -= 1

    threads = [Thread(target=come) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and wins == [count]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Calling it makes this process one of another machine than those before."""
    return lambda: monkeypatch.setattr(claims, "_place", lambda: "another machine")


def test_a_claim_from_elsewhere_is_believed_while_it_is_fresh(
    store_at: str, elsewhere: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner, cut off for a minute, finds that it has lost it and stops."""
    monkeypatch.setattr(claims, "BEAT", 0.2)
    files = open_files(store_at)
    one = Claims(files, "logs/driver")
    with one.hold("run") as held:
        [claim] = one.alive()
        elsewhere()
        other = Claims(open_files(store_at), "logs/driver")
        time.sleep(0.5)  # some beats
        with pytest.raises(RunFolderError, match="at work"):
            other.hold("resume").__enter__()
        monkeypatch.setattr(claims, "SILENT", -5.0)  # as if its last beat were a minute old
        with other.hold("resume") as second:
            deadline = time.monotonic() + 20
            while not held.lost and time.monotonic() < deadline:
                time.sleep(0.05)
            assert held.lost and not second.lost
            assert files.exists(f"logs/driver/{second._claim.owner}.json")
            assert not files.exists(f"logs/driver/{claim.owner}.json")


def test_a_process_number_that_is_used_again_is_no_owner(tmp_path: Path) -> None:
    """Nor is a damaged claim one."""
    files = open_files(tmp_path)
    one = Claims(files, "logs/driver")
    with one.hold("run"):
        [name] = files.names("logs/driver")
        mine = json.loads(files.read(f"logs/driver/{name}"))
    mine["process_started"] -= 1
    files.write("logs/driver/old.json", json.dumps(mine).encode())
    files.write("logs/driver/torn.json", b'{"owner": "x')
    assert one.alive() == []
    with one.hold("run"):
        assert len(one.alive()) == 1


def test_nobody_is_at_work_on_a_copy(tmp_path: Path) -> None:
    """Of a run folder whose driver lives; renamed, it is the same folder."""
    with Claims(open_files(tmp_path / "run"), "logs/driver").hold("run"):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        assert Claims(open_files(tmp_path / "copy"), "logs/driver").alive() == []
        (tmp_path / "run").rename(tmp_path / "moved")
        assert len(Claims(open_files(tmp_path / "moved"), "logs/driver").alive()) == 1
        (tmp_path / "moved").rename(tmp_path / "run")


def test_a_folder_that_becomes_no_run_is_left_as_it_was(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "runs" / "new")
    with only_driver(store, "run"):
        assert is_at_work(store)
        with pytest.raises(RunFolderError, match="at work on it"), only_driver(store, "run"):
            pytest.fail("two drivers at once")
        assert is_at_work(store)
    assert not (tmp_path / "runs").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with only_driver(RunStore(tmp_path / "mine"), "run"):
        pass
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
