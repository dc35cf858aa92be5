"""Every table that a plugin may add rows to, and the parts of a run folder."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from foldrace.core.consent import allowed_plugins
from foldrace.core.plugins import Parts, PluginTable, UnfitRow, load_parts
from foldrace.ensemble.blend import checked_weights
from foldrace.ensemble.methods import METHODS, Method
from foldrace.ensemble.pool import Member, Pool
from foldrace.ensemble.pooling import POOLINGS, Fit, Settings, blend_prob
from foldrace.inference.tta import TTA, TTAS
from foldrace.run_folder.store import RunStore
from foldrace.run_folder.variants import RAW
from foldrace.trainables.plugins import TRAINING_TABLES


def _try_method(row: Method) -> None:
    pool = _tiny_pool()
    fit = row.function(pool, Settings(max_rounds=5))
    if not isinstance(fit, Fit):
        raise UnfitRow(f"gives {type(fit).__name__}, should be a Fit")
    weights = np.asarray(fit.combiner.weights)
    if weights.shape != (len(pool.members),):
        raise UnfitRow(f"gives weights of shape {weights.shape}, should be one number per member")
    if not (np.isfinite(weights).all() and (weights >= 0.0).all() and weights.any()):
        raise UnfitRow(f"gives the weights {weights}, should be finite, >= 0 and not all 0")
    if fit.combiner.pooling not in POOLINGS:
        names = ", ".join(POOLINGS)
        raise UnfitRow(f"gives the pooling {fit.combiner.pooling!r}, should be one of: {names}")
    if fit.combiner.pooling == "arithmetic":
        checked_weights(weights, len(pool.members))
    prob = blend_prob(fit, pool)
    if prob.shape != (len(pool.labels), pool.n_classes) or not _sum_to_one(prob):
        raise UnfitRow("gives a blend whose rows are no probabilities that sum to 1")


def _tiny_pool() -> Pool:
    """3 members on 20 rows of 3 classes, one of each kind that a method may look for."""
    rng = np.random.default_rng(0)
    prob = rng.dirichlet(np.ones(3), size=(3, 20)).astype(np.float32)
    labels = np.arange(20) % 3
    return Pool(
        members=tuple(Member("c0000", variant, "tiny") for variant in (RAW, "snap1", "soup")),
        true_prob=prob[:, np.arange(20), labels],
        labels=labels,
        n_classes=3,
        log_prob=lambda member: np.log(prob[member]),
    )


def _sum_to_one(prob: NDArray[np.float64]) -> bool:
    return bool((prob >= 0.0).all() and np.allclose(prob.sum(axis=1), 1.0))


def _try_tta(row: TTA) -> None:
    images = torch.rand(2, 3, 16, 24)
    if not row.views:
        raise UnfitRow("has no view, should have one or more")
    for i, view in enumerate(row.views):
        found = view(images)
        if found.shape != images.shape:
            raise UnfitRow(f"changes the shape of the images in view {i}, should keep it")
        if found.dtype != images.dtype or not bool(torch.isfinite(found).all()):
            raise UnfitRow(f"gives {found.dtype} in view {i}, should be float32 and finite")


ALL_TABLES: tuple[PluginTable[Any], ...] = (
    *TRAINING_TABLES,
    PluginTable(METHODS, _try_method),
    PluginTable(TTAS, _try_tta),
)


def run_parts(store: RunStore) -> Parts:
    """The rows of the run's own copies of its plugins.

    Raises RunFolderError where the user has not allowed that they run, ConfigError where one cannot
    be loaded here.
    """
    return load_parts(allowed_plugins(store.plugins()), ALL_TABLES)
