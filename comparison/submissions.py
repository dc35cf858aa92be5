"""What the runs say of each test image, and where they agree.

Takes the test set's probabilities of each run, gives `all_experiments_submission_compare.csv` and
the share of images on which two runs agree.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class TestPredictions:
    """One run's predictions of its test set."""

    name: str
    ids: tuple[str, ...]
    predicted: NDArray[np.int64]
    """(n,) class by the blend's decision rule, in the shared order."""
    prob: NDArray[np.float64]
    """(n, C) in the shared order of classes."""


@dataclass(frozen=True, eq=False)
class SharedTestRows:
    """The test images that all runs have predicted."""

    names: tuple[str, ...]
    ids: tuple[str, ...]
    predicted: NDArray[np.int64]
    """(R, n)"""
    confidence: NDArray[np.float64]
    """(R, n) probability of the predicted class."""

    @property
    def votes(self) -> NDArray[np.int64]:
        """(n,) number of runs that say what most of them say."""
        same = self.predicted[:, None, :] == self.predicted[None, :, :]
        most: NDArray[np.int64] = same.sum(axis=0).max(axis=0)
        return most

    @property
    def majority(self) -> NDArray[np.int64]:
        """(n,) class that most runs say; of equally many that of the surest run."""
        same = (self.predicted[:, None, :] == self.predicted[None, :, :]).sum(axis=0)  # (R, n)
        rank = same + self.confidence / 2.0  # a confidence is at most 1
        runs = rank.argmax(axis=0)
        chosen: NDArray[np.int64] = self.predicted[runs, np.arange(len(self.ids))]
        return chosen

    @property
    def agreement(self) -> NDArray[np.float64]:
        """(R, R) share of the images on which two runs say the same class."""
        same = self.predicted[:, None, :] == self.predicted[None, :, :]
        return np.asarray(same.mean(axis=2), dtype=np.float64)


def shared_test_rows(sides: Sequence[TestPredictions]) -> SharedTestRows | None:
    """The images whose id is in every test set, in the order of the first; None without any."""
    places = [{id_: row for row, id_ in enumerate(side.ids)} for side in sides]
    ids = [id_ for id_ in sides[0].ids if all(id_ in place for place in places)] if sides else []
    if not ids:
        return None
    rows = [np.array([place[id_] for id_ in ids]) for place in places]
    taken = list(zip(sides, rows, strict=True))
    return SharedTestRows(
        names=tuple(side.name for side in sides),
        ids=tuple(ids),
        predicted=np.stack([side.predicted[row] for side, row in taken]),
        confidence=np.stack([side.prob[row, side.predicted[row]] for side, row in taken]),
    )


def rows_csv(rows: SharedTestRows, id_column: str, classes: Sequence[str]) -> str:
    """A line for each test image: each run's class and confidence, what most say, how many do."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ours = [f"{name}_{what}" for name in rows.names for what in ("prediction", "confidence")]
    writer.writerow([id_column, *ours, "majority", "votes", "agree"])
    votes, majority = rows.votes, rows.majority
    for row, id_ in enumerate(rows.ids):
        cells: list[str] = []
        for run in range(len(rows.names)):
            cells += [classes[rows.predicted[run, row]], f"{rows.confidence[run, row]:.6f}"]
        agree = "yes" if votes[row] == len(rows.names) else "no"
        writer.writerow([id_, *cells, classes[majority[row]], votes[row], agree])
    return text.getvalue()
