"""What other users see of the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHOW = """
import json, sys
from pathlib import Path
from foldrace.console.process_list import take_arguments
given = take_arguments()
shown = Path('/proc/self/cmdline').read_bytes().decode().split(chr(0))
print(json.dumps([given, sys.argv[1:], shown]))
"""


def test_a_secret_is_given_and_then_shown_no_more() -> None:
    arguments = [
        "run",
        "사진.yaml",
        "--set",
        "search.storage=postgresql://u:HUNTER2@h/d",
        "--out=x",
    ]
    done = subprocess.run(
        [sys.executable, "-c", SHOW, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    given, argv, shown = json.loads(done.stdout)
    assert given == arguments
    assert "HUNTER2" not in str(argv) + str(shown)
    assert argv[3] == "search.storage=postgresql://***@h/d"
    assert (argv[:3], argv[4]) == (arguments[:3], arguments[4])
    command = shown[shown.index("run") :]
    assert command[:3] == arguments[:3] and command[4] == "--out=x"
    assert command[3].startswith("search.storage=postgresql://***@h/d")
