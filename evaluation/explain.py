"""Pictures of what a model looked at, for the images that the blend gets wrong the most.

Takes evaluated rows and their image files; gives PNGs: one an image (the image, what speaks for its
label, what speaks for the predicted class), and a contact sheet. The model is a fold model of the
blend's heaviest member: of an OOF row one that did not train on it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from foldrace.core.errors import RunFolderError
from foldrace.core.plugins import naming_plugins
from foldrace.evaluation.activation_maps import activation_maps
from foldrace.evaluation.rows import EvaluatedRows, counting, name_of, require_blend
from foldrace.inference.run_models import FoldModel, RunModels, best_device
from foldrace.reporting.charts.style import png, short
from foldrace.run_folder.allowed import member_run
from foldrace.run_folder.blend_records import MemberRecord
from foldrace.run_folder.store import RunStore
from foldrace.trainables.data.loader import LoaderSettings, to_float
from foldrace.trainables.predict import scoring_loader

_COLOURS = "inferno"
_OPACITY = 0.55
_COLUMNS = 6
_SHEET_MOST = 60
"""Images of the contact sheet; each has a picture of its own."""
_PANEL = 2.6  # inches


@dataclass(frozen=True, eq=False)
class Explained:
    """One image with its maps."""

    row: int
    pixels: NDArray[np.uint8]
    """(H, W, 3) as the model sees it."""
    maps: NDArray[np.float32] | None
    """(2, h, w) for the label and for the predicted class; None where the model has no places."""


def explain(
    store: RunStore, found: EvaluatedRows, files: Sequence[Path], count: int, workers: int
) -> Iterator[tuple[str, bytes]]:
    """Name and PNG of each picture, then those of the contact sheet; the highest loss first.

    `files` are those of the rows. RunFolderError where no member of the blend has models.
    """
    member = _heaviest(store)
    rows = np.argsort(-found.losses, kind="stable")[:count]
    pictures = sorted(
        _explained(store, member, found, files, rows, workers),
        key=lambda one: int(np.flatnonzero(rows == one.row)[0]),
    )
    digits = len(str(len(pictures)))
    for rank, one in enumerate(pictures, 1):
        yield f"{rank:0{digits}d}_{_stem(found.paths[one.row])}.png", _picture(found, one, member)
    yield "contact_sheet.png", _sheet(found, pictures[:_SHEET_MOST])


def _heaviest(store: RunStore) -> MemberRecord:
    """The member with the greatest weight that has models."""
    blend = require_blend(store)
    known = [member for member in counting(blend) if not member.added]
    if not known:
        raise RunFolderError.single(
            f"{store.root}/ensemble/ensemble.json",
            "has only members that were predicted elsewhere: there is no model to explain",
        )
    return known[0]


def _explained(
    store: RunStore,
    member: MemberRecord,
    found: EvaluatedRows,
    files: Sequence[Path],
    rows: NDArray[np.int64],
    workers: int,
) -> Iterator[Explained]:
    """The images, one fold's after the other: its model is opened once."""
    models = RunModels(member_run(store, member.run), best_device())
    fold = found.splits[0][rows] if found.splits else np.zeros(len(rows), dtype=np.int64)
    for one in np.unique(fold).tolist():
        model = models.open(member.candidate, member.variant, one)
        with naming_plugins():
            yield from _of_fold(models, model, found, files, rows[fold == one], workers)


def _of_fold(
    models: RunModels,
    model: FoldModel,
    found: EvaluatedRows,
    files: Sequence[Path],
    rows: NDArray[np.int64],
    workers: int,
) -> Iterator[Explained]:
    source = models.images([files[row] for row in rows], model.model_config, workers, "explain")
    settings = LoaderSettings(workers=0, pin_memory=False, prefetch_factor=4)
    places = np.arange(len(rows))
    loader = scoring_loader(source, places, model.model_config, 1, settings, models.parts)
    for batch in loader:
        row = int(rows[int(batch.rows[0])])
        images = to_float(batch.images.to(models.device))
        classes = (int(found.labels[row]), int(found.predicted[row]))
        maps = activation_maps(
            model.module, model.module.body, images, batch.meta.to(models.device), classes
        )
        yield Explained(row, batch.images[0].numpy().astype(np.uint8), maps)


def _picture(found: EvaluatedRows, one: Explained, member: MemberRecord) -> bytes:
    label, predicted = (
        found.classes[found.labels[one.row]],
        found.classes[found.predicted[one.row]],
    )
    titles = (
        short(PurePosixPath(found.paths[one.row]).name, 26),
        f"label {short(label, 14)}, p {found.true_prob[one.row]:.3f}",
        f"predicted {short(predicted, 12)}, p {found.confidence[one.row]:.3f}",
    )

    def draw(*axes: Axes) -> None:
        for i, (each, title) in enumerate(zip(axes, titles, strict=True)):
            _draw(each, one, i - 1)
            each.set_title(title, fontsize=9)
        axes[1].set_xlabel(f"maps of {short(name_of(member), 40)}", fontsize=7.5)

    return png(draw, height=_PANEL + 0.5, columns=3, width=3 * _PANEL)


def _sheet(found: EvaluatedRows, pictures: Sequence[Explained]) -> bytes:
    """All images, each above what speaks for the predicted class."""
    rows = max(1, -(-len(pictures) // _COLUMNS))

    def draw(*axes: Axes) -> None:
        for each in axes:
            each.set_axis_off()
        for i, one in enumerate(pictures):
            line, column = divmod(i, _COLUMNS)
            above = axes[2 * line * _COLUMNS + column]
            below = axes[(2 * line + 1) * _COLUMNS + column]
            _draw(above, one, -1)
            _draw(below, one, 1)
            label = short(found.classes[found.labels[one.row]], 16)
            said = short(found.classes[found.predicted[one.row]], 16)
            above.set_title(
                f"{label} → {said}\np {found.true_prob[one.row]:.2f} → "
                f"{found.confidence[one.row]:.2f}",
                fontsize=7,
            )

    return png(
        draw, height=rows * 3.3, columns=_COLUMNS, width=1.5 * _COLUMNS, rows=(1.0,) * (2 * rows)
    )


def _draw(axes: Axes, one: Explained, which: int) -> None:
    """The image, and over it one of its maps; -1: none."""
    height, width = one.pixels.shape[:2]
    axes.imshow(one.pixels, interpolation="nearest")
    if which >= 0 and one.maps is not None:
        smooth = cv2.resize(one.maps[which], (width, height), interpolation=cv2.INTER_CUBIC)
        axes.imshow(np.clip(smooth, 0, 1), cmap=_COLOURS, vmin=0, vmax=1, alpha=_OPACITY)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _stem(path: str) -> str:
    """The file's name as part of a picture's: letters, digits, `.`, `-` and `_`."""
    stem = PurePosixPath(path.replace("\\", "/")).stem
    kept = re.sub(r"[^\w.-]+", "_", stem.encode(errors="replace").decode()).strip("._")
    return kept[:60] or "image"
