"""Small image data sets of many kinds, each as a newcomer has one: a folder per class, and test
images whose labels lie elsewhere.

Takes a name and a folder, leaves `data/train/<class>/<id>.<ext>`, `data/test/<id>.<ext>` and
`test_labels.csv` (id,label) in it. Two sets come with scikit-learn. The others are made of copies
in a folder that the environment variable `IMAGE_SETS` names: `sign_digits/train.zip` (Mavi 2020,
arXiv:2011.08927), `small_photos` (train.zip, test.zip, test_labels.csv: 2,500 photos of CIFAR-10),
and of github.com `alexeygrigorev/clothing-dataset-small`, `brendenlake/omniglot` and
`hromi/SMILEsmileD`, each under the repository's own name.
"""

from __future__ import annotations

import csv
import io
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sides.hard_digits import digit_images

_SEED = 0
Example = tuple[bytes, str, str]  # the file's content, its ending, its class


@dataclass(frozen=True)
class ImageSet:
    """One row of the table."""

    name: str
    size: int
    """Side in pixels of the training images from scratch."""
    examples: Callable[[], Iterator[Example]]
    """All labelled images, in a fixed order."""
    train: int
    """Training images, drawn with the classes' shares; the test images are drawn likewise."""
    test: int
    test_examples: Callable[[], Iterator[Example]] | None = None
    """The set's own test images; None: some of `examples`."""


def write_image_set(given: ImageSet, folder: Path) -> Path:
    """Write the set; gives the folder that a user would hand to `foldrace run`."""
    train = list(given.examples())
    if given.test_examples is None:
        chosen = _drawn(train, min(len(train), given.train + given.test))
        kept = _drawn(chosen, given.train)
        names = {id(example) for example in kept}
        train, test = kept, [example for example in chosen if id(example) not in names]
    else:
        train = _drawn(train, given.train)
        test = _drawn(list(given.test_examples()), given.test)
    data = folder / "data"
    for i, (content, ending, label) in enumerate(train):
        _write(data / "train" / label / f"{i:05d}{ending}", content)
    for i, (content, ending, _) in enumerate(test):
        _write(data / "test" / f"{i:05d}{ending}", content)
    with (folder / "test_labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label"])
        writer.writerows((f"{i:05d}", label) for i, (_, _, label) in enumerate(test))
    return data


def test_labels(folder: Path) -> dict[str, str]:
    """Id of a test image -> its class."""
    with (folder / "test_labels.csv").open(newline="", encoding="utf-8") as file:
        return {row["id"]: row["label"] for row in csv.DictReader(file)}


def _drawn(examples: list[Example], count: int) -> list[Example]:
    """That many of them, each class with its share."""
    from sklearn.model_selection import train_test_split

    if count >= len(examples):
        return examples
    rows, _ = train_test_split(
        np.arange(len(examples)),
        train_size=count,
        stratify=[label for _, _, label in examples],
        random_state=_SEED,
    )
    return [examples[row] for row in sorted(rows)]


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _digits(hard: bool) -> Iterator[Example]:
    images, labels = digit_images(hard)
    for image, label in zip(images, labels, strict=True):
        file = io.BytesIO()
        image.save(file, "PNG")
        yield file.getvalue(), ".png", str(label)


def _sources() -> Path:
    """The folder of the copies."""
    value = os.environ.get("IMAGE_SETS")
    if not value or not Path(value).is_dir():
        raise SystemExit("IMAGE_SETS: should name a folder; see benchmarks/sides/image_sets.py")
    return Path(value).resolve()


def _zipped(path: str, *, label_depth: int = 1) -> Iterator[Example]:
    """Images of a zip; the class is the `label_depth` folders that they lie in."""
    with zipfile.ZipFile(_sources() / path) as archive:
        for name in sorted(archive.namelist()):
            if name.lower().endswith((".jpg", ".png")) and "__MACOSX" not in name:
                parts = Path(name).parts
                label = "_".join(parts[-1 - label_depth : -1])
                yield archive.read(name), Path(name).suffix, label


def _photo_tests() -> Iterator[Example]:
    folder = _sources() / "small_photos"
    with (folder / "test_labels.csv").open(newline="", encoding="utf-8") as file:
        labels = {row["id"]: row["label"] for row in csv.DictReader(file)}
    with zipfile.ZipFile(folder / "test.zip") as archive:
        for name in sorted(archive.namelist()):
            if Path(name).stem in labels:
                yield archive.read(name), ".jpg", labels[Path(name).stem]


def _folders(path: str, label: Callable[[Path], str]) -> Iterator[Example]:
    for file in sorted((_sources() / path).rglob("*.jpg")):
        yield file.read_bytes(), ".jpg", label(file)


def _of_folder(file: Path) -> str:
    return file.parent.name


def _smile(file: Path) -> str:
    return "smile" if "positives" in file.parts else "no_smile"


IMAGE_SETS: dict[str, ImageSet] = {
    row.name: row
    for row in (
        ImageSet("digits", 32, lambda: _digits(hard=False), 1300, 497),
        ImageSet("hard_digits", 32, lambda: _digits(hard=True), 1300, 497),
        ImageSet("sign_digits", 48, lambda: _zipped("sign_digits/train.zip"), 1230, 410),
        ImageSet(
            "small_photos", 32, lambda: _zipped("small_photos/train.zip"), 1500, 1000, _photo_tests
        ),
        ImageSet(
            "clothing", 64, lambda: _folders("clothing-dataset-small/train", _of_folder), 1500, 600
        ),
        ImageSet(
            "omniglot", 32,
            lambda: _zipped("omniglot/python/images_background_small1.zip", label_depth=2),
            2002, 858,
        ),
        ImageSet("smiles", 48, lambda: _folders("SMILEsmileD/SMILEs", _smile), 1500, 1000),
    )
}  # fmt: skip
