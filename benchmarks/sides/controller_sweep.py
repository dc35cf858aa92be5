"""One session of a sweep whose training is pretended, in a process of its own.

`python controller_sweep.py sweep|fill|resume|judge RUN BANK SLOTS OUT`: figures as JSON to OUT.
`sweep` runs all candidates of the run folder's config with the product's own `SweepSession`
(searcher, scheduler, study, state, race, budget, shares, tables): what its calls took, its memory,
and what came out. `fill` writes what a sweep leaves. `resume` rebuilds it all from the run folder
and writes the tables. `judge` takes the race alone.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from pretend_learner import EPOCHS, Learner
from timed_tune import Call, TimedTune

from foldrace.config.schema import SweepConfig
from foldrace.core.files import record_json
from foldrace.run_folder.records import CandidateRecord, RaceDecision, summarise
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.race import Race
from foldrace.scheduling.ray.cluster import Cluster
from foldrace.scheduling.ray.ending import Ending
from foldrace.scheduling.ray.sweep_session import SweepSession
from foldrace.scheduling.room import Room
from foldrace.scheduling.state import FoldTask, SweepState
from foldrace.search_spaces.space import build_space

_COMPLETE = 5
"""Candidates in the blend before the race alone is timed."""
_LAST = 100
"""Candidates at the end of the sweep whose calls are shown by themselves."""
Figures = dict[str, float]


@dataclass(frozen=True)
class _Slots:
    """All that is asked of a cluster between starting and ending Tune."""

    room: Room
    death: str | None = None


def _session(run: Path, slots: int) -> tuple[RunStore, SweepSession]:
    store = RunStore.open(run)
    config = store.config()
    space, problems = build_space(config, "")
    assert not problems
    cluster = cast(Cluster, _Slots(Room(lambda: slots)))
    ending = Ending(lambda line: None, "")
    return store, SweepSession(store, config, space, cluster, lambda progress: None, ending)


def sweep(run: Path, bank: Path, slots: int) -> dict[str, object]:
    """Runs it; gives the figures."""
    store, session = _session(run, slots)
    logging.getLogger("foldrace").setLevel(logging.ERROR)
    tune = TimedTune(
        store, session.searcher, session.scheduler, session.on_step, Learner(bank), slots
    )
    mark, cpu = time.perf_counter(), time.process_time()
    tune.tune.run()
    wall, used = time.perf_counter() - mark, time.process_time() - cpu
    listed = session.sweep.state.summaries()
    ends = {
        "progress_s": _seconds(session.progress),
        "tables_s": _seconds(lambda: store.write_tables(listed)),
        "close_s": _seconds(session.close),
    }
    summaries = store.summaries()
    return {
        "calls": {name: _figures(calls) for name, calls in vars(tune.calls).items()},
        "statuses": Counter(summary.status for summary in summaries),
        "backbones": Counter(summary.candidate.backbone for summary in summaries),
        "fold_trials": sum(len(summary.trials) for summary in summaries),
        "decisions": Counter(d.action for summary in summaries for d in summary.decisions),
        "session": {
            "wall_s": wall,
            "cpu_s": used,
            "calls_s": sum(call.wall for calls in vars(tune.calls).values() for call in calls),
            "pretended_s": tune.tune.now,
            "slots_busy": tune.tune.busy / (slots * tune.tune.now),
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
            **ends,
        },
        "bytes": _sizes(run),
    }


def resume(run: Path, bank: Path, slots: int) -> dict[str, object]:
    """Rebuilds searcher, study, state and race; gives the seconds."""
    mark, cpu = time.perf_counter(), time.process_time()
    store, session = _session(run, slots)
    rebuilt = time.perf_counter() - mark
    summaries = session.sweep.state.summaries()
    store.write_tables(summaries)
    return {
        "rebuilt_s": rebuilt,
        "with_tables_s": time.perf_counter() - mark,
        "cpu_s": time.process_time() - cpu,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "statuses": Counter(summary.status for summary in summaries),
    }


def judge(run: Path, bank: Path, slots: int) -> dict[str, object]:
    """The race's decisions on first folds, once some candidates are complete."""
    store, learner = RunStore.open(run), Learner(bank)
    config = store.config()
    state = SweepState(store.fold_count, config.resources.max_failures)
    race, times = Race(store, config.race, state), list[float]()
    for number, record in enumerate(_candidates(config)):
        first = number >= _COMPLETE
        state.add(record)
        store.save_candidate(record)
        for fold in range(1 if first else store.fold_count):
            ending = learner.ending(record, fold, store.folds().hash)
            ending.write(store)
            state.start(FoldTask(record, fold))
            state.end(ending.record)
            race.fold_ended(record.candidate)
            mark = time.perf_counter()
            decision = race.judge(record.candidate, fold)
            times += [time.perf_counter() - mark] if first else []
            state.decide(decision)
    return {
        "rows": ending.record.variants["raw"].rows,
        "variants": len(ending.record.variants),
        "decisions": len(times),
        "median_ms": float(np.median(times)) * 1e3,
        "most_ms": max(times) * 1e3,
    }


def fill(run: Path, bank: Path, slots: int) -> dict[str, object]:
    """A run folder of a sweep that is over, in which every candidate is complete."""
    store, learner = RunStore.open(run), Learner(bank)
    folds, number = store.fold_count, 0
    for record in _candidates(store.config()):
        folder = run / "trials" / record.candidate
        endings = [learner.ending(record, fold, store.folds().hash) for fold in range(folds)]
        for fold, ending in enumerate(endings):
            ending.write(store)
            decision = RaceDecision(
                number=number, candidate=record.candidate, fold=fold, rule="gain",
                action="complete" if fold == folds - 1 else "continue", folds_done=fold + 1,
                rows=ending.record.variants["raw"].rows * (fold + 1), gain=-0.01, gain_se=0.001,
                complete=number // folds, epochs_trained=number * EPOCHS, reason="made up",
            )  # fmt: skip
            (folder / f"fold{fold}" / "decision.json").write_bytes(record_json(decision))
            number += 1
        (folder / "candidate.json").write_bytes(record_json(record))
        summary = summarise(record, [ending.record for ending in endings], folds, running=False)
        columns = {v: store.true_prob(record.candidate, v) for v in summary.variants}
        store.save_calibrated(summary, columns)
    return {"fold_trials": number}


def _candidates(config: SweepConfig) -> Iterator[CandidateRecord]:
    """None of them diverges, and no two are alike."""
    space, _ = build_space(config, "")
    for number in range(config.search.candidates):
        backbone = space.backbones[number % len(space.backbones)]
        dropout = 0.2 + 0.2 * number / config.search.candidates
        params = space.default(backbone).as_dict() | {"lr": 1e-4, "dropout": dropout}
        yield CandidateRecord(candidate=f"c{number:04d}", backbone=backbone, params=params)


def _figures(calls: Sequence[Call]) -> Mapping[str, Figures]:
    """Of all calls, and of those while the last candidates began."""
    end = max((call.candidates for call in calls), default=0)
    parts = {"all": calls, "last": [call for call in calls if call.candidates > end - _LAST]}
    return {name: _figures_of(part) for name, part in parts.items() if part}


def _figures_of(calls: Sequence[Call]) -> Figures:
    wall = np.array([call.wall for call in calls]) * 1e3
    cpu = np.array([call.cpu for call in calls]) * 1e3
    return {
        "calls": len(calls),
        "median_ms": float(np.median(wall)),
        "p99_ms": float(np.percentile(wall, 99)),
        "most_ms": float(wall.max()),
        "cpu_median_ms": float(np.median(cpu)),
        "cpu_p99_ms": float(np.percentile(cpu, 99)),
        "total_s": float(wall.sum()) / 1e3,
    }


def _seconds(function: Callable[[], object]) -> float:
    mark = time.perf_counter()
    function()
    return time.perf_counter() - mark


def _sizes(run: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(run.iterdir()) if file.is_file()}


def main() -> None:
    do, folder, bank, slots, out = sys.argv[1:]
    work = {"sweep": sweep, "fill": fill, "resume": resume, "judge": judge}[do]
    Path(out).write_text(json.dumps(work(Path(folder), Path(bank), int(slots))))


if __name__ == "__main__":
    main()
