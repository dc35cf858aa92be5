"""Checks of the config's `search` section: points given by hand, earlier runs, sampler, database.

Takes a config with its search space, gives every problem. `TABLES` says which table has the rows of
a hyperparameter that is a name.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from foldrace.checks.combinations import check_combinations
from foldrace.config.schema import PointConfig, SweepConfig
from foldrace.core.errors import Problem, check_name, has_password, without_password
from foldrace.core.plugins import NO_PARTS, Parts, Table
from foldrace.scheduling.search.cma import LEAST_KNOBS
from foldrace.scheduling.search.export_storage import database_problem
from foldrace.scheduling.search.warm_start import warm_start_problems
from foldrace.search_spaces.hyperparameters import KNOBS, TrialParams
from foldrace.search_spaces.ranges import Choice, Value, shown
from foldrace.search_spaces.space import SearchSpace, Setting
from foldrace.trainables.data.augment import POLICIES
from foldrace.trainables.losses import CLASS_WEIGHTS, LOSSES
from foldrace.trainables.models.classifier import check_image_size, drops_paths
from foldrace.trainables.models.heads import HEADS
from foldrace.trainables.optimizers import check_optimizer
from foldrace.trainables.schedules import SCHEDULES

TABLES: dict[str, Table[Any]] = {
    "loss": LOSSES,
    "class_weights": CLASS_WEIGHTS,
    "schedule": SCHEDULES,
    "head": HEADS,
    "policy": POLICIES,
}
OPTIMIZER = "optimizer"  # most of whose names are two libraries', not a table's
NAME_KNOBS = (*TABLES, OPTIMIZER)


def check_part(knob: str, where: str, name: str, parts: Parts = NO_PARTS) -> Problem | None:
    """Problem of a name that the knob's table does not have; `where`: the config's key."""
    if knob == OPTIMIZER:
        return check_optimizer(where, name, parts)
    return check_name(where, name, parts[TABLES[knob]])


def search_problems(
    config: SweepConfig, space: SearchSpace, parts: Parts = NO_PARTS
) -> Iterator[Problem]:
    """Problems of the section, in the order of its keys."""
    search = config.search
    yield from _sampler_problems(config, space)
    yield from _point_problems(config, space, parts)
    yield from warm_start_problems(search.warm_start, space)
    message = None if search.storage is None else database_problem(search.storage)
    if message is not None:
        yield Problem("search.storage", message)


def search_warnings(config: SweepConfig) -> Iterator[Problem]:
    """Problems that forbid no run."""
    storage = config.search.storage
    if storage is not None and has_password(storage):
        yield Problem(
            "search.storage",
            f"{without_password(storage)} has a password, and sweep.yaml in the run folder will "
            "have it too; for PostgreSQL leave it out, and put it into ~/.pgpass or PGPASSWORD",
        )


def _sampler_problems(config: SweepConfig, space: SearchSpace) -> Iterator[Problem]:
    search = config.search
    if search.sampler == "list" and not search.points:
        yield Problem(
            "search.sampler",
            "list takes search.points alone, and there are none; give "
            "points: [{backbone: ..., params: {lr: 0.001}}], or another sampler",
        )
    if len(search.points) > search.candidates:
        yield Problem(
            "search.candidates",
            f"{search.candidates} is fewer than the {len(search.points)} search.points; raise it, "
            "or remove points",
        )
    if search.sampler == "cmaes":
        yield from (_cmaes_problem(backbone, space) for backbone in _too_narrow(space))


def _too_narrow(space: SearchSpace) -> Iterator[str]:
    """Backbones with too few numeric hyperparameters for CMA-ES."""
    for backbone in space.backbones:
        ranges = space.searched(backbone).values()
        numeric = [r for r in ranges if not isinstance(r, Choice) and r.low < r.high]
        if len(numeric) < LEAST_KNOBS:
            yield backbone


def _cmaes_problem(backbone: str, space: SearchSpace) -> Problem:
    names = ", ".join(space.searched(backbone)) or "none"
    return Problem(
        "search.sampler",
        f"cmaes needs at least {LEAST_KNOBS} hyperparameters with low and high; {backbone} "
        f"searches: {names}; choose tpe, or search more",
    )


def _point_problems(config: SweepConfig, space: SearchSpace, parts: Parts) -> Iterator[Problem]:
    whole: dict[tuple[str, TrialParams], int] = {}
    for i, point in enumerate(config.search.points):
        where = f"search.points[{i}]"
        problems = list(_own_problems(where, point, space, parts))
        yield from problems
        if problems:
            continue
        params = space.configured(point.backbone, point.params)
        first = whole.setdefault((point.backbone, params), i)
        if first < i:
            yield Problem(where, f"is the same configuration as search.points[{first}]; remove it")
            continue
        yield from _trial_problems(where, point.backbone, params, config, parts)


def _own_problems(
    where: str, point: PointConfig, space: SearchSpace, parts: Parts
) -> Iterator[Problem]:
    """Problems of the names and values, each by itself."""
    unknown = check_name(f"{where}.backbone", point.backbone, space.backbones)
    if unknown is not None:
        yield Problem(unknown.where, f"{unknown.message} (search.backbones)")
    for name, value in point.params.items():
        problem = _value_problem(f"{where}.params.{name}", name, value, parts)
        if problem is not None:
            yield problem


def _value_problem(where: str, name: str, value: Value, parts: Parts) -> Problem | None:
    if name not in KNOBS:
        unknown = check_name(where, name, KNOBS)
        assert unknown is not None
        return Problem(where, unknown.message.replace("got", "unknown hyperparameter", 1))
    knob = KNOBS[name]
    if not knob.limits.contains(value):
        return Problem(where, f"got {shown(value)}; allowed: {knob.limits} ({knob.doc})")
    return check_part(name, where, str(value), parts) if name in NAME_KNOBS else None


def _trial_problems(
    where: str, backbone: str, params: TrialParams, config: SweepConfig, parts: Parts
) -> Iterator[Problem]:
    """Problems of the configuration as a whole: refused sizes and combinations."""
    size = check_image_size(backbone, int(params.image_size), parts)
    if size is not None:
        yield Problem(f"{where}.params.image_size", size.message)
    devices = config.resources.devices_per_trial
    if devices > 1 and params.batch_size < 2 * devices:
        yield Problem(
            f"{where}.params.batch_size",
            f"{params.batch_size} is too few for resources.devices_per_trial {devices}; allowed: "
            f"at least {2 * devices}, two images a device",
        )
    values = params.as_dict().items()
    settings = {backbone: {knob: Setting(knob, value, None) for knob, value in values}}
    drops = partial(drops_paths, parts=parts)
    for problem in check_combinations(settings, config.training, drops, parts):
        knob = problem.where.rpartition(".")[2]
        yield Problem(f"{where}.params.{knob}", problem.message)
