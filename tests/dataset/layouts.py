"""Data sets as competitions and tools hand them out, each a few tiny images large.

`LAYOUTS` has for each a writer and the keys that name its paths, no others.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

ROWS, TESTS = 30, 4


@dataclass(frozen=True)
class Layout:
    """One way of handing out data."""

    write: Callable[[Path], None]
    """Writes it into an empty folder."""
    paths: dict[str, str]
    """Keys of `data` that name its files, relative to the folder."""
    classes: tuple[str, ...]
    form: str
    """Beginning of the line that says what is submitted."""
    images: int = ROWS
    tests: int = TESTS


def picture(path: Path) -> None:
    """A small image with content of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(path.as_posix().encode()) * 1000 + len(path.name)
    pixels = np.random.default_rng([seed, *path.name.encode()]).integers(0, 256, (12, 14, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def _one_hot(row: int, count: int, cell: Callable[[bool], object] = int) -> list[object]:
    return [cell(i == row % count) for i in range(count)]


_BREEDS = ("beagle", "boxer", "chow", "pug")


def _dog_breeds(folder: Path) -> None:
    ids = [f"{i * 7919:032x}" for i in range(ROWS)]
    tests = [f"{i * 7907 + 1:032x}" for i in range(TESTS)]
    for name in ids:
        picture(folder / "train" / f"{name}.jpg")
    for name in tests:
        picture(folder / "test" / f"{name}.jpg")
    labels = [(name, _BREEDS[i % 4]) for i, name in enumerate(ids)]
    table(folder / "labels.csv", ["id", "breed"], labels)
    sample = [(name, *[0.25] * 4) for name in tests]
    table(folder / "sample_submission.csv", ["id", *_BREEDS], sample)


_LEAVES = ("healthy", "multiple_diseases", "rust", "scab")


def _plant_pathology(folder: Path) -> None:
    for i in range(ROWS):
        picture(folder / "images" / f"Train_{i}.jpg")
    for i in range(TESTS):
        picture(folder / "images" / f"Test_{i}.jpg")
    rows = [(f"Train_{i}", *_one_hot(i, 4)) for i in range(ROWS)]
    table(folder / "train.csv", ["image_id", *_LEAVES], rows)
    table(folder / "test.csv", ["image_id"], [(f"Test_{i}",) for i in range(TESTS)])
    sample = [(f"Test_{i}", *[0.25] * 4) for i in range(TESTS)]
    table(folder / "sample_submission.csv", ["image_id", *_LEAVES], sample)


def _cassava(folder: Path) -> None:
    names = [f"{1000015157 + i * 99}.jpg" for i in range(ROWS)]
    for name in names:
        picture(folder / "train_images" / name)
    picture(folder / "test_images" / "2216849948.jpg")
    for part in ("train", "test"):
        (folder / f"{part}_tfrecords").mkdir()
        (folder / f"{part}_tfrecords" / f"ld_{part}00-1338.tfrec").write_bytes(b"\0" * 64)
    table(folder / "train.csv", ["image_id", "label"], [(n, i % 5) for i, n in enumerate(names)])
    table(folder / "sample_submission.csv", ["image_id", "label"], [("2216849948.jpg", 4)])
    names_of = json.dumps({str(i): f"disease {i}" for i in range(5)})
    (folder / "label_num_to_disease_map.json").write_text(names_of, encoding="utf-8")


_LESIONS = ("MEL", "NV", "BCC", "UNK")


def _isic(folder: Path) -> None:
    for part, count in (("Training", ROWS), ("Test", TESTS)):
        for i in range(count):
            picture(folder / f"ISIC_2019_{part}_Input" / f"ISIC_{part[0]}{i:06d}.jpg")
        rows = [
            (f"ISIC_{part[0]}{i:06d}", 40 + i % 3 * 5, "torso", ("male", "female")[i % 2])
            for i in range(count)
        ]
        head = ["image", "age_approx", "anatom_site_general", "sex"]
        table(folder / f"ISIC_2019_{part}_Metadata.csv", head, rows)
    rows = [(f"ISIC_T{i:06d}", *_one_hot(i, 3, float), 0.0) for i in range(ROWS)]
    table(folder / "ISIC_2019_Training_GroundTruth.csv", ["image", *_LESIONS], rows)


def _histopathology(folder: Path) -> None:
    ids = [f"{i * 7919:040x}" for i in range(ROWS)]
    tests = [f"{i * 7907 + 1:040x}" for i in range(TESTS)]
    for name in ids:
        picture(folder / "train" / f"{name}.tif")
    for name in tests:
        picture(folder / "test" / f"{name}.tif")
    table(folder / "train_labels.csv", ["id", "label"], [(n, i % 2) for i, n in enumerate(ids)])
    table(folder / "sample_submission.csv", ["id", "label"], [(name, 0) for name in tests])


_CARS = ("1시리즈 F20 2013~2015", "K5 3세대 2020~2023", "그랜저 IG")


def _dacon_cars(folder: Path) -> None:
    for i in range(ROWS):
        picture(folder / "train" / _CARS[i % 3] / f"{_CARS[i % 3]}_{i:04d}.jpg")
    for i in range(TESTS):
        picture(folder / "test" / f"TEST_{i:05d}.jpg")
    tests = [(f"TEST_{i:05d}", f"./test/TEST_{i:05d}.jpg") for i in range(TESTS)]
    table(folder / "test.csv", ["ID", "img_path"], tests)
    sample = [(name, *[0] * 3) for name, _ in tests]
    table(folder / "sample_submission.csv", ["ID", *_CARS], sample)


def _hugging_face(folder: Path) -> None:
    for part, count in (("train", ROWS), ("validation", 4), ("test", TESTS)):
        names = [f"{part}_{i:04d}.png" for i in range(count)]
        for name in names:
            picture(folder / part / name)
        rows = [(name, ("cat", "dog")[i % 2]) for i, name in enumerate(names)]
        table(folder / part / "metadata.csv", ["file_name", "label"], rows)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")


def _roboflow(folder: Path) -> None:
    for part, count in (("train", ROWS), ("valid", 4), ("test", TESTS)):
        names = [f"{part}{i}_jpg.rf.{i * 7919:08x}.jpg" for i in range(count)]
        for name in names:
            picture(folder / part / name)
        rows = [(name, *(f" {bit}" for bit in _one_hot(i, 3))) for i, name in enumerate(names)]
        table(folder / part / "_classes.csv", ["filename", " Bent", " Crack", " Good"], rows)
    for name in ("README.dataset.txt", "README.roboflow.txt"):
        (folder / name).write_text("an export\n", encoding="utf-8")


_SAMPLE = {"sample_submission": "sample_submission.csv"}
LAYOUTS: dict[str, Layout] = {
    "dog breeds": Layout(
        _dog_breeds,
        {"train": "labels.csv", "train_images": "train", "test": "test", **_SAMPLE},
        _BREEDS,
        "probabilities of 4 classes",
    ),
    "plant pathology": Layout(
        _plant_pathology,
        {"train": "train.csv", "train_images": "images", "test": "test.csv",
         "test_images": "images", **_SAMPLE},
        _LEAVES,
        "probabilities of 4 classes",
    ),
    "cassava": Layout(
        _cassava,
        {"train": "train.csv", "train_images": "train_images", "test": "test_images", **_SAMPLE},
        ("0", "1", "2", "3", "4"),
        "the most probable class in column 'label'",
        tests=1,
    ),
    "ISIC": Layout(
        _isic,
        {"train": "ISIC_2019_Training_GroundTruth.csv", "train_images": "ISIC_2019_Training_Input",
         "test": "ISIC_2019_Test_Input"},
        ("BCC", "MEL", "NV"),
        "probabilities of 3 classes",
    ),
    "histopathology": Layout(
        _histopathology,
        {"train": "train_labels.csv", "train_images": "train", "test": "test", **_SAMPLE},
        ("0", "1"),
        "the probability of class '1' in column 'label'",
    ),
    "DACON cars": Layout(
        _dacon_cars, {"train": "train", "test": "test.csv", **_SAMPLE}, _CARS,
        "probabilities of 3 classes",
    ),
    "Hugging Face folder": Layout(
        _hugging_face, {"train": "train", "test": "test"}, ("cat", "dog"),
        "probabilities of 2 classes",
    ),
    "Roboflow export": Layout(
        _roboflow, {"train": "train", "test": "test"}, ("Bent", "Crack", "Good"),
        "probabilities of 3 classes",
    ),
}  # fmt: skip
