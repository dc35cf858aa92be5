"""`labels`: which labels look wrong, as tables and as a page to keep, relabel or drop by keyboard.

Takes a run folder and its training images; gives a folder `labels/run_<time>_<id>/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from foldrace.commands.moved_data import DataOptions, use_data
from foldrace.console.machine import cores
from foldrace.evaluation.folder import LABELS, EvaluationFiles, target, write
from foldrace.evaluation.label_page import label_page
from foldrace.evaluation.label_review import (
    LabelReview,
    alike_csv,
    conflicts_csv,
    labels_csv,
    review_labels,
)
from foldrace.evaluation.rows import oof_rows, require_blend
from foldrace.reporting.formats import counted, number, percent
from foldrace.run_folder.allowed import open_allowed
from foldrace.run_folder.belonging import training_data

PAGE = "labels.html"
_NAMED = 5


def labels(
    root: str,
    out: Path | None,
    most: int,
    console: Console,
    places: DataOptions,
    trust_plugins: bool = False,
    runs: Sequence[str] = (),
) -> str:
    """Write the review and print what it found; gives the folder.

    At most `most` images stand on the page. `trust_plugins` and `runs`: see `open_allowed`;
    `places`: where the training images lie now. RunFolderError without a blend, or where the images
    are not those of the run.
    """
    started = datetime.now(UTC)
    store = open_allowed(root, trust_plugins, runs)
    use_data(store, places)
    where = target(store, out, started, LABELS)
    blend, found, data = require_blend(store), oof_rows(store), training_data(store)
    review = review_labels(found, data, cores())
    document, shown = label_page(review, data, store, most, cores())
    files = EvaluationFiles()
    files.add("labels.csv", labels_csv(review))
    files.add("conflicts.csv", conflicts_csv(review))
    files.add("alike_classes.csv", alike_csv(review))
    files.add(PAGE, document)
    files.about["labels"] = {
        "rows": len(found),
        "suspects": len(review.suspects),
        "conflicting_pairs": len(review.conflicts),
        "alike_classes": len(review.alike),
        "wrong_share": review.ceiling.wrong_share,
        "wrong_share_se": review.ceiling.se,
        "off_diagonal_share": review.noise.off_diagonal,
        "ceiling_accuracy": review.ceiling.accuracy,
        "on_page": shown,
    }
    folder = write(store, blend, files, where, started)
    _print(review, console)
    console.print(f"Page: {folder}/{PAGE} ({counted(shown, 'image')})")
    return folder


def _print(review: LabelReview, console: Console) -> None:
    n, suspects = len(review.found), review.suspects
    console.print(f"{counted(len(suspects), 'label')} of {n:,} look wrong")
    for one in suspects[:_NAMED]:
        console.print(
            f"  {review.found.paths[one.row]}: {one.label}, rather {one.suggested} "
            f"({number(one.p_label)} against {number(one.p_suggested)}, "
            f"{one.votes_suggested} of {counted(len(review.found.members), 'member')})"
        )
    if review.conflicts:
        pairs = counted(len(review.conflicts), "pair")
        console.print(f"{pairs} of nearly equal images with different labels")
    for pair in review.alike[:_NAMED]:
        console.print(
            f"{pair.first} and {pair.second} look alike: {percent(pair.share)} of the smaller class"
        )
    ceiling = review.ceiling
    se = "" if ceiling.se is None else f" ± {number(ceiling.se, 3)}"
    least = "at least " if ceiling.is_bound else ""
    console.print(
        f"{percent(ceiling.wrong_share)} of the labels are suspected: if they are wrong, a model "
        f"without any mistake would have an accuracy of {least}{number(ceiling.accuracy, 3)}{se}"
    )
    if ceiling.is_bound:
        console.print(
            f"warning the models are right on {percent(ceiling.model_accuracy)} of the rows only: "
            "many suspected labels will be right"
        )
