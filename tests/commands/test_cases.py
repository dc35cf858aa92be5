"""`check` of inputs that people reported elsewhere, each with others of its kind: what it takes for
what, or what it asks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foldrace.sweep import app
from tests.dataset.layouts import picture

KINDS = ("cat", "dog")
HEAD = "image_path,target"
TEST = "id,image_path\n" + "".join(f"t{i},test/t{i}.jpg\n" for i in range(4))


@dataclass(frozen=True)
class Case:
    """Tables and keys beside the images train/im000.jpg to im015.jpg and test/t0.jpg to t3.jpg."""

    words: tuple[str, ...]
    """What is said."""
    train: str = ""
    sample: str | None = None
    data: dict[str, object] = field(default_factory=dict)
    table: str = "train.csv"
    exit_code: int = 0


def training(head: str = HEAD, name: str = "train/{}.jpg", cells: Sequence[str] = KINDS) -> str:
    rows = (f"{name.format(f'im{i:03d}')},{cells[i % len(cells)]}\n" for i in range(16))
    return f"{head}\n" + "".join(rows)


def sample(head: str, cells: str, ids: str = "t{}") -> str:
    return f"{head}\n" + "".join(f"{ids.format(i)},{cells}\n" for i in range(4))


IDS = {"train_images": "train", "image_column": "id", "label_column": "label"}
BY_TABLE: dict[str, object] = {"test": "test.csv"}
BY_FOLDER: dict[str, object] = {"test": "test"}
NUMBERED = training(cells=("0", "1"))
SAID = "16 of 16 images are called otherwise than the files: "
CASES = {
    "ids without extension": Case(
        (f"{SAID}im000 is im000.jpg",), training("id,label", "{}"), data=IDS
    ),
    "ids with another extension": Case(
        (f"{SAID}im000.png is im000.jpg",), training("id,label", "{}.png"), data=IDS
    ),
    "ids in capitals": Case(
        ("im000.JPG is im000.jpg",), training("id,label", "{}.JPG"), data={"train_images": "train"}
    ),
    "one-hot labels": Case(
        ("columns [cat, dog] (one-hot)",), training("image_id,cat,dog", cells=("1,0", "0,1"))
    ),
    "one-hot labels that are named": Case(
        ("16 images, 2 classes",),
        training("image_path,cat,dog,dark", cells=("1,0,1", "0,1,1")),
        data={"label_column": KINDS},
    ),
    "several labels an image": Case(
        ("several classes, where only one can be predicted",),
        training("image_path,cat,dog", cells=("1,1", "0,1")),
        data={"label_column": KINDS},
        exit_code=2,
    ),
    "paths that lead up": Case(
        ("the image paths start from",), training(name="../train/{}.jpg"), table="csv/train.csv",
        data={"train_images": "."},
    ),
    "paths that lead up, without a key": Case(
        ("16 images, 2 classes",), training(name="../train/{}.jpg"), table="csv/train.csv"
    ),
    "paths of a deeper folder": Case(
        ("../../train/im000.jpg is train/im000.jpg",),
        training(name="../../train/{}.jpg"), table="csv/train.csv", data={"train_images": "."},
    ),
    "a sample of 0 where classes are 0 and 1": Case(
        ("the probability of class '1' in column 'label'", "data.submission: labels writes"),
        NUMBERED, sample("id,label", "0"), BY_TABLE,
    ),
    "the same with the user's word": Case(
        ("the most probable class in column 'label'",),
        NUMBERED, sample("id,label", "0"), {**BY_TABLE, "submission": "labels"},
    ),
    "a sample of 0.5": Case(
        ("the probability of class '1' in column 'label'",),
        NUMBERED, sample("id,label", "0.5"), BY_TABLE,
    ),
    "a sample of 0.5 where classes are words": Case(
        ("of which class are they the probability", "{probability_of: dog}"),
        training(), sample("id,label", "0.5"), BY_TABLE, exit_code=2,
    ),
    "and the answer to that": Case(
        ("the probability of class 'cat' in column 'label'",),
        training(), sample("id,label", "0.5"),
        {**BY_TABLE, "submission": {"probability_of": "cat"}},
    ),
    "a placeholder": Case(
        ("the most probable class in column 'target'",),
        training(), sample("id,target", "NaN"), BY_TABLE,
    ),
    "a dash": Case(
        ("the most probable class in column 'kind'",),
        training(), sample("id,kind", "-"), BY_TABLE,
    ),
    "0 in the column of the labels": Case(
        ("the most probable class in column 'target'", "the sample has '0' in each row"),
        training(), sample("id,target", "0"), BY_TABLE,
    ),
    "ids with their folder": Case(
        ("ids matched by paths", "probabilities of 2 classes"),
        training(), sample("id,cat,dog", "0,0", "test/t{}.jpg"), BY_FOLDER,
    ),
    "ids without suffix": Case(
        ("ids matched by ids without suffix",),
        training(), sample("id,cat,dog", "0,0"), BY_FOLDER,
    ),
    "ids of something else": Case(
        ("ids without a test image: a0, a1, a2, a3", "its ids look like 'a0'"),
        training(), sample("id,cat,dog", "0,0", "a{}"), BY_FOLDER, exit_code=2,
    ),
    "a sample without test images": Case(
        ("there is no data.test",), training(), sample("id,cat,dog", "0,0"), exit_code=2
    ),
    "several columns of labels": Case(
        ("Several labels of an image, or several targets, cannot be predicted",),
        training(), sample("id,colour,size", "red,3"), BY_TABLE, exit_code=2,
    ),
    "semicolons and an older encoding": Case(
        ("semicolons between the cells", "read as cp949, by its letters"),
        training(cells=("고양이", "강아지")).replace(",", ";"),
    ),
    "an encoding that there is not": Case(
        ("data.encoding", "should be the name of a text encoding"),
        training(), data={"encoding": "cp94"}, exit_code=2,
    ),
    "labels that pandas has made decimals": Case(
        ("label 0.0 is read as 0",), training(cells=("0.0", "1.0"))
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in range(16):
        picture(folder / "train" / f"im{i:03d}.jpg")
    for i in range(4):
        picture(folder / "test" / f"t{i}.jpg")
    return folder


@pytest.mark.parametrize("name", CASES)
def test_what_check_says(name: str, images: Path, tmp_path: Path) -> None:
    case = CASES[name]
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        for image in (images / part).iterdir():
            (tmp_path / part / image.name).hardlink_to(image)
    table = tmp_path / case.table
    table.parent.mkdir(exist_ok=True)
    table.write_bytes(case.train.encode("cp949"))
    (tmp_path / "test.csv").write_text(TEST, encoding="utf-8")
    data = {"train": case.table, **case.data}
    if case.sample is not None:
        (tmp_path / "sample.csv").write_text(case.sample, encoding="utf-8")
        data["sample_submission"] = "sample.csv"
    raw = {
        "data": data,
        "folds": {"k": 2},
        "search": {"backbones": ["timm/test_resnet"], "candidates": 1},
        "training": {"pretrained": False, "image_size": 32},
    }
    (tmp_path / "c.json").write_text(json.dumps(raw), encoding="utf-8")
    result = CliRunner().invoke(app, ["check", str(tmp_path / "c.json")])
    text = " ".join(result.output.split())
    assert result.exit_code == case.exit_code, f"{result.output}\n{result.exception!r}"
    for words in case.words:
        assert words in text, f"{words!r} is not in:\n{text}"
