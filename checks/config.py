"""Checks of a config that need no data: names, backbones, sizes, combinations, devices.

Takes a config with its search space and the cluster's nodes, gives every problem.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from foldrace.checks.combinations import check_combinations
from foldrace.checks.ensemble import ensemble_problems
from foldrace.checks.search import NAME_KNOBS, check_part, search_problems
from foldrace.checks.settings import (
    Devices,
    growing_sizes,
    image_sizes,
    refused_sizes,
    setting_problems,
    weights_problems,
)
from foldrace.checks.transforms import check_transforms
from foldrace.config.schema import SweepConfig
from foldrace.core.errors import Problem
from foldrace.core.plugins import NO_PARTS, Parts
from foldrace.scheduling.budget import budget_problems
from foldrace.scheduling.nodes import Node, resource_problems
from foldrace.scheduling.notify import notify_problems
from foldrace.search_spaces.space import SearchSpace
from foldrace.trainables.data.augment import POLICIES
from foldrace.trainables.data.meta_features import check_meta
from foldrace.trainables.models.backbones import check_backbone
from foldrace.trainables.models.classifier import drops_paths


def config_problems(
    config: SweepConfig,
    space: SearchSpace,
    nodes: list[Node],
    earlier: Mapping[str, str] | None = None,
    parts: Parts = NO_PARTS,
) -> list[Problem]:
    """Problems of a config on these nodes, whatever the data are.

    `earlier`: candidates of a run that goes on -> their backbones.
    """
    return [
        *_teacher_problems(config, is_new=earlier is None),
        *_backbone_problems(config, space, Devices(nodes, config.resources), parts),
        *_name_problems(config, space, parts),
        *search_problems(config, space, nodes, parts),
        *budget_problems(config),
        *ensemble_problems(config, space, earlier, parts),
        *check_combinations(
            space.settings,
            partial(drops_paths, parts=parts),
            parts,
            config.search.teacher is not None,
        ),
        *_transform_problems(config, space, parts),
        *resource_problems(nodes, config.resources),
        *notify_problems(config.notify),
    ]


def _teacher_problems(config: SweepConfig, is_new: bool) -> Iterator[Problem]:
    if is_new and config.search.teacher is not None:
        message = "a new run has no teacher yet: leave it out; `foldrace distill DIR` makes one"
        yield Problem("search.teacher", message)


def _backbone_problems(
    config: SweepConfig, space: SearchSpace, devices: Devices, parts: Parts
) -> list[Problem]:
    """Problems of unknown backbones, of what they may draw, and weights that cannot be had."""
    problems: list[Problem] = []
    for backbone in dict.fromkeys(config.search.backbones):
        problem = check_backbone(backbone, parts)
        if problem is not None:
            problems.append(problem)
            continue
        settings = space.settings[backbone]
        problems += setting_problems(backbone, settings, devices, parts)
        if not refused_sizes(backbone, settings, parts):
            problems += weights_problems(backbone, settings, parts)
    repeated = {b for b in config.search.backbones if config.search.backbones.count(b) > 1}
    problems += [Problem("search.backbones", f"{b} is given twice") for b in sorted(repeated)]
    return list(dict.fromkeys(problems))  # that several backbones share


def _name_problems(config: SweepConfig, space: SearchSpace, parts: Parts) -> Iterator[Problem]:
    """Problems of names that are looked up in tables, each once."""
    yield from check_meta(config.training.meta_features, parts)
    given = {
        (settings[knob].key, knob, str(value)): None
        for settings in space.settings.values()
        for knob in NAME_KNOBS
        for value in settings[knob].values
    }
    for where, knob, name in given:
        problem = check_part(knob, where, name, parts)
        if problem is not None:
            yield problem


def _transform_problems(config: SweepConfig, space: SearchSpace, parts: Parts) -> list[Problem]:
    """Problems of the transforms at the sizes of scoring, and of training where images grow."""
    transforms = config.augment.transforms
    every = space.settings.values()
    sizes = {size for settings in every for size in image_sizes(settings)}
    problems = check_transforms(transforms, sizes, parts)
    used = {str(name) for settings in every for name in settings["policy"].values}
    for name in sorted(used & parts[POLICIES].keys() - POLICIES.keys()):  # a plugin's
        for problem in check_transforms(parts[POLICIES][name].transforms, sizes, parts):
            where = problem.where.replace("augment.transforms", f"policy {name}: transforms", 1)
            problems.append(Problem(where, problem.message))
    if problems:
        return problems
    smaller = {size for settings in every for size in growing_sizes(settings)} - sizes
    return [
        Problem(p.where, f"{p.message} (a size of search.space.size_start)")
        for p in check_transforms(transforms, smaller, parts)
    ]
