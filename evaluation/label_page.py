"""One page to review labels by: keep, relabel or drop by keyboard, and the tables that come of it.

Takes a `LabelReview` and the images, gives an HTML document that loads nothing: thumbnails lie in
it, bounded in number and size. What it lets download is what `data.fixes` and `data.exclude` read,
with the changes that the run's own lists have made.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from foldrace.config.schema import DataConfig
from foldrace.core.progress import tell
from foldrace.dataset.curation import Merged
from foldrace.dataset.images import ImageError, read_rgb
from foldrace.dataset.left_out import read_left_out
from foldrace.dataset.manifest import Manifest, read_manifest
from foldrace.evaluation.label_review import LabelReview
from foldrace.evaluation.tables import votes_text
from foldrace.run_folder.store import RunStore

THUMB = 160
"""Longer side of a thumbnail, in pixels."""
_QUALITY = 80
_MOST_BYTES = 60_000_000
"""Thumbnails of a page together; the rest of the rows is in labels.csv."""
_CLASSES_SHOWN = 6


@dataclass(frozen=True)
class Guess:
    """A class with its probability and the members that say it."""

    name: str
    prob: float
    votes: int


@dataclass(frozen=True)
class Item:
    """One image of the page."""

    path: str
    label: str
    suggested: str
    guesses: tuple[Guess, ...]
    votes: str
    reason: str
    """Why it is on the page."""
    thumb: str
    """A data URI; empty where the image cannot be read."""
    twin: str = ""
    """The thumbnail of the nearly equal image with another label."""


@dataclass(frozen=True)
class EarlierChanges:
    """What the run's own `data.fixes` and `data.exclude` have changed: new tables replace them."""

    fixes: tuple[tuple[str, str], ...] = ()
    """Path and label."""
    dropped: tuple[str, ...] = ()


def earlier_changes(store: RunStore) -> EarlierChanges:
    """The run's changes, found by reading the data with its lists and without them."""
    data = store.config().data
    if data.fixes is None and data.exclude is None:
        return EarlierChanges()
    plain: dict[str, object] = {
        "exclude": None,
        "merge_classes": {},
        "max_per_class": None,
    }
    after = _labels(data.model_copy(update=plain))
    before = _labels(data.model_copy(update=plain | {"fixes": None}))
    dropped = (one.image_path for one in read_left_out(store.files) if one.reason == "excluded")
    fixes = ((path, label) for path, label in after.items() if before.get(path) != label)
    return EarlierChanges(tuple(fixes), tuple(dropped))


def _labels(data: DataConfig) -> dict[str, str]:
    found = read_manifest(data)
    names = (found.classes[label] for label in found.labels)
    return dict(zip(found.image_paths, names, strict=True))


def label_page(
    review: LabelReview, data: Manifest, store: RunStore, most: int, workers: int
) -> tuple[str, int]:
    """The document, and how many of the suspected rows and pairs it has."""
    items = _items(review, data, most, workers)
    script = _source("labels.js")
    own, merged = store.own_classes(), store.merged()
    content = {
        "items": [asdict(item) for item in items],
        "classes": list(own),
        "fixed": {name: _own_class(name, merged) for name in review.found.classes},
        "columns": list(_label_columns(store.config().data)),
        "earlier": asdict(earlier_changes(store)),
    }
    total = len(review.suspects) + len(review.conflicts)
    document = (
        _templates()
        .get_template("labels.html.j2")
        .render(
            name=store.config().name,
            shown=len(items),
            total=total,
            review=review,
            style=Markup(_source("labels.css")),
            script=Markup(script),
            digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            content=Markup(_json(content)),
        )
    )
    return document, len(items)


def _own_class(name: str, merged: Merged) -> str:
    """The class as the training data write it: of a merged one its most frequent part."""
    owns = merged.get(name, {name: 1})
    return max(owns, key=lambda own: owns[own])


def _label_columns(data: DataConfig) -> tuple[str, ...]:
    """The columns that `data.fixes` needs beside the path: one a class where labels are one-hot."""
    return (data.label_column,) if isinstance(data.label_column, str) else data.label_column


def _json(content: object) -> str:
    """JSON in which no HTML parser sees an end: `<` is escaped, as is all that is not ASCII."""
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")


def _items(review: LabelReview, data: Manifest, most: int, workers: int) -> list[Item]:
    """Conflicting pairs first, since of each pair one label is wrong; then suspects."""
    row_of = {path: row for row, path in enumerate(data.image_paths)}
    plans = list(_plans(review))[:most]
    items: list[Item] = []
    size = 0
    with ThreadPoolExecutor(max(1, workers)) as pool:
        paths = (path for item in plans for path in (item.path, item.twin))
        thumbs = pool.map(lambda path: _thumb(data, row_of.get(path)), paths)
        for item, thumb, twin in zip(plans, thumbs, thumbs, strict=True):
            size += len(thumb) + len(twin)
            if size > _MOST_BYTES:
                break
            items.append(
                Item(item.path, item.label, item.suggested, item.guesses, item.votes, item.reason,
                     thumb, twin)
            )  # fmt: skip
            tell("drawing thumbnails", len(items), len(plans))
    return items


def _plans(review: LabelReview) -> Iterator[Item]:
    """The items without pictures; `twin` is a path."""
    found = review.found
    row_of = {path: row for row, path in enumerate(found.paths)}
    seen = set()
    for pair in review.conflicts:
        sides = ((pair.image, pair.label, pair.other), (pair.other, pair.other_label, pair.image))
        for path, label, twin in sides:
            other = pair.other_label if path == pair.image else pair.label
            row = row_of.get(path)
            seen.add(path)
            same = "identical" if pair.kind == "identical" else "nearly equal"
            reason = f"{same} to {twin}, which has the label {other}"
            guesses = () if row is None else _guesses(review, row)
            votes = "" if row is None else votes_text(found, row)
            suggested = other if row is None else _likelier(review, row, label, other)
            yield Item(path, label, suggested, guesses, votes, reason, "", twin)
    for suspect in review.suspects:
        path = found.paths[suspect.row]
        if path not in seen:
            yield Item(
                path, suspect.label, suspect.suggested, _guesses(review, suspect.row),
                votes_text(found, suspect.row), "its label is probably wrong", "",
            )  # fmt: skip


def _likelier(review: LabelReview, row: int, label: str, other: str) -> str:
    """The label of two that the blend holds for more probable."""
    prob, classes = review.found.prob[row], review.found.classes
    return label if prob[classes.index(label)] >= prob[classes.index(other)] else other


def _guesses(review: LabelReview, row: int) -> tuple[Guess, ...]:
    """The most probable classes."""
    found = review.found
    order = np.argsort(-found.prob[row], kind="stable")[:_CLASSES_SHOWN]
    return tuple(
        Guess(found.classes[c], round(float(found.prob[row, c]), 4), int(found.votes[row, c]))
        for c in order
    )


def _thumb(data: Manifest, row: int | None) -> str:
    """A small JPEG as a data URI; empty where there is no image."""
    if row is None:
        return ""
    try:
        image = read_rgb(data.file(row), shorter_side=THUMB)
    except ImageError:
        return ""
    image.thumbnail((THUMB, THUMB))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@lru_cache(maxsize=1)
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("foldrace.evaluation", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _source(name: str) -> str:
    environment = _templates()
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]
