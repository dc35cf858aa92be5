"""`submission.csv` in the exact form of the sample, and the receipt that proves it.

Takes test probabilities, gives the two files, each in place of the earlier one at once. The text is
checked before it is written, and the file is read back: what is proved is what lies on the disk.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from foldrace.core.errors import RunFailure
from foldrace.core.files import Files
from foldrace.dataset.test_set import ImageSet
from foldrace.run_folder.blend_records import EnsembleRecord

_ROW_SUM = 1e-6


@dataclass(frozen=True)
class UnvalidatedFile:
    """Test predictions without out-of-fold rows."""

    name: str
    share: float
    """Part of the submission, from 0 to 1."""
    warning: str = "made without out-of-fold rows: no score says how good it is"


@dataclass(frozen=True)
class Receipt:
    """Proof of a submission: what was written, from what, and which checks passed."""

    file: str
    sha256: str
    test: str
    """Table of the test images, or their folder."""
    rows: int
    columns: tuple[str, ...]
    created: str
    oof_logloss: float
    crossfit_logloss: float
    certificate: float | None
    """None: the blend is no weighted mean of probabilities."""
    pooling: str
    """How the members are combined."""
    blend_temperature: float
    members: tuple[dict[str, object], ...]
    """Weight, temperature, run folder (empty: this one) and whether it was `added` from a file."""
    unvalidated: tuple[UnvalidatedFile, ...]
    """Files that were averaged in although no score backs them; the scores are of the rest."""
    folds_hash: str
    tta: str
    """Test-time augmentation: the views that were averaged."""
    checks: tuple[str, ...]
    without_image: tuple[str, ...] = ()
    """Ids whose image gives no pixels: their rows are the training images' class frequencies."""


def write_submission(
    files: Files,
    name: str,
    test: ImageSet,
    classes: Sequence[str],
    prob: NDArray[np.float64],
    ensemble: EnsembleRecord,
    tta: str = "none",
    without_image: Sequence[str] = (),
) -> Receipt:
    """Write `name` and `<name without .csv>.receipt.json` into `files`.

    `prob` is (n, C) in the order of `test` and `classes`; `without_image` are ids. Raises
    RunFailure where a check does not pass: nothing is written then, so that an earlier submission
    stays.
    """
    text = submission_csv(test, classes, prob)
    data = text.encode()
    checks = check_submission(text, test)
    files.write(name, data)
    if files.read(name) != data:
        files.delete(name)
        raise RunFailure(f"{files.root}/{name} does not hold what was written to it")
    receipt = Receipt(
        file=name,
        sha256=hashlib.sha256(data).hexdigest(),
        test=test.table or str(test.image_root),
        rows=len(test),
        columns=test.header,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        oof_logloss=ensemble.oof_logloss,
        crossfit_logloss=ensemble.crossfit_logloss,
        certificate=ensemble.certificate,
        pooling=ensemble.pooling,
        blend_temperature=ensemble.blend_temperature,
        members=tuple(member.model_dump() for member in ensemble.members),
        unvalidated=tuple(UnvalidatedFile(u.name, u.weight) for u in ensemble.unvalidated),
        folds_hash=ensemble.folds_hash,
        tta=tta,
        checks=checks,
        without_image=tuple(without_image),
    )
    text = json.dumps(asdict(receipt), indent=1, ensure_ascii=False)
    files.write(f"{name.removesuffix('.csv')}.receipt.json", text.encode())
    return receipt


def submission_csv(test: ImageSet, classes: Sequence[str], prob: NDArray[np.float64]) -> str:
    """Text with columns in the sample's order, numbers with 9 significant digits.

    In the label form the most probable class, the first of equal ones.
    """
    order = [list(classes).index(column) for column in test.class_columns]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(test.header)
    for row_id, row in zip(test.ids, prob[:, order], strict=True):
        cells = [test.class_columns[row.argmax()]] if test.labels else [f"{p:.9g}" for p in row]
        writer.writerow([row_id, *cells])
    return buffer.getvalue()


def check_submission(text: str, test: ImageSet) -> tuple[str, ...]:
    """Read a submission; the checks that passed, or RunFailure with those that did not."""
    header, *rows = list(csv.reader(io.StringIO(text))) or [[]]
    results = {
        "columns equal the sample's, in its order": header == list(test.header),
        "every row has one cell per column": all(len(row) == len(header) for row in rows),
        "ids equal the sample's, in its order": [r[0] for r in rows if r] == list(test.ids),
    }
    cells = [row[1:] for row in rows]
    results |= _label_checks(cells, test) if test.labels else _probability_checks(cells)
    failed = [check for check, passed in results.items() if not passed]
    if failed:
        raise RunFailure(f"the submission is not valid: failed checks: {'; '.join(failed)}")
    return tuple(results)


def _label_checks(cells: list[list[str]], test: ImageSet) -> dict[str, bool]:
    known = set(test.class_columns)
    return {"every label is a class": all(cell in known for row in cells for cell in row)}


def _probability_checks(cells: list[list[str]]) -> dict[str, bool]:
    values = [[_number(cell) for cell in row] for row in cells]
    numbers = np.array([number for row in values for number in row])
    furthest = max((abs(sum(row) - 1) for row in values), default=0.0)
    return {
        "no value is missing or not finite": bool(np.isfinite(numbers).all()),
        "every value lies in [0, 1]": bool(((numbers >= 0) & (numbers <= 1)).all()),
        f"every row sums to 1 within {_ROW_SUM:g}": furthest <= _ROW_SUM,
    }


def _number(cell: str) -> float:
    """NaN where a cell is no number."""
    try:
        return float(cell)
    except ValueError:
        return math.nan
