"""Two processes never sweep into one run folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from foldrace.commands.machine import only_driver
from foldrace.core.errors import RunFolderError
from foldrace.run_folder.store import RunStore


def test_a_second_driver_is_refused(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    with (
        only_driver(store, tmp_path),
        pytest.raises(RunFolderError, match="at work on it"),
        only_driver(store, tmp_path),
    ):
        pytest.fail("two drivers at once")
    with only_driver(store, tmp_path):
        assert (tmp_path / "driver.lock").exists()
