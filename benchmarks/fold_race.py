"""What stopping folds and epochs costs the blend, and what it saves: every policy over the same
recorded fold trials.

75 candidates of 4 small backbones, with hyperparameters drawn at random, were trained once on all 5
folds of handwritten digits that had been made hard (`sides/race_recorder.py`; 40 minutes on two
cores); `data/fold_race.npz` keeps what came of it, and `--record DIR` makes it anew. A replay goes
through the product's own searcher, race, ledger, study and FoldASHA, with four slots on a simulated
clock; only the training is looked up. Each of 20 random orders of the candidates serves all:

none          every fold of every candidate
forgiving     a candidate's mean loss must stay below the worst fold of the best complete one
gain, z       it must add to the blend, z standard errors allowed; FoldASHA: in mid-training, too
mixing ASHA   Ray's ASHAScheduler over the fold trials of all folds alike, at FoldASHA's rungs; a
              candidate with a stopped fold cannot be complete
Repeater      Ray's ray.tune.search.Repeater over the same list

At a budget of epochs, which no policy knows beforehand, the candidates that were complete by then
are blended, raw and EMA weights at temperatures of their own, by greedy-50. `test` is the loss of
that blend on 497 images that no trial and no choice has seen, `oof` that on the 1,300 rows it was
chosen on; `se` is the standard error over orders. A policy that has ended by itself keeps its blend
at larger budgets. Before anything is complete the prediction is 1/C.

`told its budget`: runs of their own, each with so many fold trials (`search.fold_trials`; the
Repeater: as many candidates as they allow), so that nothing is begun that cannot be complete; a
trial that FoldASHA stops counts as one.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean

import numpy as np
import race_table
from harness import Results, machine, options
from numpy.typing import NDArray
from race_table import PACKED, RaceTable
from sides.race_replay import Player, Replay, play

from foldrace.config.schema import RaceConfig
from foldrace.ensemble.solvers.greedy import greedy

_BUDGETS = (0.1, 0.2, 1 / 3, 0.4, 1.0)  # of the epochs of all folds of all candidates
_SLOTS = 4
_FULL, _FORGIVING, _REPEATER = "none", "forgiving", "Repeater"
_MIXING = "mixing ASHA"


@dataclass(frozen=True)
class Policy:
    """`race` None: the Repeater."""

    name: str
    race: RaceConfig | None = None
    mixing_asha: bool = False
    fold_trials: int | None = None
    """Its budget, where it is told one."""


def _gain(z: float, asha: bool, name: str = "", **more: float) -> Policy:
    name = name or f"gain, z = {z:g}" + (", FoldASHA" if asha else "")
    return Policy(name, RaceConfig.model_validate({"z": z, "epoch_stopping": asha, **more}))


POLICIES = (
    Policy(_FULL, RaceConfig(rule="none")),
    Policy(_FORGIVING, RaceConfig(rule="forgiving")),
    *(_gain(z, False) for z in (0.0, 1.0, 2.0)),
    *(_gain(z, True) for z in (0.0, 1.0, 2.0)),
    Policy(_MIXING, RaceConfig(rule="none"), mixing_asha=True),
    Policy(_REPEATER),
)
_LIKELY = (_FULL, _FORGIVING, "gain, z = 0", "gain, z = 1", "gain, z = 1, FoldASHA", _REPEATER)
GAINS = tuple(p.name for p in POLICIES if p.name.startswith("gain"))
SETTINGS = (
    *(_gain(1.0, False, f"min_complete {n}", min_complete=n) for n in (3, 5, 8)),
    *(
        _gain(1.0, True, f"min_complete 5, grace {g:g}, reduction {r}", grace=g, reduction=r)
        for g, r in ((0.125, 2), (0.125, 3), (0.25, 2), (0.25, 3), (0.5, 2))
    ),
)


@dataclass(frozen=True)
class Job:
    """One replay."""

    policy: Policy
    order: int
    """Seed of the random order."""
    path: Path
    candidates: int


@dataclass(frozen=True)
class Scored:
    """A replay, with the blend at each budget."""

    replay: Replay
    spent: tuple[int, ...]
    complete: tuple[int, ...]
    oof: tuple[float, ...]
    test: tuple[float, ...]


@cache
def _table(path: Path, candidates: int) -> RaceTable:
    return race_table.load(path).first(candidates)


def _score(job: Job) -> Scored:
    """In a worker process."""
    table = _table(job.path, job.candidates)
    with tempfile.TemporaryDirectory(dir=_fast_folder()) as folder:
        replay = play(table, _player(table, job, Path(folder)), _SLOTS)
    budgets = [part * table.epochs for part in _BUDGETS]
    complete = [replay.complete_at(budget) for budget in budgets]
    losses = [_losses(table, names) for names in complete]
    return Scored(
        replay,
        spent=tuple(min(replay.epochs, round(budget)) for budget in budgets),
        complete=tuple(len(names) for names in complete),
        oof=tuple(oof for oof, _ in losses),
        test=tuple(test for _, test in losses),
    )


def _player(table: RaceTable, job: Job, folder: Path) -> Player:
    from sides.race_players import Foldrace, RepeaterOverList, sweep_config

    rng = np.random.default_rng(job.order)
    order = [table.candidates[i].candidate for i in rng.permutation(len(table.candidates))]
    told = job.policy.fold_trials
    if job.policy.race is None:
        return RepeaterOverList(table, order[: None if told is None else told // table.fold_count])
    config = sweep_config(table, order, job.policy.race, told)
    return Foldrace(table, config, folder, _SLOTS, job.policy.mixing_asha)


def _fast_folder() -> str | None:
    """Run folders in memory, where there is such a place."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _losses(table: RaceTable, names: frozenset[str]) -> tuple[float, float]:
    """OOF and held-out loss of the blend of these candidates."""
    if not names:
        return math.log(len(table.classes)), math.log(len(table.classes))
    places = sorted(table.index[name] for name in names)
    oof, test = (
        kept[:, places].reshape(-1, kept.shape[-1]) for kept in (table.oof_true, table.test_true)
    )
    blend = greedy(oof)
    return blend.loss, float(-np.log(blend.weights @ test).mean())


Runs = Mapping[str, Sequence[Scored]]
Replayed = Callable[[Sequence[Policy]], Runs]


def _replayed(policies: Sequence[Policy], orders: int, path: Path, candidates: int) -> Runs:
    jobs = [Job(p, order, path, candidates) for order in range(orders) for p in policies]
    os.environ["OMP_NUM_THREADS"] = "1"  # a worker process a core
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(machine().cores, context) as pool:
        scored = list(pool.map(_score, jobs))
    return {
        p.name: [s for j, s in zip(jobs, scored, strict=True) if j.policy is p] for p in policies
    }


def _tests(runs: Sequence[Scored], budget: int) -> NDArray[np.float64]:
    """(orders,) held-out losses."""
    return np.array([run.test[budget] for run in runs])


def _standard_error(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _by_budget(results: Results, runs: Runs, epochs: int) -> None:
    orders = len(next(iter(runs.values())))
    for i, part in enumerate(_BUDGETS):
        title = f"{part:.0%} of {epochs:,} epochs, {orders} orders"
        for name, of_one in runs.items():
            oof, test = np.array([run.oof[i] for run in of_one]), _tests(of_one, i)
            results.add(
                title,
                policy=name,
                epochs=fmean(run.spent[i] for run in of_one),
                complete=fmean(run.complete[i] for run in of_one),
                oof=float(oof.mean()),
                oof_se=_standard_error(oof),
                test=float(test.mean()),
                test_se=_standard_error(test),
            )


def _own_ends(results: Results, runs: Runs, epochs: int, title: str) -> None:
    full = _tests(runs[_FULL], -1) if _FULL in runs else None
    for name, of_one in runs.items():
        test = _tests(of_one, -1)
        cells = {} if full is None else {"from_full": float((test - full).mean())}
        results.add(
            title,
            policy=name,
            fits=fmean(run.replay.fits for run in of_one),
            epochs=fmean(run.replay.epochs for run in of_one),
            part_of_epochs=fmean(run.replay.epochs for run in of_one) / epochs,
            simulated_s=fmean(run.replay.seconds for run in of_one),
            complete=fmean(run.complete[-1] for run in of_one),
            test=float(test.mean()),
            test_se=_standard_error(test),
            **cells,
        )


def _paired(results: Results, runs: Runs) -> None:
    """Each policy's held-out loss less that of a peer in the same order; below 0 is better."""
    for peer in (_FORGIVING, _REPEATER):
        for name in (_FULL, _FORGIVING, *GAINS, _MIXING):
            if name == peer or name not in runs:
                continue
            cells: dict[str, float] = {}
            for i, part in enumerate(_BUDGETS):
                change = _tests(runs[name], i) - _tests(runs[peer], i)
                cells[f"{part:.0%}"] = float(change.mean())
                cells[f"{part:.0%}_se"] = _standard_error(change)
            results.add(f"held-out loss less that of {peer}, same orders", policy=name, **cells)


def _told(results: Results, replayed: Replayed, fits: int) -> None:
    """Those that are likely to be used, at budgets of fold trials that they know."""
    limits = {part: round(part * fits) for part in _BUDGETS[:-1]}
    policies = [
        replace(policy, name=f"{policy.name}|{limit}", fold_trials=limit)
        for policy in POLICIES
        if policy.name in _LIKELY
        for limit in limits.values()
    ]
    runs = replayed(policies)
    orders = len(runs[policies[0].name])
    for name in _LIKELY:
        cells: dict[str, float] = {}
        for part, limit in limits.items():
            test = _tests(runs[f"{name}|{limit}"], -1)
            peer = _tests(runs[f"{_REPEATER}|{limit}"], -1)
            cells[f"{part:.0%}"] = float(test.mean())
            cells[f"{part:.0%}_from_repeater"] = float((test - peer).mean())
            cells[f"{part:.0%}_se"] = _standard_error(test - peer)
        results.add(
            f"told its budget, parts of {fits} fold trials, held-out loss, {orders} orders",
            policy=name,
            **cells,
        )


def _settings_table(results: Results, runs: Runs, epochs: int) -> None:
    title = "settings of gain, z = 1: at its own end, and held-out loss at budgets"
    for name, of_one in runs.items():
        results.add(
            title,
            setting=name,
            part_of_epochs=fmean(run.replay.epochs for run in of_one) / epochs,
            complete=fmean(run.complete[-1] for run in of_one),
            **{f"{part:.0%}": float(_tests(of_one, i).mean()) for i, part in enumerate(_BUDGETS)},
            se=_standard_error(_tests(of_one, -1)),
        )


def _goals(results: Results, runs: Runs) -> None:
    """Of the default race, and of the best of all gain policies, which looks at these figures."""
    default = RaceConfig()
    own = f"gain, z = {default.z:g}" + (", FoldASHA" if default.stops_epochs else "")
    third = _BUDGETS.index(1 / 3)
    best = min(GAINS, key=lambda name: _tests(runs[name], third).mean())
    for name in dict.fromkeys((own, best)):
        test, full = _tests(runs[name], third), _tests(runs[_FULL], -1)
        behind = float((test.mean() - full.mean()) / _standard_error(test))
        kind = "default" if name == own else "best of the gain policies"
        label = f"{name} ({kind})"
        results.at_most(
            f"{label}: held-out loss at 1/3 of the epochs less the full blend's, in SEs "
            "over orders",
            1.0,
            behind,
        )
        for peer in (_FORGIVING, _REPEATER):
            changes = [_tests(runs[name], i) - _tests(runs[peer], i) for i in range(len(_BUDGETS))]
            worst = max(float(change.mean()) for change in changes)
            results.at_most(
                f"{label}: held-out loss less that of {peer}, the worst of all budgets", 0.0, worst
            )


def _record(folder: Path) -> None:
    from sides.race_packer import pack
    from sides.race_recorder import record

    record(folder)
    race_table.save(pack(folder), PACKED)
    print(f"Written: {PACKED} ({PACKED.stat().st_size:,} bytes)")


def main() -> None:
    given = options(__doc__, record="train all fold trials anew, in this folder; then replay them")
    if given.record is not None:
        _record(given.record)
    results = Results("fold_race")
    orders, candidates = (2, 24) if given.quick else (20, len(race_table.load().candidates))
    epochs = _table(PACKED, candidates).epochs
    replayed = partial(_replayed, orders=orders, path=PACKED, candidates=candidates)
    runs = replayed(POLICIES)
    _by_budget(results, runs, epochs)
    _own_ends(results, runs, epochs, "where each policy ended by itself")
    _paired(results, runs)
    if not given.quick:
        _told(results, replayed, candidates * race_table.load().fold_count)
        _settings_table(results, replayed(SETTINGS), epochs)
    _goals(results, runs)
    results.publish(given)


if __name__ == "__main__":
    main()
