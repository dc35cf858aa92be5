"""What `doctor` says of this machine, against what others say of it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
from http.server import HTTPServer, SimpleHTTPRequestHandler
from importlib import import_module
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from foldrace.checks import machine
from foldrace.checks.machine import Finding, machine_findings
from foldrace.trainables.models import hub


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hubs are asked in a test of their own alone."""
    monkeypatch.setattr(machine, "_HUBS", {})


def found(what: str) -> Finding:
    [finding] = [finding for finding in machine_findings() if finding.what == what]
    return finding


def test_devices_are_those_of_the_system() -> None:
    nproc = subprocess.run(["nproc"], capture_output=True, text=True, check=True).stdout.strip()
    assert found("CPU cores").value.split(" of ")[0] in (nproc, str(len(os.sched_getaffinity(0))))
    gpus = found("GPUs").value
    if not torch.cuda.is_available():
        assert gpus == "none"
        return
    first = torch.cuda.get_device_properties(0)
    assert gpus.startswith(f"{torch.cuda.device_count()}; driver ")
    value = found("GPU 0").value
    assert value.startswith(f"{first.name}, {first.total_memory / 1e9:.1f} GB, bf16: ")
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which("nvidia-smi"):
        driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert f"driver {driver.split()[0]}," in gpus


def test_versions_are_those_that_the_packages_say() -> None:
    findings = {finding.what: finding for finding in machine_findings()}
    for package in machine._PACKAGES:
        version = import_module(package).__version__
        assert version.startswith(findings[package].value)  # torch adds the build
        assert findings[package].advice == ""


def test_a_package_that_is_missing_forbids_every_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_PACKAGES", ("no-such-package",))
    finding = found("no-such-package")
    assert finding.forbids and finding.advice == "pip install 'no-such-package'"


def test_a_package_of_another_version_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"timm": Requirement("timm>=999")}
    monkeypatch.setattr(machine, "_requirements", lambda: wanted)
    finding = found("timm")
    assert not finding.forbids and finding.advice == "pip install 'timm>=999'"


def test_what_we_ask_of_packages_is_in_pyproject() -> None:
    text = (Path(machine.__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    for name, requirement in machine._requirements().items():
        assert f'"{name}' in text and all(str(s) in text for s in requirement.specifier)
    assert machine._requirements().keys() >= {"torch", "timm", "pandas"}


def test_the_cache_is_as_large_as_its_files(own_cache: Path) -> None:
    assert found("cache").value.startswith(f"{own_cache}: 0.0 GB, ")  # it need not exist
    for name, size in (("pixels/a/images.raw", 300_000_000), ("unpacked/b.png", 1_000)):
        path = own_cache / name
        path.parent.mkdir(parents=True)
        with path.open("wb") as file:
            file.truncate(size)
    text = found("cache").value
    stats = os.statvfs(own_cache)
    used, free = text.removeprefix(f"{own_cache}: ").removesuffix(" GB free").split(" GB, ")
    assert used == "0.3"
    assert float(free) == pytest.approx(stats.f_bavail * stats.f_frsize / 1e9, abs=2.0)


def test_little_room_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found("cache").advice == "" or shutil.disk_usage("/tmp").free < 10e9
    monkeypatch.setattr(machine, "_LEAST_DISK", 1e9)  # 10^18 bytes
    finding = found("cache")
    assert "FOLDRACE_CACHE" in finding.advice and not finding.forbids


def test_shared_memory_is_that_of_the_mount(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = os.statvfs("/dev/shm")
    total = stats.f_blocks * stats.f_frsize / 1e9
    assert found("/dev/shm").value.endswith(f" of {total:.1f} GB")
    monkeypatch.setattr(machine, "_LEAST_SHARED", 1e9)
    assert "--shm-size" in found("/dev/shm").advice


@pytest.mark.parametrize("more", [0, 1])
def test_a_temporary_folder_is_too_long_where_a_socket_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: int
) -> None:
    """The longest that fits, and one byte more."""
    short = Path("/tmp") / f"fr{os.getpid()}"
    fits = 107 - len(f"{short}//{machine._RAY_SOCKET}")
    folder = short / ("x" * (fits + more))
    path = folder / machine._RAY_SOCKET
    path.parent.mkdir(parents=True)
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    try:
        finding = found("temporary folder")
        with socket.socket(socket.AF_UNIX) as made:
            if more:
                with pytest.raises(OSError, match="too long"):
                    made.bind(str(path))
            else:
                made.bind(str(path))
    finally:
        shutil.rmtree(short)
    assert finding.forbids == bool(more)
    assert ("export RAY_TMPDIR=/tmp" in finding.advice) == bool(more)
    assert str(107 + more) in finding.value


def test_open_files_are_what_the_shell_says(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["sh", "-c", "ulimit -n; ulimit -Hn"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert found("open files").value == f"{said[0]}, at most {said[1]} (ulimit -n)"
    monkeypatch.setattr(machine, "_LEAST_FILES", 10**12)
    assert ("65536" in found("open files").advice) == (said[1] != "unlimited")


def test_a_hub_that_answers_and_one_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None: ...

    monkeypatch.setattr(machine, "_HUBS", {"torchvision": "download.pytorch.org"})
    with HTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(hub, "_TORCH_HUB", f"http://127.0.0.1:{server.server_port}/nothing")
        assert found("download.pytorch.org") == Finding("download.pytorch.org", "answers")
        server.shutdown()
    closed = found("download.pytorch.org")
    assert closed.value == "no answer within 2 s" and "training.pretrained" in closed.advice


def test_a_hub_is_not_asked_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_HUBS", {"timm": "huggingface.co"})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    offline = Finding("huggingface.co", "not asked: HF_HUB_OFFLINE is set")
    assert found("huggingface.co") == offline
