"""What a user allows: in a file of their own, for exactly what it names, until it is deleted."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from foldrace.core import consent
from foldrace.core.consent import (
    allow_plugins,
    allow_run,
    allowed_plugins,
    consent_folder,
    is_allowed_run,
    plugins_digest,
)
from foldrace.core.errors import EnvironmentProblem, RunFolderError
from foldrace.core.plugin_files import PluginFile

PLUGIN = PluginFile("own", b"PARTS = []\n", "/runs/a/plugins/own.py")
OTHERS = (
    PluginFile("own", b"PARTS = [ ]\n", PLUGIN.path),
    PluginFile("owm", PLUGIN.source, PLUGIN.path),
)


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own folder, and a process that nothing was allowed in."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(consent, "_given", set())
    return tmp_path / "config"


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a later process."""
    monkeypatch.setattr(consent, "_given", set())


def test_what_is_allowed_is_remembered_for_exactly_these_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(RunFolderError) as refused:
        allowed_plugins([PLUGIN])
    text = str(refused.value)
    assert PLUGIN.path in text and plugins_digest([PLUGIN]) in text and "--trust-plugins" in text
    allow_plugins([PLUGIN])
    forget(monkeypatch)
    elsewhere = PluginFile(PLUGIN.module, PLUGIN.source, "s3://bucket/plugins/own.py")
    assert allowed_plugins([elsewhere]) == [elsewhere]
    for files in ([OTHERS[0]], [OTHERS[1]], [PLUGIN, OTHERS[1]]):
        with pytest.raises(RunFolderError):
            allowed_plugins(files)
    for file in consent_folder().iterdir():
        file.unlink()
    with pytest.raises(RunFolderError):
        allowed_plugins([PLUGIN])


def test_permissions_are_the_users_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0)
    try:
        allow_plugins([PLUGIN])
        allow_run("/runs/a", "/runs/b")
    finally:
        os.umask(before)
    folder = consent_folder()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = list(folder.iterdir())
    assert len(files) == 2
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert any(PLUGIN.path in file.read_text() for file in files)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder to another user")
def test_permissions_of_another_user_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    allow_plugins([PLUGIN])
    forget(monkeypatch)
    [file] = consent_folder().iterdir()
    os.chown(file, 65534, 65534)
    with pytest.raises(RunFolderError):
        allowed_plugins([PLUGIN])
    os.chown(consent_folder(), 65534, 65534)
    with pytest.raises(EnvironmentProblem, match="not yours"):
        allowed_plugins([PLUGIN])


def test_a_run_is_allowed_for_one_blend(monkeypatch: pytest.MonkeyPatch) -> None:
    allow_run("/runs/a", "/runs/b")
    forget(monkeypatch)
    assert is_allowed_run("/runs/a", "/runs/b")
    for root, other in (("/runs/b", "/runs/a"), ("/runs/c", "/runs/b"), ("/runs/a", "/runs/b/")):
        assert not is_allowed_run(root, other)


def test_another_process_knows_what_was_allowed() -> None:
    allow_run("/runs/a", "/runs/b")
    code = "from foldrace.core.consent import *; assert is_allowed_run('/runs/a', '/runs/b')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_where_nothing_can_be_written_it_holds_for_the_command(
    config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config.write_text("no folder")
    allow_plugins([PLUGIN])
    assert allowed_plugins([PLUGIN]) == [PLUGIN]
    assert "cannot be remembered" in caplog.text
