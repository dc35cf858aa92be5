"""The driver of a sweep at scale: 1,000 candidates of 5 folds, with training alone pretended.

sweep       searcher, scheduler, study (TPE), state, race, budget, shares and tables are the
            product's own, in one process (`sides/controller_sweep.py`); Ray Tune is played by
            `tests/pretend_tune.py` with 64 slots, and a fold trial links prepared OOF files of
            33,000 rows and 10 classes, raw and EMA, into the run folder and writes a log and a
            `trial.json` (`sides/pretend_learner.py`); at a rung it leaves what a real one does, may
            be parked, and goes on from there. Records and decisions are written and synced as
            always.
all folds   the same without a race: each candidate gets its five folds.
resume      a new process rebuilds all of it from the run folder, and writes the tables; also of a
            folder in which all candidates are complete.
ask         a suggestion of `OptunaSearch` (`sides/plain_tpe.py`) beside ours, with as many trials.
judge       one decision of the race with 396 classes, on the 6,600 rows of a first fold.

Times are wall seconds of single calls; `cpu` is what the process computed in them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness import ROOT, Results, environment, options
from sides.pretend_learner import make_bank, make_run, run_config

_ROWS, _CLASSES, _SLOTS = 33_000, 10, 64
_MANY_CLASSES = 396
_SIDES = ROOT / "benchmarks" / "sides"
_NAMES = {
    "new_candidate": "suggest: a new candidate",
    "next_fold": "suggest: the next fold of one",
    "parked": "suggest: the rest of a parked fold",
    "nothing": "suggest: nothing now",
    "complete": "on_trial_complete",
    "result": "on_trial_result",
    "rung": "a rung is judged",
    "look": "each step of Tune",
}


@dataclass(frozen=True)
class Size:
    """How much is done."""

    candidates: int
    without_race: int
    complete: int
    """In the folder that is only resumed."""
    trials: tuple[int, ...]
    """Of the study that a suggestion of the peer is measured on."""
    asks: int


_FULL = Size(1_000, 1_000, 1_000, (1_000,), 10)
_QUICK = Size(60, 20, 50, (1_000,), 5)


def _sweeps(results: Results, size: Size, folder: Path) -> dict[str, Any]:
    """Gives the figures of the sweep with a race."""
    make_bank(folder / "bank", make_run(folder / "empty", run_config(1), _ROWS, _CLASSES))
    figures = _one_sweep(results, "gain", size.candidates, folder)
    _one_sweep(results, "none", size.without_race, folder)
    _all_complete(results, size.complete, folder)
    return figures


def _all_complete(results: Results, candidates: int, folder: Path) -> None:
    run = folder / "run-complete"
    make_run(run, run_config(candidates), _ROWS, _CLASSES)
    _side("controller_sweep", "fill", run, folder / "bank", _SLOTS)
    again = _side("controller_sweep", "resume", run, folder / "bank", _SLOTS)
    _add_resume(results, f"{candidates:,} complete candidates", again)


def _one_sweep(results: Results, rule: str, candidates: int, folder: Path) -> dict[str, Any]:
    run = folder / f"run-{rule}"
    make_run(run, run_config(candidates, rule), _ROWS, _CLASSES)
    figures = _side("controller_sweep", "sweep", run, folder / "bank", _SLOTS)
    again = _side("controller_sweep", "resume", run, folder / "bank", _SLOTS)
    assert again["statuses"] == figures["statuses"], (again["statuses"], figures["statuses"])
    shutil.rmtree(run)
    _add_sweep(results, f"{candidates:,} candidates, race: {rule}", figures, again)
    return figures


def _add_sweep(
    results: Results, title: str, figures: dict[str, Any], again: dict[str, Any]
) -> None:
    for calls, spans in figures["calls"].items():
        for span, cells in spans.items():
            which = "all" if span == "all" else "last 100 candidates"
            results.add(f"{title}: calls", call=_NAMES[calls], of=which, **cells)
    results.add(
        f"{title}: the sweep",
        fold_trials=figures["fold_trials"],
        **figures["statuses"],
        **figures["session"],
    )
    results.add(f"{title}: candidates of each backbone", **figures["backbones"])
    results.add(f"{title}: megabytes", **{k: v / 1e6 for k, v in figures["bytes"].items()})
    _add_resume(results, title, again)
    median = figures["calls"]["new_candidate"]["all"]["median_ms"]
    results.at_most(f"{title}: ms of a new candidate, median", 100, median)


def _add_resume(results: Results, title: str, again: dict[str, Any]) -> None:
    results.add(f"{title}: resume", **again.pop("statuses"), **again)
    results.at_most(f"{title}: s of resume with tables", 10, again["with_tables_s"])


def _asks(results: Results, size: Size, ours: dict[str, Any]) -> None:
    for trials in size.trials:
        for side, times in _side("plain_tpe", trials, _SLOTS, size.asks).items():
            _add_ask(results, trials, side, float(np.median(times)) * 1e3, max(times) * 1e3)
    last = ours["calls"]["new_candidate"]["last"]
    _add_ask(results, size.candidates, "ours, with its files", last["median_ms"], last["most_ms"])


def _add_ask(results: Results, trials: int, side: str, median_ms: float, most_ms: float) -> None:
    results.add("ask", side=side, trials=trials, median_ms=median_ms, most_ms=most_ms)


def _judge(results: Results, folder: Path) -> None:
    run = folder / "run"
    make_bank(folder / "bank", make_run(run, run_config(40), _ROWS, _MANY_CLASSES), 2, 1)
    figures = _side("controller_sweep", "judge", run, folder / "bank", _SLOTS)
    results.add(f"judge: {_MANY_CLASSES} classes", **figures)


def _side(script: str, *given: object) -> dict[str, Any]:
    """What it writes, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        command = [sys.executable, str(_SIDES / f"{script}.py"), *map(str, given), str(out)]
        subprocess.run(command, check=True, env=environment(), stdout=subprocess.DEVNULL)
        figures: dict[str, Any] = json.loads(out.read_text())
    return figures


def main() -> None:
    given = options(__doc__)
    size = _QUICK if given.quick else _FULL
    results = Results("controller")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        figures = _sweeps(results, size, Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        _judge(results, Path(folder))
    _asks(results, size, figures)
    results.add(
        "the whole",
        seconds=time.perf_counter() - started,
        niceness=os.nice(0),
        rows=_ROWS,
        classes=_CLASSES,
        slots=_SLOTS,
    )
    results.publish(given)


if __name__ == "__main__":
    main()
