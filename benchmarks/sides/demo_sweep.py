"""`sweep.py demo` for real, and where its wall time went, from its own log and records alone."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from harness import ROOT, environment

from foldrace.run_folder.store import RunStore

_LOG_TIME = "%Y-%m-%d %H:%M:%S,%f"


@dataclass(frozen=True)
class DemoRun:
    """The demo's own log and records, in seconds of the wall clock."""

    began: float
    ended: float
    events: dict[str, float]
    slots: int
    trials: tuple[tuple[float, float], ...]
    """Began and ended, of those that were not parked at the end."""
    trained: float
    """Seconds of all slots together."""

    @property
    def sweep_wall(self) -> float:
        return self.events["sweep: ended"] - self.events["sweep: begins"]

    @property
    def whole_wall(self) -> float:
        return self.ended - self.began


def pieces(run: DemoRun) -> list[tuple[str, float]]:
    """The command from its start to its end, without a gap; slot time that no trial used is
    divided by the slots."""
    event = run.events
    written = event["run: blend and report written"]
    first = min(start for start, _ in run.trials)
    last = max(end for _, end in run.trials)
    by_end = sorted(end for _, end in run.trials)
    tail = sum(last - end for end in by_end[-run.slots :]) / run.slots
    between = (last - first) - run.trained / run.slots - tail
    return [
        ("imports, data written, checks", event["Ray: starting"] - run.began),
        ("Ray's start", event["sweep: begins"] - event["Ray: starting"]),
        ("Tune's start, workers' start and imports", first - event["sweep: begins"]),
        ("training, per slot", run.trained / run.slots),
        ("between trials and staggered start, per slot", between),
        ("the last trials: slots without work, per slot", tail),
        ("Tune's end", event["sweep: ended"] - last),
        ("Ray's end", event["Ray: stopped"] - event["sweep: ended"]),
        ("blend, submission, report", written - event["Ray: stopped"]),
        ("Python's end", run.ended - written),
    ]


def run_demo(folder: Path) -> DemoRun:
    out = folder / "demo"
    began = time.time()
    subprocess.run(
        [sys.executable, str(ROOT / "sweep.py"), "demo", "--out", str(out)],
        check=True,
        stdout=subprocess.DEVNULL,
        env=environment(FOLDRACE_CACHE=str(folder / "cache")),
    )
    ended = time.time()
    store = RunStore.open(out / "run")
    log = (out / "run" / "logs" / "application.log").read_text(encoding="utf-8").splitlines()
    events = {
        message: datetime.strptime(line[:23], _LOG_TIME).timestamp()
        for line in log
        if (message := _event(line)) is not None
    }
    slots = re.search(r"sweep: begins, (\d+) fold trials", "\n".join(log))
    assert slots is not None
    records = store.trials().values()
    trials = [(r.started_at, r.ended_at) for r in records if r.status != "stopped"]
    trained = sum(record.seconds for record in records)
    return DemoRun(began, ended, events, int(slots[1]), tuple(trials), trained)


def _event(line: str) -> str | None:
    """`2026-01-01 10:00:00,123 INFO Ray: starting` -> `Ray: starting`."""
    match = re.match(r"\S+ \S+ INFO ((?:Ray|sweep|run): [a-z ]+)", line)
    return match[1].removesuffix(" after ") if match else None
