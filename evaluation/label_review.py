"""What looks wrong with the labels of a run's training images, as records to review and to write.

Takes the OOF rows and the images; gives suspected errors, nearly equal images with different
labels, classes that look alike, and the accuracy that these labels allow.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from foldrace.core.standard_errors import error_of_mean
from foldrace.dataset.manifest import Manifest
from foldrace.dataset.similarity import nearest_matches, scan_images, stack_hashes
from foldrace.evaluation.confident_learning import NoiseEstimate, estimate_noise
from foldrace.evaluation.rows import EvaluatedRows
from foldrace.evaluation.tables import csv_text, votes_text

_ALIKE_SHARE = 0.1
"""Share of the rows of the smaller class that are confidently of the other one, from which on two
classes are named as nearly one."""
_ALIKE_ROWS = 5
_SURE_ACCURACY = 0.9
"""With 5 % of the labels of hands wrong, and 75 % of the rows right, 8 % were suspected."""


@dataclass(frozen=True)
class SuspectLabel:
    """A row whose label is probably wrong."""

    row: int
    """Row of the `EvaluatedRows`."""
    label: str
    suggested: str
    p_label: float
    p_suggested: float
    votes_suggested: int
    """Members whose most probable class is the suggested one."""


@dataclass(frozen=True)
class ConflictingPair:
    """Two training images that nearly equal one another, with different labels."""

    image: str
    label: str
    other: str
    other_label: str
    kind: Literal["identical", "near"]
    distance: int
    """Number of bits of 64 in which the hashes differ."""


@dataclass(frozen=True)
class AlikeClasses:
    """Two classes that the models hold for nearly one."""

    first: str
    second: str
    rows: float
    """Rows of either label that are estimated to be of the other class."""
    share: float
    """The same as a share of the rows of the smaller class."""


@dataclass(frozen=True)
class Ceiling:
    """The accuracy that a model without any mistake would show on these labels.

    Where the models themselves are often wrong, too many labels are suspected: it is then a lower
    bound.
    """

    wrong_share: float
    """Share of rows with a suspected label."""
    se: float | None
    """Standard error of that share over rows, or groups."""
    model_accuracy: float
    """Accuracy of the blend on the same rows."""

    @property
    def accuracy(self) -> float:
        """1 less the share of suspected labels."""
        return 1.0 - self.wrong_share

    @property
    def is_bound(self) -> bool:
        """True where the models are wrong too often to tell wrong labels from own mistakes."""
        return self.model_accuracy < _SURE_ACCURACY


@dataclass(frozen=True, eq=False)
class LabelReview:
    """Everything about the labels, the worst first."""

    found: EvaluatedRows
    noise: NoiseEstimate
    suspects: tuple[SuspectLabel, ...]
    conflicts: tuple[ConflictingPair, ...]
    alike: tuple[AlikeClasses, ...]
    ceiling: Ceiling


def review_labels(found: EvaluatedRows, data: Manifest, workers: int) -> LabelReview:
    """The review of OOF rows; every image of `data` is read, `workers` at a time."""
    noise = estimate_noise(found.prob, found.labels)
    return LabelReview(
        found=found,
        noise=noise,
        suspects=tuple(_suspects(found, noise)),
        conflicts=tuple(conflicting_pairs(data, workers)),
        alike=tuple(alike_classes(found, noise)),
        ceiling=_ceiling(found, noise),
    )


def _suspects(found: EvaluatedRows, noise: NoiseEstimate) -> Iterator[SuspectLabel]:
    for row in noise.suspects.tolist():
        label, other = int(found.labels[row]), int(noise.suggested[row])
        yield SuspectLabel(
            row, found.classes[label], found.classes[other], float(found.prob[row, label]),
            float(found.prob[row, other]), int(found.votes[row, other]),
        )  # fmt: skip


def conflicting_pairs(data: Manifest, workers: int) -> Iterator[ConflictingPair]:
    """Images that equal or nearly equal one with another label, each pair once, the nearest first.

    Of an image its nearest one; also within a fold, which the audit of a run does not ask.
    """
    infos = scan_images(data, workers)
    # Images of one side are not compared: here a side is a label.
    images = stack_hashes([info.perceptual_hash for info in infos], data.labels)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        matches = nearest_matches(images, images, pool)
    pairs = {(min(m.row, m.other), max(m.row, m.other)): m.distance for m in matches}
    same = {pair: infos[pair[0]].digest == infos[pair[1]].digest for pair in pairs}
    for (a, b), distance in sorted(pairs.items(), key=lambda p: (not same[p[0]], p[1], p[0])):
        yield ConflictingPair(
            data.image_paths[a], data.classes[data.labels[a]],
            data.image_paths[b], data.classes[data.labels[b]],
            "identical" if same[a, b] else "near", distance,
        )  # fmt: skip


def alike_classes(found: EvaluatedRows, noise: NoiseEstimate) -> Iterator[AlikeClasses]:
    """Pairs of classes with many rows in common by the joint, the largest share first."""
    both = (noise.joint + noise.joint.T) * len(found)
    counts = np.bincount(found.labels, minlength=len(found.classes))
    smaller = np.maximum(np.minimum(counts[:, None], counts[None, :]), 1)
    share = np.triu(both / smaller, k=1)
    for place in np.argsort(-share, axis=None, kind="stable"):
        a, b = divmod(int(place), len(counts))
        if share[a, b] < _ALIKE_SHARE:
            return
        if both[a, b] >= _ALIKE_ROWS:
            names = found.classes[a], found.classes[b]
            yield AlikeClasses(*names, float(both[a, b]), float(share[a, b]))


def _ceiling(found: EvaluatedRows, noise: NoiseEstimate) -> Ceiling:
    wrong: NDArray[np.float64] = np.zeros(len(found))
    wrong[noise.suspects] = 1.0
    accuracy = float((found.predicted == found.labels).mean())
    return Ceiling(float(wrong.mean()), error_of_mean(wrong, found.groups), accuracy)


def labels_csv(review: LabelReview) -> str:
    """A row a suspected label, the most suspicious first."""
    found = review.found
    header = (
        "rank", "image_path", "label", "suggested", "p_label", "p_suggested", "fold", "members",
        "votes_label", "votes_suggested", "votes",
    )  # fmt: skip
    rows = (
        (
            rank, found.paths[s.row], s.label, s.suggested, s.p_label, s.p_suggested,
            int(found.splits[0][s.row]), len(found.members),
            int(found.votes[s.row, found.labels[s.row]]), s.votes_suggested,
            votes_text(found, s.row),
        )
        for rank, s in enumerate(review.suspects, 1)
    )  # fmt: skip
    return csv_text(header, rows)


def conflicts_csv(review: LabelReview) -> str:
    """A row a pair of nearly equal images with different labels."""
    header = ("image_path", "label", "other", "other_label", "kind", "distance")
    rows = (
        (c.image, c.label, c.other, c.other_label, c.kind, c.distance) for c in review.conflicts
    )
    return csv_text(header, rows)


def alike_csv(review: LabelReview) -> str:
    """A row a pair of classes that look alike."""
    rows = ((a.first, a.second, a.rows, a.share) for a in review.alike)
    return csv_text(("class", "other", "rows", "share_of_smaller"), rows)
