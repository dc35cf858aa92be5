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
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from foldrace.core.errors import RunFailure, UserError
from foldrace.core.files import Files
from foldrace.core.metrics import MetricScore
from foldrace.dataset.submission_form import SubmissionForm
from foldrace.dataset.test_set import ImageSet
from foldrace.ensemble.fold_mean import loss_of_mean
from foldrace.run_folder.blend_records import EnsembleRecord

_ROW_SUM = 1e-6
NUMBERS = "%.9g"
"""How probabilities are written, unless a format is asked for."""
_ROUNDED_SUM = 1e-3
"""How far from 1 a row may be in a format that was asked for: who scores it divides by the sum."""


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
    form: str
    """What the columns hold, in words."""
    created: str
    oof_logloss: float
    crossfit_logloss: float
    """Loss of one fold's models."""
    crossfit_se: float
    submitted_logloss: float | None
    """Loss that the submission, the mean of all folds' models, is expected to have."""
    submitted_se: float | None
    submitted_note: str
    """Why there is none; empty where there is."""
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
    metrics: tuple[MetricScore, ...] = ()
    """Of the blend's OOF probabilities."""
    chosen_metric: MetricScore | None = None
    """The user's own metric, cross-fitted; None where the log loss decided."""
    rule: dict[str, object] | None = None
    """The decision rule that labels are written by; None: the most probable class."""
    without_image: tuple[str, ...] = ()
    """Ids whose image gives no pixels: their rows are the training images' class frequencies."""
    part_of_blend: str = ""
    """Which members it is of, where it is not of the whole blend that was scored."""
    tta_tried: tuple[dict[str, object], ...] = ()
    """Gain, its standard error and time of all views, where `--tta auto` has measured them."""
    prior_shift: dict[str, object] | None = None
    """Estimated class frequencies of the test set, where they differ beyond chance."""
    float_format: str = NUMBERS


@dataclass(frozen=True)
class Manner:
    """How a submission was made and is written, beyond the blend and the views."""

    float_format: str = NUMBERS
    part_of_blend: str = ""
    tta_tried: tuple[dict[str, object], ...] = ()
    prior_shift: dict[str, object] | None = None


PLAIN = Manner()


def check_float_format(text: str) -> None:
    """UserError where it is no format of a number such as %.6f."""
    if re.fullmatch(r"%\.[0-9]{1,2}[efg]", text) is None:
        raise UserError.single(
            "--float-format", f"got {text!r}; allowed: %.Nf, %.Ng or %.Ne, such as %.6f"
        )


def zip_submission(files: Files, name: str) -> str:
    """Write a submission once more, as the only file of a zip beside it; gives the zip's name."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo(name), files.read(name), zipfile.ZIP_DEFLATED)
    files.write(zip_name(name), buffer.getvalue())
    return zip_name(name)


def zip_name(name: str) -> str:
    """The zip of a submission."""
    return f"{name.removesuffix('.csv')}.zip"


def write_submission(
    files: Files,
    name: str,
    test: ImageSet,
    classes: Sequence[str],
    prob: NDArray[np.float64],
    ensemble: EnsembleRecord,
    tta: str = "none",
    without_image: Sequence[str] = (),
    decided: NDArray[np.int64] | None = None,
    log_z: NDArray[np.float64] | None = None,
    manner: Manner = PLAIN,
) -> Receipt:
    """Write `name` and `<name without .csv>.receipt.json` into `files`.

    `prob` is (n, C) in the order of `test` and `classes`; `without_image` are ids; `decided` (n,)
    are the classes that a form of labels gets, None: the most probable; `log_z` is that of the
    other images in `FoldMean`. Raises RunFailure where a check does not pass: nothing is written
    then, so that an earlier submission stays.
    """
    text = submission_csv(test, classes, prob, decided, manner.float_format)
    data = text.encode()
    checks = check_submission(text, test, manner.float_format)
    files.write(name, data)
    if files.read(name) != data:
        files.delete(name)
        raise RunFailure(f"{files.root}/{name} does not hold what was written to it")
    loss, se, note = submitted_loss(ensemble, tta, log_z)
    by_rule = decided is not None and test.form.kind == "labels"
    receipt = Receipt(
        file=name,
        sha256=hashlib.sha256(data).hexdigest(),
        test=test.table or str(test.image_root),
        rows=len(test),
        columns=test.form.header,
        form=str(test.form),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        oof_logloss=ensemble.oof_logloss,
        crossfit_logloss=ensemble.crossfit_logloss,
        crossfit_se=ensemble.crossfit_se,
        submitted_logloss=loss,
        submitted_se=se,
        submitted_note=note,
        metrics=ensemble.metrics,
        chosen_metric=None if ensemble.choice is None else ensemble.choice.score,
        rule=ensemble.rule.model_dump() if by_rule and ensemble.rule is not None else None,
        certificate=ensemble.certificate,
        pooling=ensemble.pooling,
        blend_temperature=ensemble.blend_temperature,
        members=tuple(member.model_dump() for member in ensemble.members),
        unvalidated=tuple(UnvalidatedFile(u.name, u.weight) for u in ensemble.unvalidated),
        folds_hash=ensemble.folds_hash,
        tta=tta,
        checks=checks,
        without_image=tuple(without_image),
        **vars(manner),
    )
    files.write(receipt_name(name), receipt_json(receipt))
    return receipt


def submitted_loss(
    ensemble: EnsembleRecord, tta: str, log_z: NDArray[np.float64] | None
) -> tuple[float | None, float | None, str]:
    """The loss that the mean of all folds' models has, its standard error, and why there is none.

    See `loss_of_mean`: the test images take part without their labels.
    """
    note = ""
    if tta != "none":
        note = f"the training images were scored without the views of --tta {tta}"
    elif ensemble.unvalidated or any(member.added for member in ensemble.members):
        note = "nothing is known of the models behind predictions made elsewhere"
    elif ensemble.k > 1 and (log_z is None or len(log_z) < 2):
        note = "it takes two test images at least"
    if note:
        return None, None, note
    known = np.zeros(1) if log_z is None else log_z
    return *loss_of_mean(ensemble.crossfit_logloss, ensemble.crossfit_se, known), ""


def receipt_name(name: str) -> str:
    """The file of a submission's receipt."""
    return f"{name.removesuffix('.csv')}.receipt.json"


def receipt_json(receipt: Receipt) -> bytes:
    """The text of a receipt's file."""
    return json.dumps(asdict(receipt), indent=1, ensure_ascii=False).encode()


def submission_csv(
    test: ImageSet,
    classes: Sequence[str],
    prob: NDArray[np.float64],
    decided: NDArray[np.int64] | None = None,
    float_format: str = NUMBERS,
) -> str:
    """Text in the test set's form, numbers with 9 significant digits unless said otherwise.

    Labels: the classes `decided` (n,), or the most probable class, the first of equal ones.
    """
    form = test.form
    index = {name: i for i, name in enumerate(classes)}
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=form.delimiter, lineterminator="\n")
    writer.writerow(form.header)
    cells = _values(form, index, prob, decided, float_format)
    for frame, values in zip(_frames(test), cells, strict=True):
        writer.writerow([*frame[: form.value_at], *values, *frame[form.value_at :]])
    return buffer.getvalue()


def _frames(test: ImageSet) -> Sequence[tuple[str, ...]]:
    """The cells of each row that are not predicted."""
    return test.form.frames or [(name,) for name in test.ids]


def _values(
    form: SubmissionForm,
    index: Mapping[str, int],
    prob: NDArray[np.float64],
    decided: NDArray[np.int64] | None,
    float_format: str,
) -> Iterator[list[str]]:
    """The predicted cells of each row."""
    if form.kind == "labels" and decided is not None:
        names = {place: name for name, place in index.items()}
        yield from ([names[place]] for place in decided.tolist())
    elif form.kind == "long":
        yield from ([float_format % prob[image, index[name]]] for image, name in form.long_rows)
    elif form.kind == "probability_of":
        yield from ([float_format % p] for p in prob[:, index[form.of or ""]])
    else:
        order = [index[name] for name in form.class_columns]
        for row in prob[:, order]:
            labels = form.kind == "labels"
            yield [form.class_columns[row.argmax()]] if labels else [float_format % p for p in row]


def check_submission(text: str, test: ImageSet, float_format: str = NUMBERS) -> tuple[str, ...]:
    """Read a submission; the checks that passed, or RunFailure with those that did not."""
    form = test.form
    header, *rows = list(csv.reader(io.StringIO(text), delimiter=form.delimiter)) or [[]]
    end = len(form.header) - (len(_frames(test)[0]) - form.value_at if len(test) else 0)
    frames = [(*row[: form.value_at], *row[end:]) for row in rows]
    results = {
        "columns equal the sample's, in its order": header == list(form.header),
        "every row has one cell per column": all(len(row) == len(header) for row in rows),
        "ids equal the sample's, in its order": frames == list(_frames(test)),
    }
    cells = [row[form.value_at : end] for row in rows]
    row_sum = _ROW_SUM if float_format == NUMBERS else _ROUNDED_SUM
    labels = form.kind == "labels"
    results |= _label_checks(cells, form) if labels else _number_checks(cells, form, row_sum)
    failed = [check for check, passed in results.items() if not passed]
    if failed:
        raise RunFailure(f"the submission is not valid: failed checks: {'; '.join(failed)}")
    return tuple(results)


def _label_checks(cells: list[list[str]], form: SubmissionForm) -> dict[str, bool]:
    known = set(form.class_columns)
    return {"every label is a class": all(cell in known for row in cells for cell in row)}


def _number_checks(cells: list[list[str]], form: SubmissionForm, row_sum: float) -> dict[str, bool]:
    values = [[_number(cell) for cell in row] for row in cells]
    numbers = np.array([number for row in values for number in row])
    results = {
        "no value is missing or not finite": bool(np.isfinite(numbers).all()),
        "every value lies in [0, 1]": bool(((numbers >= 0) & (numbers <= 1)).all()),
    }
    if form.kind == "probability_of":
        return results
    sums = [sum(row) for row in values]
    if form.kind == "long":
        totals = np.zeros(max((image for image, _ in form.long_rows), default=-1) + 1)
        for (image, _), total in zip(form.long_rows, sums, strict=False):
            totals[image] += total
        sums = totals.tolist()
    furthest = max((abs(total - 1) for total in sums), default=0.0)
    return results | {f"every row sums to 1 within {row_sum:g}": furthest <= row_sum}


def _number(cell: str) -> float:
    """NaN where a cell is no number."""
    try:
        return float(cell)
    except ValueError:
        return math.nan
