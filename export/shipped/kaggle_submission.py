"""The submission of a hidden test set, in the form of its own sample: what the notebook calls.

Takes the folder of all inputs, gives submission.csv. Lies beside `predict.py`, and needs what that
needs.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

IMAGES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".jp2"))
Row = list[str]
Table = list[Row]


def find_blend(inputs: Path) -> Path:
    """The folder of the exported blend, at most four folders deep."""
    for depth in range(5):
        for found in sorted(inputs.glob("*/" * depth + "submission_form.json")):
            return found.parent
    raise FileNotFoundError(f"{inputs} has no exported blend: attach its data set to the notebook")


def write_submission(inputs: Path, blend: Any, out: Path) -> str:
    """Predict each image of the sample below `inputs`; gives a line that says what was done."""
    own = find_blend(inputs)
    form = json.loads((own / "submission_form.json").read_text(encoding="utf-8"))
    sample = _find(inputs, own, form["sample"])
    header, *rows = _read(sample, form["delimiter"])
    names = list(dict.fromkeys(_image_of(row, form) for row in rows))
    files = _files(sample.parent, own, names, _paths_of_table(sample.parent, form))
    predicted = blend([files[name] for name in names])
    frequencies = form["class_frequencies"]
    bad = [each for each in predicted if each.probabilities is None]
    found = {
        name: (each.label, _own_classes(_probabilities(each, blend, frequencies), form["merged"]))
        for name, each in zip(names, predicted, strict=True)
    }
    for row in rows:
        _fill(row, form, *found[_image_of(row, form)])
    with out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=form["delimiter"], lineterminator="\n")
        writer.writerows([header, *rows])
    lines = [f"{out}: {len(rows):,} rows, {len(names):,} images, {len(bad):,} unreadable"]
    return "\n".join([*lines, *(f"{each.path}: {each.error}" for each in bad[:20])])


def _find(inputs: Path, own: Path, name: str) -> Path:
    found = [path for path in sorted(inputs.rglob(name)) if own not in path.parents]
    if not found:
        raise FileNotFoundError(f"{inputs} has no {name}: attach the competition to the notebook")
    return found[0]


def _read(path: Path, delimiter: str) -> Table:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return [row for row in csv.reader(file, delimiter=delimiter) if row]


def _paths_of_table(root: Path, form: Mapping[str, Any]) -> dict[str, str]:
    """Id -> path, by the table of the test set where the run had one."""
    table = form["test_table"]
    if not table or not (root / table).is_file():
        return {}
    header, *rows = _read(root / table, ",")
    columns = [name.strip() for name in header]
    if form["id_column"] not in columns or form["image_column"] not in columns:
        return {}
    at, path_at = columns.index(form["id_column"]), columns.index(form["image_column"])
    return {row[at].strip(): row[path_at].strip() for row in rows}


def _files(
    root: Path, own: Path, names: Sequence[str], paths: Mapping[str, str]
) -> dict[str, Path]:
    """The image of each id: by the end of its path; of several in a folder with `test` in it."""
    by_stem: dict[str, list[Path]] = {}
    for path in root.rglob("*"):
        if path.suffix.lower() in IMAGES and own not in path.parents:
            by_stem.setdefault(path.stem, []).append(path)
    found = {}
    for name in names:
        wanted = Path(paths.get(name, name).replace("\\", "/"))
        stem = wanted.stem if wanted.suffix.lower() in IMAGES else wanted.name
        known = by_stem.get(stem) or by_stem.get(stem.zfill(5)) or []
        found[name] = max(known, key=lambda path: _likeness(path, wanted), default=root / wanted)
    return found


def _likeness(path: Path, wanted: Path) -> tuple[int, bool, bool]:
    """How many folders from the end agree; whether it is of the test set."""
    ends = zip(reversed(path.parts[:-1]), reversed(wanted.parts[:-1]), strict=False)
    alike = sum(a == b for a, b in ends)
    return alike, path.name == wanted.name, any("test" in p.lower() for p in path.parts[:-1])


def _probabilities(each: Any, blend: Any, frequencies: Mapping[str, float]) -> dict[str, float]:
    """Class -> probability; of an unreadable image the training images' frequencies."""
    if each.probabilities is None:
        return dict(frequencies)
    return dict(zip(blend.classes, map(float, each.probabilities), strict=True))


def _own_classes(
    prob: Mapping[str, float], merged: Mapping[str, Mapping[str, int]]
) -> dict[str, float]:
    """A merged class's probability is divided as its training images were."""
    return dict(_divided(prob, merged))


def _divided(
    prob: Mapping[str, float], merged: Mapping[str, Mapping[str, int]]
) -> Iterator[tuple[str, float]]:
    for name, value in prob.items():
        owns = merged.get(name, {name: 1})
        yield from ((own, value * count / sum(owns.values())) for own, count in owns.items())


def _image_of(row: Row, form: Mapping[str, Any]) -> str:
    name: str = row[form["id_at"]].strip()
    if form["kind"] == "long" and form["class_at"] is None:
        return name[: -len(_class_of(row, form)) - 1]
    return name


def _class_of(row: Row, form: Mapping[str, Any]) -> str:
    """The class that a row of the long form is about."""
    at = form["id_at"] if form["class_at"] is None else form["class_at"]
    name: str = row[at].strip()
    if form["class_at"] is not None:
        return name
    known = set(form["class_columns"])
    ends = (name[mark.end() :] for mark in re.finditer(r"[_\-.:|/]", name))
    return next(end for end in ends if end in known)


def _fill(row: list[str], form: Mapping[str, Any], label: str, prob: Mapping[str, float]) -> None:
    """Write the cells that are predicted."""
    at = form["value_at"]
    if form["kind"] == "probabilities":
        row[at:] = [f"{prob[name]:.9g}" for name in form["class_columns"]]
    elif form["kind"] == "long":
        row[at] = f"{prob[_class_of(row, form)]:.9g}"
    elif form["kind"] == "probability_of":
        row[at] = f"{prob[form['of']]:.9g}"
    else:
        row[at] = label if label in prob else max(prob, key=lambda name: prob[name])
