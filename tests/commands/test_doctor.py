"""`doctor`: one table, and an exit code by whether any sweep could run."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from click.testing import Result
from typer.testing import CliRunner

from foldrace.checks import machine
from foldrace.scheduling.ray.cluster import on_each_node, open_ports
from foldrace.sweep import app
from tests.pretend_tune import pretend_ray

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No hub is asked, and no Ray starts."""
    monkeypatch.setattr(machine, "_HUBS", {})
    with pretend_ray(cpus=3):
        yield


def doctor() -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["doctor"])


def states(text: str) -> dict[str, str]:
    """What -> ok, warning or error."""
    lines = (re.match(r"\s*(\S.*?) +(ok|warning|error) ", line) for line in text.splitlines())
    return {line[1]: line[2] for line in lines if line}


@pytest.mark.usefixtures("quick")
def test_each_line_is_ok_or_says_what_to_do() -> None:
    done = doctor()
    assert done.exit_code == 0, done.output
    found = states(done.stdout)
    assert found.keys() >= {
        "CPU cores", "GPUs", "Python", "torch", "timm", "ray", "pandas", "cache", "/dev/shm",
        "temporary folder", "open files", "Ray", "Ray's ports",
    }  # fmt: skip
    assert found["torch"] == found["Ray"] == "ok" and "error" not in found.values()
    assert "3 cores, 0 GPUs for trials" in done.stdout


@pytest.mark.usefixtures("quick")
def test_what_forbids_every_sweep_is_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The whole table is printed all the same, but Ray is not started in vain."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 100)))
    monkeypatch.setattr(machine, "_PACKAGES", ("torch", "no-such-package"))
    done = doctor()
    assert done.exit_code == 2
    found = states(done.stdout)
    assert found["temporary folder"] == found["no-such-package"] == "error"
    assert found["torch"] == "ok" and "Ray" not in found
    assert "2 problems:" in done.stderr and "export RAY_TMPDIR=/tmp" in done.stderr


@pytest.mark.usefixtures("quick")
def test_a_cluster_that_does_not_answer_is_exit_code_2(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:  # undone before the pretended cluster is
        patch.setattr(ray, "is_initialized", lambda: False)
        done = CliRunner().invoke(app, ["doctor", "--address", "127.0.0.1:1"])
    assert done.exit_code == 2 and "no Ray cluster answers there" in " ".join(done.stderr.split())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_open_ports_without_a_token_are_a_warning(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Of a child of this process that listens on every address."""
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    listens = (
        "import socket, sys\ns = socket.create_server(('0.0.0.0', 0))\n"
        "print(s.getsockname()[1], flush=True)\nsys.stdin.read()"
    )
    command = [sys.executable, "-c", listens]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None and child.stdout is not None
        port = int(child.stdout.readline())
        done = doctor()
        child.stdin.close()
    assert done.exit_code == 0
    if mode == "disabled":
        assert states(done.stdout)["Ray's ports"] == "warning"
        assert f"0.0.0.0:{port}" in done.stdout and "RAY_AUTH_MODE=token" in done.stdout
    else:
        assert states(done.stdout)["Ray's ports"] == "ok"
        assert re.search(r"[1-9]\d* open to others, who need its token", done.stdout)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.full
def test_open_ports_are_those_that_other_machines_reach(real_ray: Path) -> None:
    """Each port of Ray's processes, asked at an address that is not this machine's own loop."""
    addresses = [
        a.address
        for interface in psutil.net_if_addrs().values()
        for a in interface
        if a.family == socket.AF_INET and not a.address.startswith("127.")
    ]
    if not addresses:
        pytest.skip("this machine has no address but 127.0.0.1")
    ports = listening_ports()
    assert ports
    reached = {port for port in ports if answers(addresses[0], port)}
    assert reached == {int(text.rpartition(":")[2]) for text in open_ports()}


def listening_ports() -> set[int]:
    """Of this process's children, by /proc."""
    inodes = set()
    for child in psutil.Process().children(recursive=True):
        for link in Path(f"/proc/{child.pid}/fd").glob("*"):
            try:
                inodes.add(os.readlink(link))
            except OSError:
                continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                found.add(int(fields[1].rpartition(":")[2], 16))
    return found


def answers(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(5.0)
        return probe.connect_ex((address, port)) == 0


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.full
def test_each_node_is_asked(real_ray: Path) -> None:

    def process() -> int:
        return os.getpid()

    [(node, pid)] = on_each_node(process)
    assert node == ray.nodes()[0]["NodeManagerAddress"]  # type: ignore[no-untyped-call]
    assert pid in {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.full
def test_the_start_of_ray_is_tried(tmp_path: Path) -> None:
    """In a process of its own, as people type it."""
    done = subprocess.run(
        [sys.executable, ROOT / "sweep.py", "doctor"],
        capture_output=True, text=True, timeout=300, env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert states(done.stdout)["Ray"] == "ok"
    cores = len(os.sched_getaffinity(0))
    assert re.search(rf"starts in \d+ s; {cores} cores, ", done.stdout)
