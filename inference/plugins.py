"""Every table that a plugin may add rows to, and a run folder's plugins.

Takes a run folder or the paths of a config's plugins.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ensemble.blend import checked_weights
from ensemble.methods import METHODS, Method
from experiment.errors import Problem
from experiment.plugins import Kind, Unfit, check, load, require
from experiment.store import RunStore
from inference.tta import TTA, TTAS
from trainables.plugins import KINDS


def _try_method(row: Method) -> None:
    true_prob = np.random.default_rng(0).random((3, 20))
    checked_weights(row.function(true_prob, 5, None).weights, len(true_prob))


def _try_tta(row: TTA) -> None:
    images = torch.rand(2, 3, 16, 24)
    if not row.views:
        raise Unfit("has no view, should have one or more")
    for i, view in enumerate(row.views):
        found = view(images)
        if found.shape != images.shape:
            raise Unfit(f"changes the shape of the images in view {i}, should keep it")
        if found.dtype != images.dtype or not bool(torch.isfinite(found).all()):
            raise Unfit(f"gives {found.dtype} in view {i}, should be float32 and finite")


ALL_KINDS = (
    *KINDS,
    Kind(Method, "blend method", METHODS, _try_method),
    Kind(TTA, "test-time augmentation", TTAS, _try_tta),
)


def check_plugins(paths: Sequence[str]) -> list[Problem]:
    """Load a config's plugins, try each row, and tell everything that is wrong."""
    return check(paths, ALL_KINDS)


def use_run_plugins(store: RunStore) -> None:
    """The tables hold the rows of the run's own plugins. Raises ConfigError where one cannot be
    loaded here."""
    require(load(store.plugins(), ALL_KINDS))
