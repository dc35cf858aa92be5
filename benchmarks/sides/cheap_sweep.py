"""A sweep in milliseconds: fold trials of random features and ridge regression on fresh data.

Takes a `Scene` and a seed; gives what a run folder would hold of it (out-of-fold log-probabilities,
labels, folds, groups) and what the fold models say of new rows. Every sweep has images, labels,
candidates and folds of its own, so that sweeps are independent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foldrace.core.random_streams import Stream, generator
from foldrace.run_folder.oof import mean_log_prob

_INPUTS, _CLASSES = 16, 4
_GROUP = 6  # rows of a group
Floats = NDArray[np.float64]
Logs = NDArray[np.float32]


@dataclass(frozen=True)
class Scene:
    """The data of a sweep and its size."""

    name: str
    rows: int
    """Scored rows; with k: 1 twice as many are trained on."""
    candidates: int
    k: int = 5
    repeats: int = 1
    groups: bool = False
    """Six rows that are nearly alike make a group."""
    apart: float = 0.55
    """Distance of the classes, in standard deviations of one input."""
    method: str = "greedy"


@dataclass(frozen=True, eq=False)
class Sweep:
    """A sweep that has ended."""

    log_probs: list[Logs]
    """Of each candidate (N, C), out of fold."""
    labels: NDArray[np.int64]
    folds: NDArray[np.int64]
    groups: NDArray[np.int64] | None
    new_log_probs: list[list[Logs]]
    """[candidate][fold] -> (n, C) of the new rows, of several repeats their mean."""
    new_labels: NDArray[np.int64]


@dataclass(frozen=True)
class _Candidate:
    """A learner: its random layer's width, the inputs it sees, penalty, sharpness of its logits."""

    width: int
    inputs: NDArray[np.intp]
    penalty: float
    sharpness: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> _Candidate:
        seen = rng.permutation(_INPUTS)[: rng.integers(6, _INPUTS + 1)]
        width, penalty = int(rng.integers(16, 64)), float(10 ** rng.uniform(0.0, 2.0))
        return cls(width, seen, penalty, float(10 ** rng.uniform(0.2, 0.9)))

    def trained(
        self, rng: np.random.Generator, x: Floats, labels: NDArray[np.int64], asked: list[Floats]
    ) -> list[Logs]:
        """Log-probabilities of what is asked, by one model with a random layer of its own."""
        layer = rng.normal(size=(len(self.inputs), self.width)) / np.sqrt(len(self.inputs))
        shift = rng.normal(size=self.width)

        def features(of: Floats) -> Floats:
            hidden = np.maximum(of[:, self.inputs] @ layer + shift, 0.0)
            return np.hstack([hidden, np.ones((len(of), 1))])

        seen = features(x)
        gram = seen.T @ seen + self.penalty * np.eye(self.width + 1)
        weights = np.linalg.solve(gram, seen.T @ (np.eye(_CLASSES)[labels] - 1 / _CLASSES))
        return [_log_softmax(self.sharpness * (features(of) @ weights)) for of in asked]


def _log_softmax(logits: Floats) -> Logs:
    logits = logits - logits.max(axis=1, keepdims=True)
    logs: Floats = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logs.astype(np.float32)


def sweep(scene: Scene, seed: int, new_rows: int) -> Sweep:
    """All fold trials of a sweep, with predictions of `new_rows` new rows."""
    rng = generator(seed, Stream.WEIGHTS)
    means = rng.normal(scale=scene.apart, size=(_CLASSES, _INPUTS))
    count = scene.rows if scene.k > 1 else 3 * scene.rows
    x, labels, group = _rows(rng, means, count, _GROUP if scene.groups else 1)
    new_x, new_labels, _ = _rows(rng, means, new_rows, 1)
    splits = [_split(rng, group, scene) for _ in range(scene.repeats)]
    scored = np.flatnonzero(splits[0] >= 0)
    log_probs, new_log_probs = [], []
    for _ in range(scene.candidates):
        candidate = _Candidate.draw(rng)
        oof = [np.empty((count, _CLASSES), dtype=np.float32) for _ in splits]
        new: list[list[Logs]] = [[] for _ in range(scene.k)]
        for of_repeat, split in zip(oof, splits, strict=True):
            for fold in range(scene.k):
                inside, held = split != fold, split == fold
                asked = [x[held], new_x]
                of_repeat[held], of_new = candidate.trained(rng, x[inside], labels[inside], asked)
                new[fold].append(of_new)
        log_probs.append(mean_log_prob(oof)[scored])
        new_log_probs.append([mean_log_prob(models) for models in new])
    return Sweep(
        log_probs, labels[scored], splits[0][scored], group[scored] if scene.groups else None,
        new_log_probs, new_labels,
    )  # fmt: skip


def _rows(
    rng: np.random.Generator, means: Floats, count: int, of_group: int
) -> tuple[Floats, NDArray[np.int64], NDArray[np.int64]]:
    """Inputs (n, D), labels (n,) and groups (n,) of `of_group` rows; inputs as spread as alone."""
    group = np.arange(count) // of_group
    labels = rng.integers(0, _CLASSES, group[-1] + 1)[group]
    shared = 0.9 if of_group > 1 else 0.0
    centre = rng.normal(size=(group[-1] + 1, _INPUTS))[group]
    own = rng.normal(size=(count, _INPUTS))
    return means[labels] + shared * centre + np.sqrt(1 - shared**2) * own, labels, group


def _split(rng: np.random.Generator, group: NDArray[np.int64], scene: Scene) -> NDArray[np.int64]:
    """(n,) fold of each row, no group divided; with k: 1 a third of the rows, the rest -1."""
    count = int(group[-1]) + 1
    if scene.k > 1:
        return np.asarray(rng.permutation(np.arange(count) % scene.k)[group])
    return np.asarray(np.where(rng.permutation(count) % 3 == 0, 0, -1)[group])
