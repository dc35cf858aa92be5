"""Small competitions in the forms that the recipes' data have: drawn images that can be told apart.

Takes a folder, writes train, test and sample_submission.csv into it.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]  # (H, W, 3) RGB
TEST = 11  # images


def cars(folder: Path, classes: int, photos: int) -> None:
    """A folder per class, its photos wide or narrow; test.csv with ID and img_path."""
    rng = np.random.default_rng(1)
    names = [f"K{i // 7}_세대 {i:03d}_2019" for i in range(classes)]
    for label, name in enumerate(names):
        for i in range(photos):
            _save(folder / "train" / name / f"{label:03d}_{i}.jpg", _car(label, rng))
    tests = [(f"TEST_{i:05d}", f"./test/TEST_{i:05d}.jpg") for i in range(TEST)]
    for i, (_, path) in enumerate(tests):
        _save(folder / path, _car(i, rng))
    _write(folder / "test.csv", ["ID", "img_path"], tests)
    _write_sample(folder, "ID", [id_ for id_, _ in tests], names)


def sketches(folder: Path) -> None:
    """A CSV with a column too many and numbers as classes; PNG line drawings on white."""
    rng = np.random.default_rng(2)
    rows = [(f"n{i % 3:08d}", f"train/n{i % 3:08d}/sketch_{i}.png", i % 3) for i in range(24)]
    for _, path, label in rows:
        _save(folder / path, _sketch(label, rng))
    _write(folder / "train.csv", ["class_name", "image_path", "target"], rows)
    tests = [(str(i), f"test/{i}.png") for i in range(TEST)]
    for i, (_, path) in enumerate(tests):
        _save(folder / path, _sketch(i % 3, rng))
    _write(folder / "test.csv", ["ID", "image_path"], tests)
    _write_sample(folder, "ID", [id_ for id_, _ in tests], ["0", "1", "2"])


def sketch_folders(folder: Path) -> None:
    """A folder per class and a folder of test images, as ImageNet-Sketch has them."""
    rng = np.random.default_rng(3)
    names = ["n01440764", "n01443537", "n01484850"]
    for label, name in enumerate(names):
        for i in range(6):
            _save(folder / "train" / name / f"sketch_{i}.JPEG", _sketch(label, rng))
    for i in range(TEST):
        _save(folder / "test" / f"sketch {i}.png", _sketch(i % 3, rng))
    _write_sample(folder, "id", [f"sketch {i}" for i in range(TEST)], names)


def image_types(folder: Path) -> None:
    """A CSV of imbalanced classes: photos, line drawings and, rarely, charts."""
    rng = np.random.default_rng(4)
    draw = {"photo": lambda: _car(0, rng), "drawing": lambda: _sketch(1, rng), "chart": _chart(rng)}
    kinds = ["photo"] * 32 + ["drawing"] * 16 + ["chart"] * 8
    rows = [(f"images/{i}.png", kind) for i, kind in enumerate(kinds)]
    for path, kind in rows:
        _save(folder / path, draw[kind]())
    _write(folder / "train.csv", ["image_path", "target"], rows)
    tests = [(f"t{i}", f"images/t{i}.png") for i in range(TEST)]
    for i, (_, path) in enumerate(tests):
        _save(folder / path, draw[list(draw)[i % 3]]())
    _write(folder / "test.csv", ["id", "image_path"], tests)
    _write_sample(folder, "id", [id_ for id_, _ in tests], list(draw))


def _car(label: int, rng: np.random.Generator) -> Image:
    """A body and two wheels before a sky; body's colour and roof by class, aspect ratio drawn."""
    width, height = int(rng.integers(48, 80)), int(rng.integers(36, 56))
    image = np.full((height, width, 3), rng.integers(150, 220), np.uint8)
    colour = [int(40 + 53 * (label // 5**i % 5)) for i in range(3)]
    x, y = int(width * rng.uniform(0.1, 0.2)), int(height * rng.uniform(0.4, 0.5))
    cv2.rectangle(image, (x, y), (width - x, y + height // 4), colour, -1)
    cv2.rectangle(image, (2 * x, y - 4 - label % 9), (width - 2 * x, y), colour, -1)
    for wheel in (2 * x, width - 2 * x):
        cv2.circle(image, (wheel, y + height // 4), 4, (20, 20, 20), -1)
    return image


def _sketch(label: int, rng: np.random.Generator) -> Image:
    """A circle, a triangle or a house in thin lines on white."""
    image = np.full((64, 64, 3), 255, np.uint8)
    x, y, r = (int(v) for v in rng.integers([22, 22, 10], [42, 42, 22]))
    if label == 0:
        cv2.circle(image, (x, y), r, (0, 0, 0), 2)
    else:
        points = np.array([(x - r, y + r), (x, y - r), (x + r, y + r)])
        cv2.polylines(image, [points], True, (0, 0, 0), 2)
    if label == 2:
        cv2.rectangle(image, (x - r, y), (x + r, y + r), (0, 0, 0), 2)
    return image


def _chart(rng: np.random.Generator) -> Callable[[], Image]:
    """Bars on white, one colour."""

    def draw() -> Image:
        image = np.full((48, 72, 3), 255, np.uint8)
        colour = rng.integers(0, 200, 3).tolist()
        for i, top in enumerate(rng.integers(5, 40, size=6)):
            cv2.rectangle(image, (4 + 11 * i, int(top)), (11 + 11 * i, 46), colour, -1)
        return image

    return draw


def _save(path: Path, image: Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = ".png" if path.suffix == ".png" else ".jpg"
    _, data = cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    path.write_bytes(data.tobytes())


def _write(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def _write_sample(folder: Path, id_column: str, ids: Sequence[str], classes: Sequence[str]) -> None:
    """Ids and columns in an order of their own."""
    rng = np.random.default_rng(9)
    columns = [classes[i] for i in rng.permutation(len(classes))]
    rows = [[ids[i], *[1 / len(classes)] * len(classes)] for i in rng.permutation(len(ids))]
    _write(folder / "sample_submission.csv", [id_column, *columns], rows)
