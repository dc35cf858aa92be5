"""The tables of training that a plugin may add rows to."""

from __future__ import annotations

from typing import Any

from foldrace.core.metrics import METRICS
from foldrace.core.plugins import PluginTable
from foldrace.trainables import plugin_checks as checks
from foldrace.trainables.data.augment import POLICIES
from foldrace.trainables.data.custom_transforms import CUSTOM
from foldrace.trainables.data.meta_features import META_FEATURES
from foldrace.trainables.losses import CLASS_WEIGHTS, LOSSES
from foldrace.trainables.models.backbones import FAMILIES
from foldrace.trainables.models.heads import HEADS
from foldrace.trainables.optimizers import OPTIMIZERS
from foldrace.trainables.schedules import SCHEDULES

TRAINING_TABLES: tuple[PluginTable[Any], ...] = (
    PluginTable(FAMILIES, checks.try_family),
    PluginTable(HEADS, checks.try_head),
    PluginTable(META_FEATURES, checks.try_meta_feature),
    PluginTable(LOSSES, checks.try_loss),
    PluginTable(CLASS_WEIGHTS, checks.try_class_weights),
    PluginTable(OPTIMIZERS, checks.try_optimizer),
    PluginTable(SCHEDULES, checks.try_schedule),
    PluginTable(POLICIES, checks.try_policy),
    PluginTable(CUSTOM, checks.try_custom),
    PluginTable(METRICS, checks.try_metric),
)
