"""The tables of training that a plugin may add rows to, and how a row is tried.

A function of a table uses a row once on something tiny, to find mistakes before the sweep; it
raises UnfitRow, or what the row itself raises.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import torch

from foldrace.config.hyperparameters import TrialParams
from foldrace.core.metrics import METRICS, Metric, UnfitMetric, metric_value
from foldrace.core.plugins import PluginTable, UnfitRow
from foldrace.trainables.data.augment import POLICIES, Policy, augment
from foldrace.trainables.data.custom_transforms import CUSTOM, CustomTransformRow
from foldrace.trainables.data.meta_features import META_FEATURES, MetaFeature
from foldrace.trainables.losses import (
    ACTIVATIONS,
    CLASS_WEIGHTS,
    LOSSES,
    ClassWeights,
    Loss,
    LossSettings,
)
from foldrace.trainables.models.backbones import FAMILIES, Family
from foldrace.trainables.models.heads import HEADS, Head
from foldrace.trainables.optimizers import OPTIMIZERS, Optimizer
from foldrace.trainables.schedules import SCHEDULES, ScheduleRow, TrainingPlan

_PIXELS = 224  # what most backbones take
_ROWS, _CLASSES = 6, 3


def _try_loss(row: Loss) -> None:
    """Compute the loss of a few images; it must be one finite number per image, with a gradient."""
    if row.activation not in ACTIVATIONS:
        raise UnfitRow(f"has the activation {row.activation!r}; allowed: {', '.join(ACTIVATIONS)}")
    logits = torch.zeros(_ROWS, _CLASSES, requires_grad=True)
    targets = torch.nn.functional.one_hot(torch.arange(_ROWS) % _CLASSES, _CLASSES).float()
    counts = torch.full((_CLASSES,), float(_ROWS))
    value = row.function(logits, targets, LossSettings(2.0, 1.0, counts))
    if not isinstance(value, torch.Tensor) or value.shape != (_ROWS,):
        raise UnfitRow(f"gives {_form(value)} for {_ROWS} images, should be one number per image")
    if not bool(torch.isfinite(value).all()) or bool((value < 0).any()):
        raise UnfitRow(f"gives {value.tolist()} for logits of 0, should be finite and not below 0")
    if not value.requires_grad:
        raise UnfitRow("has no gradient; it should be made of torch functions of the logits")
    value.mean().backward()  # type: ignore[no-untyped-call]


def _try_class_weights(row: ClassWeights) -> None:
    """Compute the weights of three classes of different size; they must be above 0."""
    weights = np.asarray(row.function(np.array([1.0, 10.0, 100.0]), 0.9))
    if weights.shape != (3,) or not (np.isfinite(weights) & (weights > 0)).all():
        raise UnfitRow(f"gives {weights.tolist()} for 3 classes, should be 3 numbers above 0")


def _try_optimizer(row: Optimizer) -> None:
    """Take one step with a layer and its bias, in two groups; it must change the weights."""
    layer = torch.nn.Linear(4, _CLASSES)
    groups = [
        {"params": [layer.weight], "lr": 0.1, "weight_decay": 0.1},
        {"params": [layer.bias], "lr": 0.05, "weight_decay": 0.0},
    ]
    made = row.build(groups, 0.1, 0.9)
    if not isinstance(made, torch.optim.Optimizer):
        raise UnfitRow(f"builds {_form(made)}, should be a torch.optim.Optimizer")
    before = layer.weight.detach().clone()
    layer(torch.ones(2, 4)).square().sum().backward()
    made.step()
    if bool(torch.equal(before, layer.weight)) or not bool(torch.isfinite(layer.weight).all()):
        raise UnfitRow("leaves the weights as they are, or not finite, in a step")


def _try_schedule(row: ScheduleRow) -> None:
    """Compute the rate at the first and the last update of a short training."""
    plan = TrainingPlan(TrialParams(), updates_per_epoch=5, epochs=4)
    for done in (0, plan.updates - 1):
        factor = row.factor(done, plan, 0)
        if not 0 <= factor < math.inf:
            raise UnfitRow(f"gives {factor} after {done} updates, should be 0 or more")


def _try_head(row: Head) -> None:
    """Build the head and give it a few features."""
    found = row.build(8, _CLASSES, 0.1)(torch.zeros(_ROWS, 8))
    if not isinstance(found, torch.Tensor) or found.shape != (_ROWS, _CLASSES):
        raise UnfitRow(f"gives {_form(found)}, should have the shape ({_ROWS}, {_CLASSES})")


def _try_meta_feature(row: MetaFeature) -> None:
    """Compute the numbers of a black image."""
    found = row.compute(np.zeros((16, 20, 3), np.uint8))
    if len(found) != row.width or not np.isfinite(found).all():
        raise UnfitRow(f"gives {found} for a black image, should be {row.width} finite numbers")


def _try_family(row: Family) -> None:
    """Ask for the names; build the first backbone and give it two images, if it takes them."""
    names = list(row.names())
    if not names or not all(isinstance(name, str) for name in names):
        raise UnfitRow(f"has the names {names!r}, should be one text or more")
    if "/" in row.prefix:
        raise UnfitRow("should have no / in its prefix")
    try:
        body = row.build(names[0], False, 0.0, _PIXELS)
        with torch.no_grad():
            images = body.normalise(torch.zeros(2, 3, _PIXELS, _PIXELS))
            found = body.module.eval()(images)
    except Exception:  # it may take another size: the sweep's own is tried with each backbone
        return
    if not isinstance(found, torch.Tensor) or found.shape != (2, body.features):
        raise UnfitRow(
            f"{names[0]!r}, of 2 images, gives {_form(found)}, should be pooled features of the "
            f"shape (2, {body.features}), as its Encoder says"
        )


def _try_policy(row: Policy) -> None:
    """Augment noise images of two shapes."""
    rng = np.random.default_rng(0)
    shapes = ((20, 30, 3), (32, 16, 3))
    augment([rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes], 16, row, rng)


def _try_custom(row: CustomTransformRow) -> None:
    """Transform a noise image, if every argument has a default; else the config's list does."""
    parameters = inspect.signature(row.make).parameters
    if any(p.default is p.empty and p.kind is not p.VAR_KEYWORD for p in parameters.values()):
        return
    always = {"p": 1.0} if "p" in parameters else {}
    image = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    found = row.make(**always)(image, np.random.default_rng(0))
    if not isinstance(found, np.ndarray) or found.dtype != np.uint8 or found.ndim != 3:
        raise UnfitRow(f"gives {_form(found)}, should be an RGB image: (height, width, 3) uint8")


def _try_metric(row: Metric) -> None:
    """Score made-up probabilities of rows of every class."""
    prob = np.random.default_rng(0).dirichlet(np.ones(_CLASSES), 4 * _ROWS)
    try:
        metric_value(row, prob, np.arange(4 * _ROWS) % _CLASSES)
    except UnfitMetric as error:
        raise UnfitRow(str(error)) from error


def _form(value: object) -> str:
    shape = getattr(value, "shape", None)
    name = type(value).__name__
    return name if shape is None else f"{name} of the shape {tuple(shape)}"


TRAINING_TABLES: tuple[PluginTable[Any], ...] = (
    PluginTable(FAMILIES, _try_family),
    PluginTable(HEADS, _try_head),
    PluginTable(META_FEATURES, _try_meta_feature),
    PluginTable(LOSSES, _try_loss),
    PluginTable(CLASS_WEIGHTS, _try_class_weights),
    PluginTable(OPTIMIZERS, _try_optimizer),
    PluginTable(SCHEDULES, _try_schedule),
    PluginTable(POLICIES, _try_policy),
    PluginTable(CUSTOM, _try_custom),
    PluginTable(METRICS, _try_metric),
)
