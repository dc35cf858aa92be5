"""What the race costs the blend, and what it saves: every policy over the same fold trials.

Two tables, each really trained once (`sides/race_recorder.py`) and kept in `data/`:

fold_race     75 candidates of 4 small backbones x 5 folds of handwritten digits that had been made
              hard, 12 epochs from scratch; 497 test images
photo_race    photos of 10 classes, EfficientNet-Lite0 at 32 px and Lite2 at 64 px with ImageNet
              weights, 3 folds, 8 epochs; an epoch of one costs several of the other; 400 test
              images

A replay goes through the product's own sweep, race, study and run folder, with four slots on a
simulated clock; only the training is looked up. Random orders of the candidates serve all policies:

none          every fold of every candidate
forgiving     a candidate's mean loss must stay below the worst fold of the best complete one
gain          the default race; also with other settings
mixing ASHA   Ray's ASHAScheduler over the fold trials of all folds alike, at the race's rungs; a
              candidate with a stopped fold cannot be complete
Repeater      Ray's ray.tune.search.Repeater over the same list

At a budget that no policy knows beforehand, a part of the epochs (or of the slots' seconds) of all
folds of all candidates, the candidates that were complete by then are blended, raw and EMA weights
at temperatures of their own, by greedy-50, and scored on images that no trial and no choice has
seen. Standard errors of differences are over orders, and over test images (of the mean over
orders). A policy that has ended by itself keeps its blend at larger budgets; before anything is
complete the prediction is 1/C.

told          runs of their own, each with so many fold trials (`search.fold_trials`; the Repeater:
              as many candidates as they allow)
small         sweeps of 8, 16 and 24 of the candidates on the first 3 folds
"""

from __future__ import annotations

import math
import multiprocessing
import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean

import numpy as np
import race_table
from harness import Results, machine, options
from numpy.typing import NDArray
from race_table import TABLES, RaceTable
from sides.race_players import Foldrace, RepeaterOverList, sweep_config
from sides.race_replay import Replay, play

from foldrace.config.schema import RaceConfig
from foldrace.ensemble.solvers.greedy import greedy

_BUDGETS = (0.05, 0.1, 0.2, 1 / 3, 0.4, 1.0)
_SMALL_BUDGETS = (0.3, 0.5, 1.0)
_SMALL = (8, 16, 24)
_SMALL_FOLDS = 3
_SLOTS = 4
_FULL, _FORGIVING, _GAIN, _REPEATER = "none", "forgiving", "gain", "Repeater"
_TOLD = (_GAIN, _FORGIVING, _REPEATER)


@dataclass(frozen=True)
class Policy:
    """`race` None: the Repeater."""

    name: str
    race: RaceConfig | None = None
    mixing_asha: bool = False


POLICIES = (
    Policy(_FULL, RaceConfig(rule="none")),
    Policy(_FORGIVING, RaceConfig(rule="forgiving")),
    Policy(_GAIN, RaceConfig()),
    Policy("gain, eta 2", RaceConfig(eta=2)),
    Policy("gain, eta 4", RaceConfig(eta=4)),
    Policy("gain, z 0", RaceConfig(z=0.0)),
    Policy("gain, z 2", RaceConfig(z=2.0)),
    Policy("gain, whole folds", RaceConfig(epoch_stopping=False)),
    Policy("mixing ASHA", RaceConfig(rule="none"), mixing_asha=True),
    Policy(_REPEATER),
)
_BY_NAME = {policy.name: policy for policy in POLICIES}


@dataclass(frozen=True)
class Job:
    """One replay of a part of a table."""

    policy: str
    order: int
    """Seed of the random order."""
    table: str
    candidates: int | None = None
    """So many, chosen at random; None: all."""
    folds: int | None = None
    fold_trials: int | None = None
    """Its budget, where it is told one."""
    budgets: tuple[float, ...] = _BUDGETS


@dataclass(frozen=True)
class Scored:
    """A replay, with the blend at each budget of epochs and of seconds."""

    replay: Replay
    total_epochs: int
    complete: tuple[int, ...]
    test: NDArray[np.float32]
    """(budgets, images): log loss of each test image, by epochs."""
    test_by_seconds: NDArray[np.float32]


@cache
def _table(name: str, folds: int | None) -> RaceTable:
    table = race_table.load(TABLES[name])
    return table if folds is None else table.first_folds(folds)


def _score(job: Job) -> Scored:
    """In a worker process."""
    table = _table(job.table, job.folds)
    rng = np.random.default_rng(job.order)
    order = [table.candidates[i].candidate for i in rng.permutation(len(table.candidates))]
    order = order[: job.candidates]
    with tempfile.TemporaryDirectory(dir=_fast_folder()) as folder:
        replay = play(table, _player(table, job, order, Path(folder)), _SLOTS)
    keys = [(name, fold) for name in order for fold in range(table.fold_count)]
    epochs = sum(len(table.seconds(key)) for key in keys)
    seconds = sum(sum(table.seconds(key)) for key in keys)
    complete = [replay.complete_at(part * epochs) for part in job.budgets]
    by_seconds = [replay.complete_by(part * seconds) for part in job.budgets]
    return Scored(
        replay,
        epochs,
        tuple(len(names) for names in complete),
        np.stack([_losses(table, names) for names in complete]),
        np.stack([_losses(table, names) for names in by_seconds]),
    )


def _player(
    table: RaceTable, job: Job, order: list[str], folder: Path
) -> Foldrace | RepeaterOverList:
    policy, told = _BY_NAME[job.policy], job.fold_trials
    if policy.race is None:
        return RepeaterOverList(table, order[: None if told is None else told // table.fold_count])
    config = sweep_config(table, order, policy.race, told)
    return Foldrace(table, config, folder, _SLOTS, policy.mixing_asha)


def _fast_folder() -> str | None:
    """Run folders in memory, where there is such a place."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _losses(table: RaceTable, names: frozenset[str]) -> NDArray[np.float32]:
    """(images,) held-out log loss of the blend of these candidates."""
    if not names:
        return np.full(table.test_true.shape[-1], math.log(len(table.classes)), np.float32)
    places = sorted(table.index[name] for name in names)
    oof, test = (
        kept[:, places].reshape(-1, kept.shape[-1]) for kept in (table.oof_true, table.test_true)
    )
    return np.asarray(-np.log(greedy(oof).weights @ test), np.float32)


Runs = Mapping[str, Sequence[Scored]]


def _replayed(jobs: Sequence[Job]) -> Runs:
    """Policy -> its runs, in the order of the jobs."""
    os.environ["OMP_NUM_THREADS"] = "1"  # a worker process a core
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(machine().cores, context) as pool:
        scored = list(pool.map(_score, jobs))
    return {
        name: [s for job, s in zip(jobs, scored, strict=True) if job.policy == name]
        for name in dict.fromkeys(job.policy for job in jobs)
    }


def _standard_error(values: NDArray[np.floating]) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else math.nan


def _compared(runs: Sequence[Scored], peer: Sequence[Scored], at: int) -> tuple[float, ...]:
    """Mean difference of the held-out loss, its error over orders, and over test images."""
    change = np.stack([a.test[at] - b.test[at] for a, b in zip(runs, peer, strict=True)])
    return float(change.mean()), _standard_error(change.mean(1)), _standard_error(change.mean(0))


def _losses_table(results: Results, title: str, runs: Runs, budgets: Sequence[float]) -> None:
    for name, of_one in runs.items():
        losses = {
            f"{part:.0%}": fmean(float(run.test[i].mean()) for run in of_one)
            for i, part in enumerate(budgets)
        }
        parts = [run.replay.epochs / run.total_epochs for run in of_one]
        results.add(
            f"{title}: held-out log loss at parts of the epochs, and where it ended by itself",
            policy=name,
            **losses,
            ends_at=fmean(parts),
            complete=fmean(run.complete[-1] for run in of_one),
        )


def _paired_table(
    results: Results, title: str, runs: Runs, peer: str, budgets: Sequence[float]
) -> None:
    for name, of_one in runs.items():
        if name == peer:
            continue
        for i, part in enumerate(budgets):
            mean, orders, images = _compared(of_one, runs[peer], i)
            results.add(
                f"{title}: held-out loss less that of {peer}, same orders",
                policy=name,
                at=f"{part:.0%}",
                change=mean,
                se_over_orders=orders,
                se_over_images=images,
            )


def _by_seconds(results: Results, title: str, runs: Runs) -> None:
    for name, of_one in runs.items():
        for i, part in enumerate(_BUDGETS):
            change = [
                float((a.test_by_seconds[i] - b.test_by_seconds[i]).mean())
                for a, b in zip(of_one, runs[_REPEATER], strict=True)
            ]
            results.add(
                f"{title}: held-out loss at parts of the slots' seconds, less that of Repeater",
                policy=name,
                at=f"{part:.0%}",
                loss=fmean(float(run.test_by_seconds[i].mean()) for run in of_one),
                change=fmean(change),
                se_over_orders=_standard_error(np.array(change)),
            )


def _told(results: Results, table: str, orders: int) -> None:
    fits = len(_table(table, None).candidates) * _table(table, None).fold_count
    for part in _BUDGETS[:-1]:
        jobs = [
            Job(name, order, table, fold_trials=round(part * fits))
            for order in range(orders)
            for name in _TOLD
        ]
        runs = _replayed(jobs)
        for name in _TOLD:
            mean, error, images = _compared(runs[name], runs[_REPEATER], -1)
            results.add(
                f"{table}: told its part of {fits} fold trials, and less Repeater's",
                policy=name,
                told=f"{part:.0%}",
                loss=fmean(float(run.test[-1].mean()) for run in runs[name]),
                change=mean,
                se_over_orders=error,
                se_over_images=images,
            )


def _small(results: Results, table: str, orders: int) -> None:
    for candidates in _SMALL:
        if candidates > len(_table(table, None).candidates):
            continue
        jobs = [
            Job(name, 100 + order, table, candidates, _SMALL_FOLDS, budgets=_SMALL_BUDGETS)
            for order in range(orders)
            for name in (_GAIN, "gain, eta 4", _FORGIVING, _REPEATER)
        ]
        runs = _replayed(jobs)
        title = f"{table}: {candidates} candidates x {_SMALL_FOLDS} folds"
        _losses_table(results, title, runs, _SMALL_BUDGETS)
        _paired_table(results, title, runs, _REPEATER, _SMALL_BUDGETS)


def _goals(results: Results, table: str, runs: Runs) -> None:
    for peer in (_REPEATER, _FORGIVING):
        for i, part in enumerate(_BUDGETS[:-1]):
            mean, *_ = _compared(runs[_GAIN], runs[peer], i)
            results.at_most(
                f"{table}: gain's held-out loss less that of {peer} at {part:.0%}", 0.0, mean
            )
    end, *_ = _compared(runs[_GAIN], runs[_FULL], -1)
    results.at_most(f"{table}: gain's held-out loss at its end less the full blend's", 0.001, end)


def _record(folder: Path) -> None:
    from sides.race_packer import pack
    from sides.race_recorder import record

    for name, path in TABLES.items():
        record(folder / name, name)
        race_table.save(pack(folder / name), path)
        print(f"Written: {path} ({path.stat().st_size:,} bytes)")


def main() -> None:
    given = options(__doc__, record="train all fold trials anew, in this folder; then replay them")
    if given.record is not None:
        _record(given.record)
    results = Results("fold_race")
    orders = 2 if given.quick else 20
    names = (_FULL, _FORGIVING, _GAIN, _REPEATER) if given.quick else tuple(_BY_NAME)
    for table in TABLES:
        if not TABLES[table].exists():
            continue
        runs = _replayed([Job(name, order, table) for order in range(orders) for name in names])
        _losses_table(results, table, runs, _BUDGETS)
        for peer in (_REPEATER, _FORGIVING, _FULL):
            _paired_table(results, table, runs, peer, _BUDGETS)
        _by_seconds(results, table, runs)
        _goals(results, table, runs)
        if not given.quick:
            _told(results, table, orders)
            _small(results, table, 2 * orders)
    results.publish(given)


if __name__ == "__main__":
    main()
