"""Checks of the hyperparameters that trials of one backbone may have, each by itself.

Takes a backbone and its settings, of the search space or of one point given by hand, gives every
problem at the key of the config that it comes from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from foldrace.config.ranges import Float, Int
from foldrace.config.schema import ResourcesConfig
from foldrace.core.errors import Problem, UserError
from foldrace.core.plugins import NO_PARTS, Parts
from foldrace.scheduling.nodes import Node
from foldrace.search_spaces.space import Setting
from foldrace.trainables.models.backbones import build_encoder
from foldrace.trainables.models.classifier import (
    check_gradient_checkpointing,
    check_image_size,
    refusal,
)
from foldrace.trainables.schedules import training_size

Settings = Mapping[str, Setting]
"""Hyperparameter -> its setting for one backbone."""

_MANY_EPOCHS = 1000


@dataclass(frozen=True)
class Devices:
    """What trials run on."""

    nodes: Sequence[Node]
    resources: ResourcesConfig

    @property
    def has_gpu(self) -> bool:
        """True where a trial may have a GPU."""
        return self.resources.gpus_per_trial != 0 and any(node.gpus for node in self.nodes)


def image_sizes(settings: Settings) -> list[int]:
    """Image sides that may be drawn (px)."""
    return [int(size) for size in settings["image_size"].values]


def growing_sizes(settings: Settings) -> set[int]:
    """Sides of the training images of all epochs, for the values that may be drawn (px)."""
    starts = [float(value) for value in settings["size_start"].values]
    epochs = int(max(float(value) for value in settings["epochs"].values))
    return {
        training_size(epoch, epochs, size, start)
        for size in image_sizes(settings)
        for start in starts
        for epoch in range(epochs)
    }


def setting_problems(
    backbone: str, settings: Settings, devices: Devices, parts: Parts = NO_PARTS
) -> Iterator[Problem]:
    """Problems of a backbone that exists with what it may draw; its weights: `weights_problems`."""
    yield from _size_range_problems(settings)
    refused = refused_sizes(backbone, settings, parts)
    yield from refused
    if not refused:
        yield from _growing_size_problems(backbone, settings, parts)
        yield from _checkpointing_problems(backbone, settings, parts)
    yield from _precision_problems(settings, devices)
    yield from _batch_problems(settings, devices)


def refused_sizes(backbone: str, settings: Settings, parts: Parts = NO_PARTS) -> list[Problem]:
    """Problems of image sizes that the backbone does not take."""
    found = (check_image_size(backbone, size, parts) for size in image_sizes(settings))
    return [problem for problem in found if problem is not None]


def _size_range_problems(settings: Settings) -> Iterator[Problem]:
    """Problems of image sizes given as a range.

    It would draw sizes that backbones refuse, and decode all images for each.
    """
    size = settings["image_size"]
    if isinstance(size.range, (Int, Float)):
        message = "is searched by {choices: [192, 224]}, since a range draws sizes such as 193"
        yield Problem(size.key, f"{message}, which many backbones refuse")


def _growing_size_problems(backbone: str, settings: Settings, parts: Parts) -> Iterator[Problem]:
    """Problems of a model that takes one size alone, but smaller images in its first epochs."""
    start = min(float(value) for value in settings["size_start"].values)
    size = min(image_sizes(settings))
    least = training_size(0, _MANY_EPOCHS, size, start)
    message = None if least == size else refusal(backbone, size, least, parts)
    if message is not None:
        yield Problem(
            settings["size_start"].key,
            f"{backbone} takes images of {size} px alone, and with {start:g} the first epoch has "
            f"{least} px ({message}); set size_start 1 for it (search.per_backbone)",
        )


def _checkpointing_problems(backbone: str, settings: Settings, parts: Parts) -> Iterator[Problem]:
    setting = settings["gradient_checkpointing"]
    asked = True in setting.values
    problem = check_gradient_checkpointing(backbone, parts) if asked else None
    if problem is not None:
        yield Problem(setting.key, problem.message)


def weights_problems(
    backbone: str, settings: Settings, parts: Parts = NO_PARTS
) -> Iterator[Problem]:
    """Fetch (and so keep for the trials) or open the pretrained weights once."""
    key = settings["pretrained"].key
    for pretrained in settings["pretrained"].values:
        if isinstance(pretrained, str) or pretrained is True:
            try:
                build_encoder(backbone, image_sizes(settings)[0], pretrained, 0.0, parts)
            except UserError as error:
                for problem in error.problems:
                    where = problem.where.replace("training.pretrained", key, 1)
                    yield Problem(where, problem.message)


def _precision_problems(settings: Settings, devices: Devices) -> Iterator[Problem]:
    setting = settings["precision"]
    if "fp16" in setting.values and not devices.has_gpu:
        message = "got 'fp16', which needs a GPU; allowed here: auto, fp32, bf16"
        yield Problem(setting.key, message)


def _batch_problems(settings: Settings, devices: Devices) -> Iterator[Problem]:
    """Problems of batches with fewer than two images a device, which batch statistics need."""
    count, setting = devices.resources.devices_per_trial, settings["batch_size"]
    least = min(int(value) for value in setting.values)
    if count > 1 and least < 2 * count:
        yield Problem(
            setting.key,
            f"may be {least}, too few for resources.devices_per_trial {count}; allowed: at "
            f"least {2 * count}, two images a device",
        )
