"""The peers' own environment: made once, from `peers/requirements.txt`, in `build/bench`.

Their versions of pandas and ours do not agree.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from harness import ROOT
from oof_data import CACHE

_REQUIREMENTS = ROOT / "benchmarks" / "peers" / "requirements.txt"


def peer_python() -> Path:
    """The interpreter of the environment; half a minute and 0.8 GB the first time."""
    digest = hashlib.sha256(_REQUIREMENTS.read_bytes()).hexdigest()[:12]
    folder = CACHE / f"peers-{digest}"
    python = folder / "bin" / "python"
    if not (folder / "complete").is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--requirement"]
        subprocess.run([*install, str(_REQUIREMENTS)], check=True)
        (folder / "complete").touch()
    return python
