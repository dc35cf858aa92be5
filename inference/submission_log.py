"""The log of a run folder's submissions, and the numbered copies that stay.

Takes the receipt of a submission that was written, gives lines of `submissions/log.csv`; what
people have written into it stays.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from contextlib import suppress

from foldrace.core.files import Files
from foldrace.inference.submission import Receipt, receipt_json, receipt_name

FOLDER = "submissions"
LOG = f"{FOLDER}/log.csv"
_LOG_COLUMNS = (
    *("number", "file", "time", "sha256", "test", "tta", "crossfit_logloss"),
    *("submitted_logloss", "blend", "public_score"),
)


def keep_submission(files: Files, receipt: Receipt) -> str:
    """Copy a run folder's submission under the next number, and log it; gives the copy's name.

    The one that holds the same is given where there is one.
    """
    known = {row["sha256"]: row["file"] for row in _log(files)}
    if receipt.sha256 in known:
        return known[receipt.sha256]
    number = _next_number(files)
    name = f"{FOLDER}/{receipt.file.replace('submission', f'{number:04d}', 1)}"
    files.write(name, files.read(receipt.file))
    files.write(receipt_name(name), receipt_json(receipt))
    log_submission(files, receipt, name, number)
    return name


def keep_edited(files: Files, name: str) -> str | None:
    """Copy a submission that is not as it was written, before another takes its place.

    Gives the copy's name, or None where there is none, or nobody has changed it.
    """
    if not files.exists(name) or not files.exists(receipt_name(name)):
        return None
    data = files.read(name)
    if hashlib.sha256(data).hexdigest() in files.read(receipt_name(name)).decode():
        return None
    copy = f"{FOLDER}/{name.replace('submission', f'{_next_number(files):04d}-edited', 1)}"
    files.write(copy, data)
    return copy


def log_submission(files: Files, receipt: Receipt, name: str, number: int | None = None) -> None:
    """Add a line to the run folder's log; what people have written there stays.

    `number` None: the next one, of a submission that lies elsewhere.
    """
    loss = receipt.submitted_logloss
    submitted = "" if loss is None else f"{loss:.6f}"
    members = (f"{m['candidate']} {m['variant']} {m['weight']:.3g}" for m in receipt.members)
    blend = ", ".join(members)
    notes = ["a part of the blend: loss of its OOF rows"] if receipt.part_of_blend else []
    shift = receipt.prior_shift
    notes += ["prior shift applied"] if shift is not None and shift["applied"] else []
    row = (
        *(
            number or _next_number(files),
            name,
            receipt.created,
            receipt.sha256,
            receipt.test,
            receipt.tta,
        ),
        *(f"{receipt.crossfit_logloss:.6f}", submitted, "; ".join((blend, *notes)), ""),
    )
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    text = files.read(LOG).decode(errors="surrogateescape") if files.exists(LOG) else ""
    if not text:
        writer.writerow(_LOG_COLUMNS)
    elif not text.endswith("\n"):
        text += "\n"
    writer.writerow(row)
    files.write(LOG, (text + buffer.getvalue()).encode(errors="surrogateescape"))


def _log(files: Files) -> list[dict[str, str]]:
    """The log's rows, as far as they can be read: people write into it."""
    text = files.read(LOG).decode(errors="replace") if files.exists(LOG) else ""
    rows = csv.DictReader(io.StringIO(text))
    found: list[dict[str, str]] = []
    with suppress(csv.Error):  # a cell of megabytes
        found += (row for row in rows if row.get("sha256"))
    return found


def _next_number(files: Files) -> int:
    """One more than the greatest number of a copy or in the log."""
    names = (re.match("[0-9]{1,9}", name) for name in files.names(FOLDER))
    copies = [int(match[0]) for match in names if match]
    numbers = (row.get("number") or "" for row in _log(files))
    logged = [int(number) for number in numbers if re.fullmatch("[0-9]{1,9}", number)]
    return max((*copies, *logged), default=0) + 1
