"""The tables of training that a plugin may add rows to, one entry a table.

Takes a run folder or plugin files, gives their rows to the tables of this process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from foldrace.core.metrics import METRICS, Metric
from foldrace.core.plugin_files import PluginFile
from foldrace.core.plugins import Kind, load, require
from foldrace.trainables import plugin_trials as tried
from foldrace.trainables.data.augment import POLICIES, Policy
from foldrace.trainables.data.custom_transforms import CUSTOM, Custom
from foldrace.trainables.data.meta_features import META_FEATURES, MetaFeature
from foldrace.trainables.losses import CLASS_WEIGHTS, LOSSES, ClassWeights, Loss
from foldrace.trainables.models.backbones import FAMILIES, Family
from foldrace.trainables.models.heads import HEADS, Head
from foldrace.trainables.optimizers import OPTIMIZERS, Optimizer
from foldrace.trainables.schedules import SCHEDULES, ScheduleRow

KINDS: tuple[Kind[Any], ...] = (
    Kind(Family, "backbone family", FAMILIES, tried.family, key="prefix"),
    Kind(Head, "head", HEADS, tried.head),
    Kind(MetaFeature, "meta feature", META_FEATURES, tried.meta_feature),
    Kind(Loss, "loss", LOSSES, tried.loss),
    Kind(ClassWeights, "class weights", CLASS_WEIGHTS, tried.class_weights),
    Kind(Optimizer, "optimiser", OPTIMIZERS, tried.optimizer),
    Kind(ScheduleRow, "schedule", SCHEDULES, tried.schedule),
    Kind(Policy, "augmentation policy", POLICIES, tried.policy),
    Kind(Custom, "custom transform", CUSTOM, tried.custom),
    Kind(Metric, "metric", METRICS, tried.metric),
)


def use_plugins(files: Sequence[PluginFile]) -> None:
    """Give the tables the rows of these files and of no others.

    Raises ConfigError where a file cannot be loaded here.
    """
    require(load(files, KINDS))
