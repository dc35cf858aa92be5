"""How far one driver reaches.

slots     a real Ray cluster of 1, 2, 4 and 8 raylets with 16 declared GPUs together, fold trials
          that sleep ten seconds (`sides/our_tune.py`): how much of the slots' time is slept, from
          the moment when all are in use until the last trial starts, and what the driver computes.
driver    500 fold trials at a time, of 100 to 260 seconds each, by simulation
          (`sides/controller_sweep.py`: all of the driver is real but Ray Tune, time and training
          are pretended): the driver's memory, and its seconds of computing in a pretended second.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import ROOT, Results, environment, options
from sides.pretend_learner import make_bank, make_run, run_config

_SIDES = ROOT / "benchmarks" / "sides"
_GPUS, _FOLDS, _SECONDS, _CANDIDATES = 16, 4, 10.0, 24
_NODES = (1, 2, 4, 8)
_SLOTS, _ROWS, _CLASSES = 500, 33_000, 10


def _side(script: str, *given: object, out: int | None = None) -> dict[str, Any]:
    """What it writes, from a process of its own; `out` is the place of its path among the words."""
    words = list(map(str, given))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        words.insert(len(words) if out is None else out, str(path))
        command = [sys.executable, str(_SIDES / f"{script}.py"), *words]
        subprocess.run(command, check=True, env=environment(), stdout=subprocess.DEVNULL)
        figures: dict[str, Any] = json.loads(path.read_text())
    return figures


def _slots(results: Results, quick: bool) -> None:
    for nodes in (2,) if quick else _NODES:
        gpus, seconds = (1, 1.0) if quick else (_GPUS // nodes, _SECONDS)
        candidates = 3 if quick else _CANDIDATES
        found = _side("our_tune", candidates, _FOLDS, seconds, nodes, gpus, out=3)
        results.add(
            f"slots: fold trials of {seconds:g} s",
            raylets=nodes,
            slots=found["slots"],
            trials=found["trials"],
            slots_busy=found["slots_busy"],
            pause_between_s=found["pauses_s"],
            until_full_s=found["until_full_s"],
            sweep_s=found["sweep"],
            driver_cpu_s=found["cpu"],
            driver_mb=found["rss_mb"],
        )
        results.at_least(f"{nodes} raylets: slots busy", 0.95, found["slots_busy"])


def _driver(results: Results, quick: bool) -> None:
    slots, rows, candidates = (20, 600, 60) if quick else (_SLOTS, _ROWS, 1_000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_bank(folder / "bank", make_run(folder / "empty", run_config(1), rows, _CLASSES))
        run = folder / "run"
        make_run(run, run_config(candidates), rows, _CLASSES)
        found = _side("controller_sweep", "sweep", run, folder / "bank", slots)
    session, new = found["session"], found["calls"]["new_candidate"]["all"]
    results.add(
        f"driver: {slots} fold trials at a time, {candidates:,} candidates, {rows:,} rows",
        fold_trials=found["fold_trials"],
        pretended_s=session["pretended_s"],
        cpu_s=session["cpu_s"],
        cpu_share=session["cpu_s"] / session["pretended_s"],
        ms_a_trial=1e3 * session["cpu_s"] / found["fold_trials"],
        new_candidate_median_ms=new["median_ms"],
        new_candidate_p99_ms=new["p99_ms"],
        slots_busy=session["slots_busy"],
        driver_mb=session["peak_rss_mb"],
    )


def main() -> None:
    given = options(__doc__, only="slots or driver")
    results = Results("scale")
    for name, part in (("slots", _slots), ("driver", _driver)):
        if given.only in (None, name):
            part(results, given.quick)
    results.publish(given)


if __name__ == "__main__":
    main()
