"""`predict`: class, confidence and probabilities of any images, by a run's blend.

Takes a run folder and images, folders or a CSV of paths; gives a CSV.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from foldrace.console.machine import cores, refuse_existing, write_out
from foldrace.console.terminal import Terminal, visible
from foldrace.core.errors import Problem, RunFailure, UserError
from foldrace.dataset.archive import unpack
from foldrace.dataset.guess_columns import named_images
from foldrace.dataset.image_paths import find_paths, on_disk
from foldrace.dataset.images import ImageError, find_files, read_rgb
from foldrace.dataset.left_out import left_out_lines, unknown_kinds
from foldrace.dataset.tables import read_table
from foldrace.inference.predictor import Predictor
from foldrace.run_folder.allowed import open_allowed
from foldrace.run_folder.store import RunStore


def predict(
    root: str,
    paths: Sequence[Path],
    table: Path | None,
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
    files = [*_expand(paths, screen), *(_listed(table) if table else ())]
    if not files:
        raise UserError.single("predict", "no images given; allowed: image files, folders, --csv F")
    most = store.config().data.max_pixels
    errors = {file: str(e) for file in files if (e := _image_error(file, most)) is not None}
    good = [file for file in files if file not in errors]
    by_file = _predicted(store, good) if good else {}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    classes = store.classes()
    writer.writerow(["image_path", "class", "confidence", *classes, "error"])
    for file in files:
        found = by_file.get(file)
        if found is None:
            writer.writerow([file, "ERROR", "", *[""] * len(classes), errors[file]])
        else:
            row, best = found
            numbers = [f"{p:.6g}" for p in (row[best], *row)]
            writer.writerow([file, classes[best], *numbers, ""])
    if out is None:
        shown = text.getvalue()
        console.file.write(visible(shown, also="\n") if console.is_terminal else shown)
    else:
        write_out(out, text.getvalue().encode(errors="surrogateescape"))
        console.print(f"{out}: {len(good)} images predicted, {len(errors)} unreadable")
    if not good:
        raise RunFailure("none of the images could be read")


def _predicted(
    store: RunStore, files: Sequence[Path]
) -> dict[Path, tuple[NDArray[np.float64], int]]:
    """Image -> its probabilities (C,), and the class that the blend decides for."""
    predictor = Predictor(store, cores())
    prob = predictor.probabilities(files)
    return dict(zip(files, zip(prob, predictor.decide(prob).tolist(), strict=True), strict=True))


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


def _listed(path: Path) -> list[Path]:
    """Images of a table's column, by default `image_path`; paths are relative to the table."""
    problems: list[Problem] = []
    table = read_table(path, str(path), problems)
    if table is None:
        raise UserError(problems)
    column, _ = named_images(table, "image_path", path.parent, "test")
    written = table.paths(column, "its header to image_path", problems)
    files = find_paths(table, written, path.parent, "test", problems)
    if problems:
        raise UserError(problems)
    return [on_disk(files.root, name) for name in files.paths]


def _image_error(file: Path, max_pixels: int) -> ImageError | None:
    try:
        read_rgb(file, max_pixels=max_pixels)
    except ImageError as error:
        return error
    return None
