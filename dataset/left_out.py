"""What of a user's data takes no part, and why: the record, its file, and its lines for people.

Folders, tables and the audit make the records; `left_out.csv` in the run folder keeps them, so that
a resumed run leaves out the same.
"""

from __future__ import annotations

import csv
import io
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Literal

from foldrace.core.errors import Problem, RunFolderError, listing
from foldrace.core.files import Files

NAME = "left_out.csv"
HEADER = ("image_path", "data", "reason", "detail")

UNKNOWN_KIND = "no image of a known kind"
LISTED_TWICE = "listed twice"
UNREADABLE = "missing or unreadable"
_PRIOR = "these rows of the submission are the class frequencies of the training images"
_READERS = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "pillow-heif"),
    ".avif": "'pillow>=11.3'",
}  # suffix -> the package that reads such files


@dataclass(frozen=True)
class LeftOut:
    """One row of `left_out.csv`."""

    image_path: str
    """Path as in folds.csv, or of a file in the folder that was looked through."""
    data: Literal["training", "test"]
    reason: str
    """The same few words for all of one kind: `excluded`, `missing or unreadable`, ..."""
    detail: str = ""
    """What is the matter with this one."""


def unknown_kinds(paths: Iterable[str], data: Literal["training", "test"]) -> tuple[LeftOut, ...]:
    """Records of files that are no image of a known kind."""
    return tuple(LeftOut(path, data, UNKNOWN_KIND) for path in paths)


def left_out_csv(rows: Iterable[LeftOut]) -> bytes:
    """The file's content; where there are no rows, its header alone, which says so.

    With csv, not pandas, which cannot write file names that are not UTF-8.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows(astuple(row) for row in rows)
    return text.getvalue().encode(errors="surrogateescape")


def read_left_out(files: Files) -> tuple[LeftOut, ...]:
    """The run folder's file; () where there is none. RunFolderError where it is damaged."""
    if not files.exists(NAME):
        return ()
    text = files.read(NAME).decode(errors="surrogateescape")
    try:
        rows = list(csv.reader(io.StringIO(text, newline="")))
    except csv.Error:  # a cell of megabytes
        rows = []
    odd = [row for row in rows[1:] if len(row) != len(HEADER) or row[1] not in ("training", "test")]
    if not rows or tuple(rows[0]) != HEADER or odd:
        message = f"is damaged: it should have the columns {','.join(HEADER)}; put a copy back"
        raise RunFolderError.single(f"{files.root}/{NAME}", message)
    return tuple(
        LeftOut(path, "test" if data == "test" else "training", reason, detail)
        for path, data, reason, detail in rows[1:]
    )


def left_out_lines(rows: Sequence[LeftOut]) -> Iterator[Problem]:
    """One line for each reason, with the number and some names."""
    kinds = Counter((row.data, row.reason) for row in rows)
    for (data, reason), count in kinds.items():
        alike = [row for row in rows if (row.data, row.reason) == (data, reason)]
        is_file = reason == UNKNOWN_KIND
        names = _by_suffix(alike) if is_file else listing(map(_named, alike), 5)
        what = f"{count:,} {'file' if is_file else 'image'}{'s' * (count > 1)}"
        if data == "test" and not is_file:
            yield Problem(f"{data} data", f"{what} {reason}: {names}; {_PRIOR}")
        else:
            yield Problem(f"{data} data", f"{what} left out, {reason}: {names}")


def _named(row: LeftOut) -> str:
    return f"{row.image_path} ({row.detail})" if row.detail else row.image_path


def _by_suffix(rows: Iterable[LeftOut]) -> str:
    """'.txt 3, no suffix 2', the most frequent first; with what could read them."""
    counts = Counter(posixpath.splitext(row.image_path)[1].lower() for row in rows)
    shown = listing(f"{suffix or 'no suffix'} {n:,}" for suffix, n in counts.most_common())
    needed = {name for suffix, name in _READERS.items() if counts[suffix]}
    return shown + "".join(f" (`pip install {name}` reads them)" for name in sorted(needed))
