"""`predict`: class, confidence and probabilities of any images, by a run's blend.

Takes a run folder and images, folders, zips or a table of paths; gives a CSV.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from foldrace.console.machine import cores, refuse_existing, write_out
from foldrace.console.terminal import Terminal, visible
from foldrace.core.errors import Problem, RunFailure, UserError
from foldrace.dataset.archive import unpack
from foldrace.dataset.guess_columns import named_images
from foldrace.dataset.image_paths import find_paths, on_disk
from foldrace.dataset.images import find_files
from foldrace.dataset.left_out import left_out_lines, unknown_kinds
from foldrace.dataset.tables import read_table
from foldrace.inference.predictions import Prediction, count_line
from foldrace.inference.predictor import Predictor
from foldrace.run_folder.allowed import open_allowed


@dataclass(frozen=True)
class Asked:
    """The images of one call, and what is asked about them."""

    paths: Sequence[Path] = ()
    """Images, folders, zips."""
    table: Path | None = None
    column: str | None = None
    """Column of paths in `table`; None: `image_path`, or the one whose cells lead to images."""
    top_k: int | None = None
    """How many of the likeliest classes are written; None: the probabilities of all."""
    tta: str = "none"
    max_memory: str | None = None


def predict(
    root: str,
    asked: Asked,
    out: Path | None,
    console: Console,
    trust_plugins: bool = False,
    runs: Sequence[str] = (),
) -> None:
    """Write one CSV row per image to `out` or the terminal; `ERROR` for an unreadable image.

    `trust_plugins` and `runs`: see `open_allowed`. Raises UserError without images or where `out`
    exists, RunFailure where none could be read.
    """
    store = open_allowed(root, trust_plugins, runs)
    if out is not None:
        refuse_existing(out)
    screen = Terminal(stderr=True) if out is None else console  # the table goes to the terminal
    classes = store.classes()
    files = _files(asked, len(classes), screen)
    predictor = Predictor(store, cores(), asked.tta, max_memory=asked.max_memory)
    started = time.monotonic()
    with screen.status(f"Predicting {len(files)} images"):
        found = predictor.predict(files, asked.top_k or 1)
    text = _csv(files, found, classes, asked.top_k)
    if out is None:
        console.file.write(visible(text, also="\n") if console.is_terminal else text)
    else:
        write_out(out, text.encode(errors="surrogateescape"))
    where = "" if out is None else f"{out}: "
    screen.print(f"{where}{count_line(found, time.monotonic() - started)}")
    if all(one.error for one in found):
        raise RunFailure("none of the images could be read")


def _files(asked: Asked, classes: int, screen: Console) -> list[Path]:
    """All images that are asked for; UserError with what is wrong with the question."""
    problems = []
    if asked.column is not None and asked.table is None:
        problems.append(Problem("--column", "is of a table; name that too: --csv F"))
    if asked.top_k is not None and asked.top_k > classes:
        message = f"got {asked.top_k}; allowed: 1 to {classes}, the number of classes"
        problems.append(Problem("--top-k", message))
    if problems:
        raise UserError(problems)
    files = [*_expand(asked.paths, screen)]
    if asked.table is not None:
        files += _listed(asked.table, asked.column)
    if not files:
        raise UserError.single("predict", "no images given; allowed: image files, folders, --csv F")
    return files


def _csv(
    files: Sequence[Path], found: Sequence[Prediction], classes: Sequence[str], top_k: int | None
) -> str:
    """The probabilities of all classes, or the next likeliest ones with theirs."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    places = range(2, (top_k or 1) + 1)
    more = [name for i in places for name in (f"class_{i}", f"confidence_{i}")]
    columns = classes if top_k is None else more
    writer.writerow(["image_path", "class", "confidence", *columns, "error"])
    for file, one in zip(files, found, strict=True):
        cells = [""] * (1 + len(columns)) if one.error else _cells(one, top_k)
        writer.writerow([file, one.label, *cells, one.error])
    return text.getvalue()


def _cells(one: Prediction, top_k: int | None) -> list[str]:
    """Confidence, then what `columns` has."""
    assert one.confidence is not None and one.probabilities is not None
    if top_k is None:
        return [f"{p:.6g}" for p in (one.confidence, *one.probabilities)]
    # A decision rule's class need not be the likeliest one.
    others = [(name, p) for name, p in one.top_k if name != one.label][: top_k - 1]
    return [f"{one.confidence:.6g}", *(c for name, p in others for c in (name, f"{p:.6g}"))]


def _expand(paths: Sequence[Path], screen: Console) -> Iterator[Path]:
    for path in paths:
        folder = unpack(path) if path.suffix.lower() == ".zip" and path.is_file() else path
        if folder.is_dir():
            found = find_files(folder)
            yield from (folder / name for name in found.images)
            for line in left_out_lines(unknown_kinds(found.others, "test")):
                screen.print(f"warning {Problem(str(path), line.message)}")
        else:
            yield path


def _listed(path: Path, given: str | None) -> list[Path]:
    """Images of a table's column; paths are relative to the table."""
    problems: list[Problem] = []
    table = read_table(path, str(path), problems)
    if table is None:
        raise UserError(problems)
    column = given or named_images(table, "image_path", path.parent, "test")[0]
    written = table.paths(column, "--column, or its header to image_path", problems)
    files = find_paths(table, written, path.parent, "test", problems)
    if problems:
        raise UserError(problems)
    return [on_disk(files.root, name) for name in files.paths]
