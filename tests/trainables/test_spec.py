"""Warnings of a fold trial: kept for its record, and still printed where they were."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from pathlib import Path

from foldrace.trainables.spec import capture_warnings

ROOT = Path(__file__).resolve().parents[2]


def test_each_warning_once_in_order_from_every_thread() -> None:
    log = logging.getLogger("foldrace")
    with capture_warnings(["its start"]) as notes:
        log.warning("no room: %d GB", 3)
        thread = threading.Thread(target=log.error, args=("not saved",))
        thread.start()
        thread.join()
        log.warning("no room: 3 GB")
        log.info("an epoch")
        logging.getLogger("other").warning("not ours")
    log.warning("later")
    assert list(notes) == ["its start", "no room: 3 GB", "not saved"]


def test_a_process_without_handlers_prints_a_warning_as_before() -> None:
    code = (
        "import logging\nfrom foldrace.trainables.spec import capture_warnings\n"
        "with capture_warnings([]):\n    logging.getLogger('foldrace').warning('no room')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stderr.splitlines() == ["no room"]
