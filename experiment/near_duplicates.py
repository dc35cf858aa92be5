"""`near_duplicates.csv`: training images that nearly equal one of another fold or of the test set.

Takes what the audit found, gives the file in the run folder, and later the rows that it names.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from experiment.errors import RunFolderError
from experiment.files import Files
from experiment.folds import FoldTable

NAME = "near_duplicates.csv"
HEADER = ("image_path", "other", "kind", "distance")


@dataclass(frozen=True)
class NearDuplicate:
    """One row of the file; exact copies are in it too."""

    image_path: str
    """Of the training image, as in folds.csv."""
    other: str
    """The most similar image of another fold, or of the test set."""
    kind: Literal["fold", "test"]
    distance: int
    """Bits of 64 in which the hashes differ."""


def save_near_duplicates(files: Files, found: Iterable[NearDuplicate]) -> None:
    """Write the file; without any, its header alone: then it is known that there are none."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows(astuple(one) for one in found)
    files.write(NAME, text.getvalue().encode(errors="surrogateescape"))


def near_duplicate_rows(files: Files, folds: FoldTable) -> NDArray[np.int64] | None:
    """(n,) rows of folds.csv that the file names, ascending; None where there is no file.

    Raises RunFolderError where it is not of these folds.
    """
    if not files.exists(NAME):
        return None
    text = files.read(NAME).decode(errors="surrogateescape")
    rows = list(csv.reader(io.StringIO(text, newline="")))
    index = {path: row for row, path in enumerate(folds.image_paths)}
    if not rows or tuple(rows[0]) != HEADER or any(not r or r[0] not in index for r in rows[1:]):
        message = "is damaged or not of this folds.csv; remove it to blend without it"
        raise RunFolderError.single(f"{files.root}/{NAME}", message)
    return np.array(sorted({index[row[0]] for row in rows[1:]}), dtype=np.int64)
