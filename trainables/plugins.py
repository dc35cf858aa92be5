"""The tables of training that a plugin may add rows to, one entry per table.

Takes a run folder or plugin files, gives their rows to the tables of this process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from foldrace.core.metrics import METRICS, Metric
from foldrace.core.plugin_files import PluginFile
from foldrace.core.plugins import PluginTable, load, require
from foldrace.trainables import plugin_checks as checks
from foldrace.trainables.data.augment import POLICIES, Policy
from foldrace.trainables.data.custom_transforms import CUSTOM, CustomTransformRow
from foldrace.trainables.data.meta_features import META_FEATURES, MetaFeature
from foldrace.trainables.losses import CLASS_WEIGHTS, LOSSES, ClassWeights, Loss
from foldrace.trainables.models.backbones import FAMILIES, Family
from foldrace.trainables.models.heads import HEADS, Head
from foldrace.trainables.optimizers import OPTIMIZERS, Optimizer
from foldrace.trainables.schedules import SCHEDULES, ScheduleRow

PLUGIN_TABLES: tuple[PluginTable[Any], ...] = (
    PluginTable(Family, "backbone family", FAMILIES, checks.try_family, key="prefix"),
    PluginTable(Head, "head", HEADS, checks.try_head),
    PluginTable(MetaFeature, "meta feature", META_FEATURES, checks.try_meta_feature),
    PluginTable(Loss, "loss", LOSSES, checks.try_loss),
    PluginTable(ClassWeights, "class weights", CLASS_WEIGHTS, checks.try_class_weights),
    PluginTable(Optimizer, "optimiser", OPTIMIZERS, checks.try_optimizer),
    PluginTable(ScheduleRow, "schedule", SCHEDULES, checks.try_schedule),
    PluginTable(Policy, "augmentation policy", POLICIES, checks.try_policy),
    PluginTable(CustomTransformRow, "custom transform", CUSTOM, checks.try_custom),
    PluginTable(Metric, "metric", METRICS, checks.try_metric),
)


def use_plugins(files: Sequence[PluginFile]) -> None:
    """Give the tables the rows of these files and of no others.

    Raises ConfigError where a file cannot be loaded here.
    """
    require(load(files, PLUGIN_TABLES))
