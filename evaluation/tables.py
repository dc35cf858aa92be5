"""The CSV files of an evaluation: a row an image, a row a class, a row a pair of classes.

Takes rows and scores, gives texts. Written with csv, not pandas, which cannot write file names that
are not UTF-8.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from foldrace.evaluation.rows import EvaluatedRows
from foldrace.evaluation.scores import Scores

ERROR = "ERROR"
"""In place of a class where the image cannot be read."""

Cell = str | int | float


def csv_text(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table; floats have six digits."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow([f"{c:.6g}" if isinstance(c, float) else c for c in row])
    return text.getvalue()


def row_header(found: EvaluatedRows) -> list[str]:
    """The columns of `row_cells`."""
    folds = ["fold", *(f"fold_r{i}" for i in range(1, len(found.splits)))][: len(found.splits)]
    votes = ["members", "votes_label", "votes_predicted", "votes"] if found.members else []
    return ["image_path", "label", "predicted", "confidence", "p_true", "loss", *folds, *votes]


def row_cells(found: EvaluatedRows, row: int) -> list[Cell]:
    """One image: what it is said to be, how sure, how wrong, and how many members agree."""
    label, predicted = int(found.labels[row]), int(found.predicted[row])
    cells: list[Cell] = [
        found.paths[row], found.classes[label], found.classes[predicted],
        float(found.confidence[row]), float(found.true_prob[row]), float(found.losses[row]),
        *(int(split[row]) for split in found.splits),
    ]  # fmt: skip
    if found.members:
        votes = found.votes[row]
        cells += [len(found.members), int(votes[label]), int(votes[predicted])]
        cells.append(votes_text(found, row))
    return cells


def votes_text(found: EvaluatedRows, row: int) -> str:
    """`cat (3); dog (1)`: how many members say what, the most frequent first."""
    votes = found.votes[row]
    order = np.argsort(-votes, kind="stable")[: np.count_nonzero(votes)]
    return "; ".join(f"{found.classes[c]} ({votes[c]})" for c in order)


def predictions_csv(found: EvaluatedRows) -> str:
    """All rows."""
    return csv_text(row_header(found), (row_cells(found, i) for i in range(len(found))))


def mistakes_csv(found: EvaluatedRows) -> str:
    """The rows that are predicted wrong, by falling confidence."""
    return csv_text(row_header(found), (row_cells(found, i) for i in found.mistakes.tolist()))


def inference_csv(found: EvaluatedRows, unread: Mapping[str, tuple[str, str]]) -> str:
    """All rows with their probabilities, then the images that cannot be read.

    `unread`: path -> (label, reason).
    """
    header = [*row_header(found), *(f"p_{name}" for name in found.classes), "error"]
    good = ([*row_cells(found, i), *map(float, found.prob[i]), ""] for i in range(len(found)))
    bad = (
        [path, label, ERROR, *[""] * (len(header) - 4), reason]
        for path, (label, reason) in unread.items()
    )
    return csv_text(header, chain(good, bad))


def member_csv(found: EvaluatedRows, name: str) -> str:
    """What one member says of the rows."""
    prob = found.members[name]
    best = prob.argmax(axis=1)
    rows = (
        [found.paths[i], found.classes[found.labels[i]], found.classes[best[i]], *map(float, p)]
        for i, p in enumerate(prob)
    )
    return csv_text(["image_path", "label", "predicted", *found.classes], rows)


def metrics_csv(of: Mapping[str, Scores]) -> str:
    """One line a metric and set of rows; `of`: name of the rows -> their scores."""
    rows = (
        [name, metric.name, metric.value, "" if metric.se is None else metric.se]
        for name, scores in of.items()
        for metric in scores.metrics
    )
    return csv_text(["rows", "metric", "value", "standard_error"], rows)


def classes_csv(scores: Scores) -> str:
    """One line a class."""
    header = ("class", "rows", "predicted", "precision", "recall", "f1", "mean_loss")
    return csv_text(
        header,
        (
            (c.name, c.rows, c.predicted, c.precision, c.recall, c.f1, c.mean_loss)
            for c in scores.classes
        ),
    )


def confusion_csv(counts: NDArray[np.int64], names: tuple[str, ...]) -> str:
    """The matrix: a row a label, a column a predicted class."""
    rows = ([name, *map(int, row)] for name, row in zip(names, counts, strict=True))
    return csv_text(["label \\ predicted", *names], rows)


def pairs_csv(scores: Scores) -> str:
    """One line a confusion, the most frequent first."""
    rows = ((p.label, p.predicted, p.rows, p.share) for p in scores.pairs)
    return csv_text(("label", "predicted", "rows", "share_of_label"), rows)
