"""Excluded images, other labels and merged classes, against small tables whose outcome is plain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foldrace.config.schema import DataConfig
from foldrace.core.errors import DataError
from foldrace.dataset.curation import merged_json, own_classes, read_merged, split_merged
from foldrace.dataset.left_out import LeftOut
from foldrace.dataset.manifest import Manifest, read_manifest

LABELS = ("cat", "dog", "Cat", "cat", "dog", "Cat", "cat", "bird", "bird")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A table and its images, which are never decoded here."""
    (tmp_path / "im").mkdir()
    for i in range(len(LABELS)):
        (tmp_path / f"im/{i}.png").touch()
    rows = (f"im/{i}.png,{label}\n" for i, label in enumerate(LABELS))
    (tmp_path / "train.csv").write_text("image_path,target\n" + "".join(rows))
    return tmp_path


def read(data: Path, **keys: Any) -> Manifest:
    return read_manifest(DataConfig(train=str(data / "train.csv"), **keys))


def labelled(manifest: Manifest) -> dict[str, str]:
    names = (manifest.classes[label] for label in manifest.labels)
    return dict(zip(manifest.image_paths, names, strict=True))


def problems(data: Path, **keys: Any) -> list[str]:
    with pytest.raises(DataError) as error:
        read(data, **keys)
    return [str(problem) for problem in error.value.problems]


def table(data: Path, text: str) -> str:
    path = data / "list.csv"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    "text",
    [
        "image_path,why\nim/2.png,blurred\nim/7.png,\n",
        "whatever\n./im/7.png\nim\\2.png\n",
        "image_path\nim/2\n{folder}/im/7.png\n",  # without a suffix; absolute
        "image_path,data,reason,detail\nim/2.png,training,copy,= x\nim/7.png,training,copy,\n",
    ],
)
def test_excluded_images_are_no_rows(data: Path, text: str) -> None:
    found = read(data, exclude=table(data, text.format(folder=data)))
    assert list(labelled(found)) == [f"im/{i}.png" for i in (0, 1, 3, 4, 5, 6, 8)]
    assert found.lines == (2, 3, 5, 6, 7, 8, 10)
    assert found.classes == ("bird", "Cat", "cat", "dog")
    assert found.left_out == (
        LeftOut("im/2.png", "training", "excluded"), LeftOut("im/7.png", "training", "excluded")
    )  # fmt: skip


def test_a_class_that_is_excluded_whole_is_gone(data: Path) -> None:
    found = read(data, exclude=table(data, "image_path\nim/7.png\nim/8.png\n"))
    assert found.classes == ("Cat", "cat", "dog")


def test_fixed_labels(data: Path) -> None:
    found = read(data, fixes=table(data, "image_path,target\nim/0.png,dog\nim/1.png,dog\n"))
    assert labelled(found)["im/0.png"] == labelled(found)["im/1.png"] == "dog"
    assert [str(note) for note in found.notes] == [
        "data.fixes: 1 label changed: im/0.png: cat -> dog"
    ]
    assert found.left_out == ()


def test_lists_of_images_in_class_folders(tmp_path: Path) -> None:
    for name in ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png", "dog/2.png"):
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    config = DataConfig(
        train=str(tmp_path / "train"),
        exclude=table(tmp_path, "image_path\ndog/1.png\n"),
        fixes=str(tmp_path / "fixes.csv"),
    )
    (tmp_path / "fixes.csv").write_text("image_path,target\ndog/2.png,cat\n")
    assert labelled(read_manifest(config)) == {
        "cat/0.png": "cat", "cat/1.png": "cat", "dog/0.png": "dog", "dog/2.png": "cat"
    }  # fmt: skip


def test_merged_classes(data: Path) -> None:
    found = read(data, merge_classes={"cat": ("cat", "Cat"), "other": ("dog", "bird")})
    assert found.classes == ("cat", "other")
    expected = ["cat" if label in ("cat", "Cat") else "other" for label in LABELS]
    assert list(labelled(found).values()) == expected
    assert found.merged == {"cat": {"cat": 3, "Cat": 2}, "other": {"dog": 2, "bird": 2}}
    assert read_merged(merged_json(found.merged)) == found.merged
    assert own_classes(found.classes, found.merged) == ("bird", "Cat", "cat", "dog")


def test_counts_of_merged_classes_are_those_after_the_other_lists(data: Path) -> None:
    exclude = table(data, "image_path\nim/0.png\n")
    (data / "fixes.csv").write_text("image_path,target\nim/2.png,cat\nim/0.png,dog\n")
    found = read(
        data,
        exclude=exclude,
        fixes=str(data / "fixes.csv"),
        merge_classes={"Katze": ("cat", "Cat")},
    )
    assert found.merged == {"Katze": {"cat": 3, "Cat": 1}}
    assert found.classes == ("bird", "dog", "Katze")


def test_a_merged_class_gives_its_probability_back() -> None:
    rng = np.random.default_rng(0)
    prob = rng.dirichlet(np.ones(3), 5)
    merged = {"pet": {"dog": 3, "cat": 1}, "z": {"z": 5, "a": 0}}
    found = split_merged(prob, ("bird", "pet", "z"), merged)
    assert own_classes(("bird", "pet", "z"), merged) == ("a", "bird", "cat", "dog", "z")
    expected = [0 * prob[:, 2], prob[:, 0], prob[:, 1] / 4, prob[:, 1] * 3 / 4, prob[:, 2]]
    np.testing.assert_allclose(found, np.stack(expected, axis=1))
    np.testing.assert_allclose(found.sum(axis=1), 1)
    assert split_merged(prob, ("a", "b", "c"), {}) is prob
    assert own_classes(("b", "a"), {}) == ("b", "a")


def test_rows_of_one_image(data: Path) -> None:
    with (data / "train.csv").open("a") as file:
        file.write("im/0.png,cat\n./im/1.png,bird\nim/4.png,dog\n")
    found = problems(data)
    assert len(found) == 2
    assert "im/1.png (lines 3 and 12: dog, bird); keep the right one (data.dupl" in found[0]
    assert (
        "im/4.png (lines 6 and 13: dog); keep one row of each (as data.duplicates: dr" in found[1]
    )
    kept = read(data, duplicates="drop")
    assert kept.lines == (2, *range(4, 11))
    assert [(row.image_path, row.reason, row.detail) for row in kept.left_out] == [
        ("im/1.png", "listed twice", "with the labels dog, bird"),
        ("im/0.png", "listed twice", ""),
        ("./im/1.png", "listed twice", "with the labels dog, bird"),
        ("im/4.png", "listed twice", ""),
    ]


@pytest.mark.parametrize(
    ("keys", "text", "expected"),
    [
        ({"exclude": "none.csv"}, "", "data.exclude: none.csv does not exist; needed: a table"),
        (
            {"exclude": "{list}"},
            "image_path,x\nim/0.png,1\nim/77.png,2\n",
            "names images that data.train does not have: im/77.png (line 3); write paths as",
        ),
        ({"exclude": "{list}"}, "path,x\nim/0.png,1\n", "has no column 'image_path'"),
        (
            {"exclude": "{list}"},
            "image_path\n" + "".join(f"im/{i}.png\n" for i in range(9)),
            "data.exclude: leaves no training image",
        ),
        (
            {"fixes": "{list}"},
            "image_path,target\nim/0.png,brd\n",
            "has labels that no training image has: brd; did you mean 'bird'? classes: Cat, bird",
        ),
        ({"fixes": "{list}"}, "image_path\nim/0.png\n", "has no column 'target'"),
        (
            {"fixes": "{list}"},
            "image_path,target\nim/0.png,dog\n./im/0.png,bird\n",
            "gives one image two labels: im/0.png",
        ),
        (
            {"merge_classes": {"x": ("cat", "dgo")}},
            "",
            "no training image has the class dgo; did you mean 'dog'? classes: Cat, bird",
        ),
        ({"merge_classes": {"x": ("cat",)}}, "", "x: needs at least 2 classes, got cat"),
        (
            {"merge_classes": {"x": ("cat", "Cat"), "y": ("cat", "dog")}},
            "",
            "data.merge_classes.y: cat is merged twice",
        ),
        ({"merge_classes": {"dog": ("cat", "Cat")}}, "", "dog: is a class of its own; name it"),
        ({"merge_classes": {" ": ("cat", "Cat")}}, "", "is no name; give each list a name of its"),
        (
            {"merge_classes": {"x": ("cat", "Cat"), "x ": ("dog", "bird")}},
            "",
            "x : is there twice; give each list a name of its own",
        ),
        (
            {"merge_classes": {"x": ("cat", "Cat", "dog", "bird")}},
            "",
            "leave one class alone; needed: at least 2",
        ),
    ],
)
def test_lists_that_do_not_fit(data: Path, keys: dict[str, Any], text: str, expected: str) -> None:
    path = table(data, text)
    given = {k: path if value == "{list}" else value for k, value in keys.items()}
    assert expected in "\n".join(problems(data, **given))


@pytest.mark.parametrize("text", ["[]", '{"a": {}}', '{"a": {"b": "1"}}', "x", '{"a": {"b": 0}}'])
def test_a_damaged_file_of_merged_classes(text: str) -> None:
    with pytest.raises(ValueError):
        read_merged(text.encode())
