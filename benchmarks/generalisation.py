"""What each blend method loses on rows that had no say in it: where the defaults come from.

Repeatedly a stratified draw of 30 % of the rows is set aside; on 200, 1,000 or all of the others
the members' temperatures are fitted, the blend is chosen and its temperature is fitted, and the
rows set aside score it (mean log loss, nats). The same draws serve every method.

digits       156 scikit-learn classifiers, 1,797 rows, 10 classes (`oof_data.py`)
photos       the fold trials of a real image set; `--data` names a run folder, or the folder with
             sign_digits' train.zip, on which the trials are then trained (left out without it)

Columns: the loss without temperatures, with those of the members, with that of the blend, with
both, and with those that the cross-fitted loss on the selection rows kept, as in a run (`kept`,
`keeps`: members/blend, the share of the draws). `from_greedy` is the mean over draws of the
difference to greedy, both as kept, `se` its standard error over draws; as draws share rows, it is
too small rather than too large. `calibration of greedy` gives the same for its temperatures against
none. `auto` is what the cross-fitted loss chooses among greedy, geometric and stacking; `members`
is the mean number that a blend uses. `soup` is left out (it needs weights), and so is `snapshot`
where no member is a snapshot.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import oof_data
from harness import Results, machine, options
from numpy.typing import NDArray
from oof_data import OofData
from sklearn.model_selection import train_test_split

from foldrace.core.metrics import log_loss_of_true, normalise
from foldrace.core.temperature import at_temperature, fit_temperature
from foldrace.ensemble.calibration import choose_calibration, methods_to_try
from foldrace.ensemble.methods import AUTO, METHODS, fit_method
from foldrace.ensemble.pool import MemberRows, Pool, member_rows
from foldrace.ensemble.pooling import Fit, Settings, blend_prob, mixture_fit
from foldrace.ensemble.solvers.greedy import greedy

_HELD = 0.3
_GREEDY = "greedy"
_NONE, _MEMBERS, _BLEND, _BOTH, _KEPT = "none", "member", "blend", "both", "kept"
_COLUMNS = (_NONE, _MEMBERS, _BLEND, _BOTH, _KEPT)
_TEMPERATURES = {
    (False, False): _NONE,
    (True, False): _MEMBERS,
    (False, True): _BLEND,
    (True, True): _BOTH,
}
Finder = Callable[[Pool], Fit]


def _methods(data: OofData) -> dict[str, Finder]:
    """Those of the table that the members allow, and greedy with other settings."""
    has_snapshots = any(member.variant.startswith("snap") for member in data.members)
    left_out = {"soup"} if has_snapshots else {"soup", "snapshot"}
    table: dict[str, Finder] = {
        name: partial(fit_method, name, settings=Settings())
        for name in METHODS
        if name not in left_out
    }
    rounds: dict[str, Finder] = {
        f"greedy, {count} rounds": partial(_greedy, max_rounds=count) for count in (10, 25, 100)
    }
    members: dict[str, Finder] = {
        f"greedy, {count} members": partial(_greedy, max_members=count) for count in (3, 5, 10)
    }
    return table | rounds | {"greedy, 20 bags": partial(_greedy, bags=20)} | members | {
        "best single": partial(_greedy, max_rounds=1)
    }  # fmt: skip


def _greedy(pool: Pool, max_rounds: int = 50, max_members: int | None = None, bags: int = 0) -> Fit:
    return mixture_fit(greedy(pool.true_prob, max_rounds, max_members, bags))


@dataclass(frozen=True)
class Job:
    """One draw and one number of selection rows."""

    path: Path
    draw: int
    size: int


@dataclass(frozen=True)
class Scored:
    """A method on a job."""

    losses: dict[str, float]
    """Held-out log loss under each of none, member, blend, both, kept."""
    kept: str
    crossfit: float
    """With those kept, on the selection rows."""
    members: int
    seconds: float
    """Of one fit on the selection rows."""


_load = cache(oof_data.load)


def _score(job: Job) -> dict[str, Scored]:
    """Each method; in a worker process."""
    data = _load(job.path)
    chosen, held = _draw(data.labels, job)
    rows = _member_rows(data.rows(chosen))
    scored = {calibrated: _held(data.rows(held), rows, calibrated) for calibrated in (False, True)}
    found = {name: _one(rows, scored, find) for name, find in _methods(data).items()}
    return found | {
        AUTO: min((found[name] for name in methods_to_try(AUTO)), key=lambda s: s.crossfit)
    }


def _draw(labels: NDArray[np.int64], job: Job) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The rows to select on, and those to score on; stratified."""
    chosen, held = train_test_split(
        np.arange(len(labels)), test_size=_HELD, stratify=labels, random_state=job.draw
    )
    if job.size < len(chosen):
        chosen, _ = train_test_split(
            chosen, train_size=job.size, stratify=labels[chosen], random_state=job.draw
        )
    return chosen, held


def _member_rows(data: OofData) -> MemberRows:
    return member_rows(list(data.log_prob), data.labels, data.folds, data.members)


def _held(data: OofData, rows: MemberRows, calibrated: bool) -> Pool:
    """The rows set aside, at the temperatures of the selection rows."""
    temperatures = rows.temperatures[0] if calibrated else np.ones(len(data.members))
    log_prob = [
        at_temperature(own, float(temperature))
        for own, temperature in zip(data.log_prob, temperatures, strict=True)
    ]
    true_prob = np.exp([own[np.arange(len(data.labels)), data.labels] for own in log_prob])
    return Pool(data.members, true_prob, data.labels, rows.n_classes, log_prob.__getitem__)


def _one(rows: MemberRows, held: dict[bool, Pool], find: Finder) -> Scored:
    losses: dict[str, float] = {}
    seconds = 0.0
    for calibrated, scored in held.items():
        pool = rows.pool(calibrated)
        mark = time.perf_counter()
        fit = find(pool)
        seconds = time.perf_counter() - mark
        own, other = (np.log(normalise(blend_prob(fit, side))) for side in (pool, scored))
        temperature = fit_temperature(own, pool.labels)
        losses[_TEMPERATURES[calibrated, False]] = _loss(other, scored.labels)
        tempered = at_temperature(other, temperature)
        losses[_TEMPERATURES[calibrated, True]] = _loss(tempered, scored.labels)
    choice = choose_calibration(rows, find)
    kept = _TEMPERATURES[choice.members, choice.blend]
    used = len(find(rows.pool(choice.members)).used)
    return Scored(losses | {_KEPT: losses[kept]}, kept, choice.crossfit.loss, used, seconds)


def _loss(log_prob: NDArray[np.floating], labels: NDArray[np.int64]) -> float:
    return log_loss_of_true(np.exp(log_prob[np.arange(len(labels)), labels], dtype=np.float64))


Draws = Sequence[dict[str, Scored]]


def _by_method(results: Results, part: str, draws: Draws) -> None:
    base = _column(draws, _GREEDY, _KEPT)
    for name in draws[0]:
        keeps = [draw[name].kept for draw in draws]
        most = max(_TEMPERATURES.values(), key=keeps.count)
        change = _column(draws, name, _KEPT) - base
        results.add(
            part,
            method=name,
            **{key: float(_column(draws, name, key).mean()) for key in _COLUMNS},
            keeps=f"{most} {keeps.count(most)}/{len(keeps)}",
            from_greedy=float(change.mean()),
            se=_standard_error(change),
            members=float(np.mean([draw[name].members for draw in draws])),
            seconds=float(np.median([draw[name].seconds for draw in draws])),
        )


def _by_temperatures(results: Results, part: str, draws: Draws) -> None:
    """Of greedy; and the goal that what is kept costs nothing."""
    none = _column(draws, _GREEDY, _NONE)
    for key in _COLUMNS[1:]:
        change = _column(draws, _GREEDY, key) - none
        se = _standard_error(change)
        results.add(
            "calibration of greedy", data=part, kind=key, from_none=float(change.mean()), se=se
        )
    kept = float((_column(draws, _GREEDY, _KEPT) - none).mean())
    results.at_most(f"{part}: greedy, temperatures kept - none", 0.0, kept)


def _column(draws: Draws, method: str, key: str) -> NDArray[np.float64]:
    """(draws,)"""
    return np.array([draw[method].losses[key] for draw in draws])


def _standard_error(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _sizes(data: OofData, quick: bool) -> list[int]:
    """Numbers of selection rows, all of them last."""
    most = len(data.labels) - math.ceil(_HELD * len(data.labels))
    return [size for size in ((200,) if quick else (200, 1_000)) if size < most] + [most]


def main() -> None:
    given = options(
        __doc__, data="a run folder, or the folder with sign_digits' train.zip (trains on it)"
    )
    results = Results("generalisation")
    sources = [oof_data.digits(given.quick)]
    if given.data is not None:
        sources.append(oof_data.real_image_set(given.data))
    os.environ["OMP_NUM_THREADS"] = "1"  # a worker process a core
    context = multiprocessing.get_context("spawn")
    scored: dict[str, Draws] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(machine().cores, context) as pool,
    ):
        for i, data in enumerate(sources):
            path = Path(folder) / f"{i}.npz"
            oof_data.save(data, path)
            for size in _sizes(data, given.quick):
                jobs = [Job(path, draw, size) for draw in range(3 if given.quick else 20)]
                part = f"{data.name}, {size:,} selection rows, {len(jobs)} draws"
                scored[part] = list(pool.map(_score, jobs))
    for part, draws in scored.items():
        _by_method(results, part, draws)
    for part, draws in scored.items():
        _by_temperatures(results, part, draws)
    results.publish(given)


if __name__ == "__main__":
    main()
