"""Checks of a config that need no data: names, backbones, sizes, combinations, devices.

Takes a config with its search space and the cluster's nodes, gives every problem.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial

from foldrace.checks.combinations import check_combinations
from foldrace.checks.ensemble import ensemble_problems
from foldrace.checks.search import NAME_KNOBS, check_part, search_problems
from foldrace.checks.transforms import check_transforms
from foldrace.config.schema import SweepConfig
from foldrace.core.errors import Problem, UserError
from foldrace.core.plugins import NO_PARTS, Parts
from foldrace.scheduling.budget import budget_problems
from foldrace.scheduling.nodes import Node, resource_problems
from foldrace.search_spaces.ranges import Float, Int
from foldrace.search_spaces.space import SearchSpace
from foldrace.trainables.data.meta_features import check_meta
from foldrace.trainables.models.backbones import build_encoder, check_backbone
from foldrace.trainables.models.classifier import (
    check_gradient_checkpointing,
    check_image_size,
    drops_paths,
    refusal,
)
from foldrace.trainables.schedules import training_size

_MANY_EPOCHS = 1000
_OTHER_KEYS = {"loss": "training.loss", "policy": "augment.policy"}


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
        *_backbone_problems(config, space, parts),
        *_name_problems(config, space, parts),
        *search_problems(config, space, parts),
        *budget_problems(config),
        *ensemble_problems(config, space, earlier, parts),
        *check_combinations(
            space.settings, config.training, partial(drops_paths, parts=parts), parts
        ),
        *_transform_problems(config, space, parts),
        *_precision_problems(config, nodes),
        *resource_problems(nodes, config.resources),
        *_batch_problems(config, space),
    ]


def _backbone_problems(config: SweepConfig, space: SearchSpace, parts: Parts) -> list[Problem]:
    """Problems of unknown backbones, refused image sizes, and weights that cannot be had."""
    problems = list(_size_range_problems(config, space))
    for backbone in dict.fromkeys(config.search.backbones):
        problem = check_backbone(backbone, parts)
        if problem is not None:
            problems.append(problem)
            continue
        sizes = image_sizes(space, backbone)
        found = (check_image_size(backbone, size, parts) for size in sizes)
        refused = [problem for problem in found if problem is not None]
        problems += refused or _growing_size_problems(space, backbone, parts)
        if config.training.gradient_checkpointing and not refused:
            problem = check_gradient_checkpointing(backbone, parts)
            problems += [] if problem is None else [problem]
        if config.training.pretrained is not False and not refused:
            problems += _weights_problems(backbone, sizes[0], config.training.pretrained, parts)
    repeated = {b for b in config.search.backbones if config.search.backbones.count(b) > 1}
    problems += [Problem("search.backbones", f"{b} is given twice") for b in sorted(repeated)]
    return problems


def _size_range_problems(config: SweepConfig, space: SearchSpace) -> Iterator[Problem]:
    """Problems of image sizes given as a range.

    It would draw sizes that backbones refuse, and decode all images for each.
    """
    wheres = {
        _key_of(config, backbone, "image_size"): None
        for backbone, settings in space.settings.items()
        if isinstance(settings["image_size"].range, (Int, Float))
    }
    for where in wheres:
        message = "is searched by {choices: [192, 224]}, since a range draws sizes such as 193"
        yield Problem(where, f"{message}, which many backbones refuse")


def image_sizes(space: SearchSpace, backbone: str) -> list[int]:
    """Image sides that the backbone may be given (px)."""
    return [int(size) for size in space.settings[backbone]["image_size"].values]


def _growing_size_problems(space: SearchSpace, backbone: str, parts: Parts) -> list[Problem]:
    """Problems of a model that takes one size alone, but smaller images in its first epochs."""
    start = min(float(value) for value in space.settings[backbone]["size_start"].values)
    size = min(image_sizes(space, backbone))
    least = training_size(0, _MANY_EPOCHS, size, start)
    message = None if least == size else refusal(backbone, size, least, parts)
    if message is None:
        return []
    return [
        Problem(
            "search.space.size_start",
            f"{backbone} takes images of {size} px alone, and with {start:g} the first epoch has "
            f"{least} px ({message}); set size_start 1 for it (search.per_backbone)",
        )
    ]


def _weights_problems(
    backbone: str, image_size: int, pretrained: bool | str, parts: Parts
) -> Iterable[Problem]:
    """Fetch (and so keep for the trials) or open the pretrained weights once."""
    try:
        build_encoder(backbone, image_size, pretrained, 0.0, parts)
    except UserError as error:
        return error.problems
    return ()


def _name_problems(config: SweepConfig, space: SearchSpace, parts: Parts) -> Iterator[Problem]:
    """Problems of names that are looked up in tables, each once."""
    yield from check_meta(config.training.meta_features, parts)
    given = {
        (_key_of(config, backbone, knob), knob, str(value)): None
        for backbone, settings in space.settings.items()
        for knob in NAME_KNOBS
        for value in settings[knob].values
    }
    for where, knob, name in given:
        problem = check_part(knob, where, name, parts)
        if problem is not None:
            yield problem


def _key_of(config: SweepConfig, backbone: str, knob: str) -> str:
    """Key of the config that a backbone's hyperparameter comes from."""
    if knob in config.search.per_backbone.get(backbone, {}):
        return f"search.per_backbone.{backbone}.{knob}"
    if knob in config.search.space:
        return f"search.space.{knob}"
    return _OTHER_KEYS.get(knob, f"search.space.{knob}")


def _transform_problems(config: SweepConfig, space: SearchSpace, parts: Parts) -> list[Problem]:
    """Problems of the transforms at the sizes of scoring, and of training where images grow."""
    transforms = config.augment.transforms
    sizes = {size for b in space.backbones for size in image_sizes(space, b)}
    problems = check_transforms(transforms, sizes or {config.training.image_size}, parts)
    if problems:
        return problems
    smaller = {size for b in space.backbones for size in _growing_sizes(space, b)} - sizes
    return [
        Problem(p.where, f"{p.message} (a size of search.space.size_start)")
        for p in check_transforms(transforms, smaller, parts)
    ]


def _growing_sizes(space: SearchSpace, backbone: str) -> set[int]:
    """Sides of the training images of all epochs, for the values that may be drawn (px)."""
    settings = space.settings[backbone]
    starts = [float(value) for value in settings["size_start"].values]
    epochs = int(max(float(value) for value in settings["epochs"].values))
    return {
        training_size(epoch, epochs, size, start)
        for size in image_sizes(space, backbone)
        for start in starts
        for epoch in range(epochs)
    }


def _precision_problems(config: SweepConfig, nodes: list[Node]) -> Iterable[Problem]:
    no_gpu = not any(node.gpus for node in nodes) or config.resources.gpus_per_trial == 0
    if config.training.precision == "fp16" and no_gpu:
        where = "training.precision"
        return [Problem(where, "got 'fp16', which needs a GPU; allowed here: auto, fp32, bf16")]
    return []


def _batch_problems(config: SweepConfig, space: SearchSpace) -> Iterable[Problem]:
    """Problems of batches with fewer than two images a device, which batch statistics need."""
    devices = config.resources.devices_per_trial
    least = min(int(v) for b in space.backbones for v in space.settings[b]["batch_size"].values)
    if devices > 1 and least < 2 * devices:
        yield Problem(
            "search.space.batch_size",
            f"may be {least}, too few for resources.devices_per_trial {devices}; allowed: at "
            f"least {2 * devices}, two images a device",
        )
