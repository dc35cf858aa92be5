"""Paired differences of two runs on the same images, and the keys in which their configs differ.

Takes a `Comparison`, gives records.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foldrace.comparison.sides import Comparison, Side
from foldrace.config.schema import SweepConfig
from foldrace.ensemble.uncertainty import standard_error


@dataclass(frozen=True)
class Difference:
    """A mean over images with its standard error."""

    value: float
    se: float
    """Over images, or over groups where the data have some; NaN of one image."""

    @property
    def is_clear(self) -> bool:
        """True where it is more than two standard errors from 0."""
        return abs(self.value) > 2 * self.se


@dataclass(frozen=True)
class Pair:
    """The second run less the first one, image by image."""

    first: str
    second: str
    loss: Difference
    """In nats; below 0 the second is better."""
    accuracy: Difference
    """Below 0 the first is better."""
    only_first_right: int
    """Images that the first alone has right."""
    only_second_right: int


@dataclass(frozen=True)
class KeyDifference:
    """A key of sweep.yaml that is not alike in all runs."""

    key: str
    values: tuple[str, ...]
    """JSON of its value in each run; empty where it has none."""


def pairs(comparison: Comparison) -> list[Pair]:
    """Each run against each later one."""
    return [_pair(comparison, a, b) for a, b in combinations(comparison.sides, 2)]


def _pair(comparison: Comparison, first: Side, second: Side) -> Pair:
    loss = comparison.losses(second) - comparison.losses(first)
    hits = comparison.hits(second) - comparison.hits(first)
    return Pair(
        first=first.name,
        second=second.name,
        loss=difference(loss, comparison.groups),
        accuracy=difference(hits, comparison.groups),
        only_first_right=int((hits < 0).sum()),
        only_second_right=int((hits > 0).sum()),
    )


def difference(values: NDArray[np.float64], groups: NDArray[np.int64] | None) -> Difference:
    """The mean of the values (n,) with its standard error."""
    return Difference(float(values.mean()), standard_error(values, groups))


def config_differences(configs: Sequence[SweepConfig]) -> list[KeyDifference]:
    """The keys whose values are not alike in all configs, by name."""
    flat = [dict(_leaves(config.model_dump(mode="json"))) for config in configs]
    keys = sorted({key for one in flat for key in one})
    found = [KeyDifference(key, tuple(one.get(key, "") for one in flat)) for key in keys]
    return [one for one in found if len(set(one.values)) > 1]


def _leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys with the JSON of their values; a list is one value."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class ImageRow:
    """One image, and what each run says of it."""

    path: str
    label: str
    predicted: tuple[str, ...]
    losses: tuple[float, ...]
    """Log loss in each run, in nats."""

    @property
    def apart(self) -> float:
        """Greatest less least loss."""
        return max(self.losses) - min(self.losses)


def image_rows(comparison: Comparison) -> list[ImageRow]:
    """Every shared image, those first of which the runs' losses are furthest apart."""
    losses = np.stack([comparison.losses(side) for side in comparison.sides], axis=1)  # (n, R)
    predicted = np.stack([side.predicted for side in comparison.sides], axis=1)
    classes = comparison.classes
    rows = [
        ImageRow(
            path,
            classes[comparison.labels[i]],
            tuple(classes[c] for c in predicted[i]),
            tuple(losses[i].tolist()),
        )
        for i, path in enumerate(comparison.image_paths)
    ]
    return sorted(rows, key=lambda row: -row.apart)
