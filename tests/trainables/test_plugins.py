"""A trial all of whose parts are a plugin's: whoever looks a name up was given the run's parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from foldrace.core.plugin_files import PluginFile, import_plugins
from foldrace.trainables.trial import run_trial
from tests.trainables.test_trial import Watcher, spec_for

EVERY_KIND = """
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from foldrace.parts import (
    ClassWeights, CustomTransform, CustomTransformRow, Encoder, Family, Head, Loss, MetaFeature,
    Normalise, Optimizer, Policy, ScheduleRow,
)

USED = set()


def noting(name, function):
    def noted(*arguments, **options):
        USED.add(name)
        return function(*arguments, **options)
    return noted


def build(name, pretrained, drop_path, image_size):
    module = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return Encoder(module, 12, Normalise((0.5,) * 3, (0.5,) * 3))


class Same(CustomTransform):
    def apply(self, image, rng):
        USED.add("transform")
        return image


def loss(logits, targets, settings):
    return nn.functional.cross_entropy(logits, targets, reduction="none")


def sgd(groups, lr, momentum):
    return torch.optim.SGD(groups, lr=lr, momentum=momentum)


PARTS = [
    Family("mine", lambda: ["mean"], noting("family", build)),
    Head("own", "", noting("head", lambda n, classes, dropout: nn.Linear(n, classes))),
    MetaFeature("own", "", 1, noting("meta", lambda image: (0.5,))),
    Loss("own", "", "", noting("loss", loss)),
    ClassWeights("own", "", "", noting("weights", lambda counts, beta: np.ones_like(counts))),
    Optimizer("own", "", "", noting("optimizer", sgd)),
    ScheduleRow("own", "", "", noting("schedule", lambda done, plan, stalls: 1.0)),
    Policy("own", "", shift=0.2),
    CustomTransformRow("Same", "", Same),
]
"""


def test_a_trial_uses_the_runs_own_parts_of_every_kind(make_tiny_run: Callable[..., Any]) -> None:
    file = PluginFile("every_kind", EVERY_KIND.encode(), "/gone/every_kind.py")
    run = make_tiny_run(plugins=(file,))
    names = ("head", "loss", "class_weights", "optimizer", "schedule", "policy")
    spec = spec_for(
        run,
        backbone="mine/mean",
        meta_features=("own",),
        transforms=({"foldrace.Same": {"p": 1.0}},),
        **dict.fromkeys(names, "own"),
    )
    record = run_trial(spec, Watcher())
    assert record.status == "finished" and record.params["policy"] == "own"
    [module] = import_plugins([file]).values()
    assert {
        "family", "head", "meta", "loss", "weights", "optimizer", "schedule", "transform",
    } == module.USED  # fmt: skip
