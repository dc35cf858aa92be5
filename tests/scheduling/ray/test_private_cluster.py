"""Nobody but the user reaches the cluster that is started on this machine: addresses, token, modes.

One real cluster in a process of its own, with an empty home folder, serves all but the refusals.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from foldrace.core.errors import EnvironmentProblem
from foldrace.scheduling.ray import device_group
from foldrace.scheduling.ray.private_cluster import private_cluster, session_folder
from tests.conftest import write_tiny_run
from tests.scheduling.ray.test_device_group import spec_for

ROOT = Path(__file__).resolve().parents[3]
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
DEADLINE = 300.0  # seconds; only a fault takes so long


@dataclass(frozen=True)
class PrivateCluster:
    """What the process said of its cluster, which runs while the tests look at it."""

    said: dict[str, Any]
    home: Path
    run: Any

    @property
    def token_file(self) -> Path:
        return self.home / ".ray" / "auth_token"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path) -> Iterator[Any]:
    run = write_tiny_run(tmp_path_factory.mktemp("private") / "run", tiny_images)
    spec = spec_for(run)
    home = tmp_path_factory.mktemp("home")
    short = Path(tempfile.mkdtemp(prefix="fr-"))
    short.chmod(0o777)
    script = Path(__file__).with_name("one_private_cluster.py")
    environment = (
        {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        | {"HOME": str(home), "RAY_TMPDIR": str(short), "PYTHONPATH": str(ROOT)}
        | device_group._SETTINGS
    )
    with subprocess.Popen(
        [sys.executable, script, spec.run, spec.image_root, spec.candidate],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, "the process ended"
            yield PrivateCluster(json.loads(line), home, run)
            process.communicate(timeout=DEADLINE)
            assert process.returncode == 0
        finally:
            process.kill()
            shutil.rmtree(short, ignore_errors=True)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.slow
@pytest.mark.ray
def test_everything_listens_on_loopback_alone(cluster: PrivateCluster) -> None:
    """Driver, workers, gcs_server, raylet, agents, dashboard, and the devices' process group."""
    assert cluster.run.store.trial("c0000", 0).status == "finished"
    seen = {(name, ip) for name, ip in cluster.said["seen"]}
    assert [(name, ip) for name, ip in seen if ip not in LOOPBACK] == []
    names = " ".join(sorted({name for name, _ in seen}))
    for part in ("gcs_server", "raylet", "DashboardAgen", "RuntimeEnvAgen", "RayTrainWorker"):
        assert part in names


@pytest.mark.slow
@pytest.mark.ray
def test_the_token_is_asked_for_and_is_ours_alone(cluster: PrivateCluster) -> None:
    """Ray itself would write it for all to read."""
    assert mode(cluster.token_file) == 0o600
    assert mode(cluster.token_file.parent) == 0o700
    url = f"{cluster.said['dashboard']}/api/jobs/"
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(url)
    assert refused.value.code == 401
    token = cluster.token_file.read_text()
    with urllib.request.urlopen(
        urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    ) as answer:
        assert answer.status == 200


@pytest.mark.slow
@pytest.mark.ray
def test_a_client_without_the_token_is_refused(cluster: PrivateCluster, tmp_path: Path) -> None:
    look = (
        "import sys; from ray._raylet import GcsClient\n"
        "GcsClient(address=sys.argv[1]).internal_kv_keys(b'', None, timeout=5)"
    )
    for token, expected in ((cluster.token_file.read_text(), 0), ("0" * 64, 1), ("", 1)):
        environment = os.environ | {"HOME": str(tmp_path)}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {}
        done = subprocess.run(
            [sys.executable, "-c", look, cluster.said["gcs"]],
            env=environment, capture_output=True, text=True, timeout=DEADLINE,
        )  # fmt: skip
        assert done.returncode == expected, done.stderr
        assert expected == 0 or "uthenticat" in done.stderr


@pytest.mark.slow
@pytest.mark.ray
def test_nobody_else_enters_the_sessions(cluster: PrivateCluster) -> None:
    """Ray opens its folders to everybody: the one around them is closed."""
    session = Path(cluster.said["session"])
    around = session.parents[1]
    assert around.name == f"foldrace-{os.geteuid()}"
    assert mode(around) == 0o700
    sockets = [path for path in session.rglob("*") if path.is_socket()]
    assert sockets and all(len(os.fsencode(path)) < 107 for path in sockets)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    return tmp_path


def start() -> None:
    with private_cluster():
        pass


def test_a_token_of_ours_that_all_may_read_is_closed(home: Path) -> None:
    path = home / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("known")
    path.chmod(0o644)
    start()
    assert (mode(path), path.read_text()) == (0o600, "known")


def test_a_token_is_written_once(home: Path) -> None:
    start()
    token = (home / ".ray" / "auth_token").read_text()
    assert len(token) == 64
    start()
    assert (home / ".ray" / "auth_token").read_text() == token
    assert os.listdir(home / ".ray") == ["auth_token"]


def test_a_cluster_without_a_token_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(EnvironmentProblem, match=r"RAY_AUTH_MODE: got 'disabled'.*unset it"):
        start()


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder to another user")
def test_a_session_folder_of_another_user_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    short = Path(tempfile.mkdtemp(prefix="fr-"))
    try:
        monkeypatch.setenv("RAY_TMPDIR", str(short))
        theirs = short / f"foldrace-{os.geteuid()}"
        theirs.mkdir()
        os.chown(theirs, 65534, 65534)
        with pytest.raises(
            EnvironmentProblem, match=r"is a folder of nobody, not yours .*RAY_TMPDI"
        ):
            start()
        theirs.rmdir()
        theirs.symlink_to(home)
        os.chown(theirs, 65534, 65534, follow_symlinks=False)
        with pytest.raises(EnvironmentProblem, match="not yours"):
            start()
    finally:
        shutil.rmtree(short)


def test_a_long_folder_is_left_for_a_short_one(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", f"/tmp/{'long' * 20}")
    assert session_folder() == Path(f"/tmp/foldrace-{os.geteuid()}/ray")
    assert not Path(f"/tmp/{'long' * 20}").exists()
