"""Checks of the config's `search` section: points given by hand, earlier runs, sampler, database.

Takes a config with its search space, gives every problem. `TABLES` says which table has the rows of
a hyperparameter that is a name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from foldrace.checks.combinations import check_combinations
from foldrace.checks.settings import Devices, refused_sizes, setting_problems, weights_problems
from foldrace.config.hyperparameters import KNOBS, TrialParams
from foldrace.config.ranges import Value
from foldrace.config.schema import PointConfig, SweepConfig
from foldrace.core.errors import Problem, check_name
from foldrace.core.plugins import NO_PARTS, Parts, Table
from foldrace.core.redaction import has_secret, without_secrets
from foldrace.scheduling.nodes import Node
from foldrace.scheduling.search.export_storage import database_problem
from foldrace.scheduling.search.warm_start import warm_start_problems
from foldrace.search_spaces.space import SearchSpace, Setting
from foldrace.trainables.data.augment import POLICIES
from foldrace.trainables.losses import CLASS_WEIGHTS, LOSSES
from foldrace.trainables.models.classifier import drops_paths
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
    config: SweepConfig,
    space: SearchSpace,
    nodes: Sequence[Node] = (),
    parts: Parts = NO_PARTS,
) -> Iterator[Problem]:
    """Problems of the section, in the order of its keys; `nodes` of the cluster."""
    search = config.search
    yield from _sampler_problems(config)
    yield from _point_problems(config, space, nodes, parts)
    yield from warm_start_problems(search.warm_start, space)
    message = None if search.storage is None else database_problem(search.storage)
    if message is not None:
        yield Problem("search.storage", message)


def search_warnings(config: SweepConfig) -> Iterator[Problem]:
    """Problems that forbid no run."""
    storage = config.search.storage
    if storage is not None and has_secret(storage):
        yield Problem(
            "search.storage",
            f"{without_secrets(storage)} has a password, or an option that may be one, and "
            "sweep.yaml in the run folder will have it too (only you can read that file); set "
            "storage: env:NAME and put the URL into the environment variable NAME, or leave the "
            "password out and put it into ~/.pgpass or PGPASSWORD",
        )


def _sampler_problems(config: SweepConfig) -> Iterator[Problem]:
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


def _point_problems(
    config: SweepConfig, space: SearchSpace, nodes: Sequence[Node], parts: Parts
) -> Iterator[Problem]:
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
        devices = Devices(nodes, config.resources)
        yield from _trial_problems(where, point, params, space, devices, parts)


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
    try:
        KNOBS[name].read(value)
    except ValueError as error:
        return Problem(where, str(error))
    return check_part(name, where, str(value), parts) if name in NAME_KNOBS else None


def _trial_problems(
    where: str,
    point: PointConfig,
    params: TrialParams,
    space: SearchSpace,
    devices: Devices,
    parts: Parts,
) -> Iterator[Problem]:
    """Problems of the configuration as a whole, but those that the space has without the point."""
    backbone, shared = point.backbone, space.settings[point.backbone]
    keys = {knob: setting.key for knob, setting in shared.items()}
    keys |= {knob: f"{where}.params.{knob}" for knob in point.params}
    settings = {k: Setting(k, value, None, keys[k]) for k, value in params.as_dict().items()}
    if "image_size" in point.params:
        for problem in refused_sizes(backbone, settings, parts):
            yield Problem(settings["image_size"].key, problem.message)
    if "pretrained" in point.params:
        yield from weights_problems(backbone, settings, parts)
    problems = setting_problems(backbone, settings, devices, parts)
    yield from (problem for problem in problems if problem.where.startswith(where))
    drops = partial(drops_paths, parts=parts)
    for problem in check_combinations({backbone: settings}, drops, parts, has_teacher=True):
        knob = problem.where.rpartition(".")[2]
        yield Problem(f"{where}.params.{knob}", problem.message)
