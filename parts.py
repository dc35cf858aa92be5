"""The records of which a plugin's `PARTS` are made, and what their functions take and give.

The only module that a plugin imports: what stands here keeps its name when files move. Each name is
imported from its home at its first use, so that a plugin of metrics alone needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foldrace.core.metrics import Metric
    from foldrace.ensemble.methods import Method
    from foldrace.ensemble.pool import Pool
    from foldrace.ensemble.pooling import (
        Fit,
        GeometricMean,
        Settings,
        Stacking,
        Votes,
        mixture_fit,
    )
    from foldrace.ensemble.solvers.kernels import certified
    from foldrace.inference.tta import TTA
    from foldrace.trainables.data.augment import Policy
    from foldrace.trainables.data.custom_transforms import CustomTransform, CustomTransformRow
    from foldrace.trainables.data.framing import Image
    from foldrace.trainables.data.meta_features import MetaFeature
    from foldrace.trainables.losses import ClassWeights, Loss, LossSettings
    from foldrace.trainables.models.backbones import Family
    from foldrace.trainables.models.encoder import Encoder, Normalise
    from foldrace.trainables.models.heads import Head
    from foldrace.trainables.optimizers import Optimizer
    from foldrace.trainables.schedules import ScheduleRow

_HOMES = {
    "ClassWeights": "foldrace.trainables.losses",
    "CustomTransformRow": "foldrace.trainables.data.custom_transforms",
    "CustomTransform": "foldrace.trainables.data.custom_transforms",
    "Encoder": "foldrace.trainables.models.encoder",
    "Family": "foldrace.trainables.models.backbones",
    "Fit": "foldrace.ensemble.pooling",
    "GeometricMean": "foldrace.ensemble.pooling",
    "Head": "foldrace.trainables.models.heads",
    "Image": "foldrace.trainables.data.framing",
    "Loss": "foldrace.trainables.losses",
    "LossSettings": "foldrace.trainables.losses",
    "MetaFeature": "foldrace.trainables.data.meta_features",
    "Method": "foldrace.ensemble.methods",
    "Metric": "foldrace.core.metrics",
    "Normalise": "foldrace.trainables.models.encoder",
    "Optimizer": "foldrace.trainables.optimizers",
    "Policy": "foldrace.trainables.data.augment",
    "Pool": "foldrace.ensemble.pool",
    "ScheduleRow": "foldrace.trainables.schedules",
    "Settings": "foldrace.ensemble.pooling",
    "Stacking": "foldrace.ensemble.pooling",
    "TTA": "foldrace.inference.tta",
    "Votes": "foldrace.ensemble.pooling",
    "certified": "foldrace.ensemble.solvers.kernels",
    "mixture_fit": "foldrace.ensemble.pooling",
}

__all__ = [
    "TTA",
    "ClassWeights",
    "CustomTransform",
    "CustomTransformRow",
    "Encoder",
    "Family",
    "Fit",
    "GeometricMean",
    "Head",
    "Image",
    "Loss",
    "LossSettings",
    "MetaFeature",
    "Method",
    "Metric",
    "Normalise",
    "Optimizer",
    "Policy",
    "Pool",
    "ScheduleRow",
    "Settings",
    "Stacking",
    "Votes",
    "certified",
    "mixture_fit",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"foldrace.parts has no {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
