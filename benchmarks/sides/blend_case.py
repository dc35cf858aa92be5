"""One data set of `ensemble_peers.py` in a folder, and the call of one side on it.

Each side runs in a process of its own: the peers in their own environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from harness import ROOT, environment, machine
from oof_data import OofData
from sides import synthetic
from sides.peer_venv import peer_python

SIDES = ROOT / "benchmarks" / "sides"
OURS = ("greedy (numba)", "greedy (numpy)", "optimal (numba)", "optimal (numpy)")
FULL = ("AutoGluon EnsembleSelection", "amltk, log loss", "amltk, true class")
"""Peers that are given (N, C) probabilities a member."""
COLUMNS = ("amltk, columns", "hillclimbers")
_LIMIT = 150.0  # seconds a side, its data included
_WORK = 8  # further (N, C) float64 arrays that a peer with full rows makes

Figures = dict[str, float]


@dataclass(frozen=True)
class Case:
    """One table: its data lie in `folder`."""

    part: str
    folder: Path
    rounds: int
    members: int
    rows: int
    classes: int

    @property
    def name(self) -> str:
        """For a goal."""
        size = f" M={self.members:,} N={self.rows:,}" if self.part == "synthetic" else ""
        return self.part + size

    @property
    def title(self) -> str:
        """Of the table."""
        sizes = f"{self.members:,} members, {self.rows:,} rows, {self.classes} classes"
        return f"{self.part}: {sizes}, {self.rounds} rounds"

    @property
    def full_bytes(self) -> int:
        """What a side with full float32 rows needs at least."""
        each = self.rows * self.classes
        return 4 * self.members * each + 8 * _WORK * each


def real_case(top: Path, data: OofData, rounds: int) -> Case:
    """In a new folder in `top`."""
    folder = Path(tempfile.mkdtemp(dir=top))
    true_prob = data.true_prob
    prob = np.exp(data.log_prob.astype(np.float64))
    np.save(folder / "prob.npy", prob / prob.sum(axis=2, keepdims=True))
    np.save(folder / "true_prob.npy", true_prob)
    np.save(folder / "labels.npy", data.labels)
    return Case(data.name, folder, rounds, *prob.shape)


def made_case(top: Path, members: int, rows: int, classes: int, rounds: int) -> Case:
    """Synthetic, written block by block to a new folder in `top`."""
    folder = Path(tempfile.mkdtemp(dir=top))
    shape = (members, rows)
    path = folder / "true_prob.npy"
    matrix = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    start = 0
    for block in synthetic.true_prob_blocks(members, rows):
        matrix[start : start + len(block)] = block
        start += len(block)
    matrix.flush()
    np.save(folder / "labels.npy", synthetic.labels(rows, classes))
    return Case("synthetic", folder, rounds, members, rows, classes)


def run_side(case: Case, side: str) -> Figures | str:
    """The side's figures, or why there are none."""
    if side in FULL and case.full_bytes > _available():
        return f"not run: needs {case.full_bytes / 1e9:.0f} GB of memory"
    ours = side in OURS
    script = SIDES / ("our_blend.py" if ours else "peer_blend.py")
    python = sys.executable if ours else str(peer_python())
    out = case.folder / "figures.json"
    command = [python, str(script), str(case.folder), str(out), str(case.rounds), side]
    try:
        ended = subprocess.run(
            command,
            timeout=_LIMIT,
            env=environment() if ours else os.environ | {"PYTHONWARNINGS": "ignore"},
            stdout=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {_LIMIT:g} s"
    if ended.returncode != 0:
        return f"failed: exit code {ended.returncode}"
    figures: Figures = json.loads(out.read_text())
    return figures


def _available() -> float:
    """Bytes that a process may take."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return min(float(free) * 1024, 0.9e9 * machine().memory_gb)
