"""The audit of hand-made folders: every fault planted is found, and nothing else."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiment.audit import Audit, audit
from experiment.config import DataConfig, FoldsConfig
from experiment.folds import HELD_OUT, TRAIN_ONLY, make_folds
from experiment.manifest import ImageSet, Manifest, read_manifest, read_test_set

REAL = Path(__file__).parents[3] / "shared" / "data" / "sign_digits"


def photos(folder: Path, count: int, prefix: str = "", seed: int = 0) -> list[str]:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    names = [f"{prefix}{i}.jpg" for i in range(count)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(folder / name)
    return names


def manifest(root: Path, names: Sequence[str]) -> Manifest:
    """Rows alternate between cat and dog."""
    labels = np.arange(len(names), dtype=np.int64) % 2
    return Manifest(root, tuple(names), labels, ("cat", "dog"), None, None)


def image_set(root: Path, names: Sequence[str]) -> ImageSet:
    return ImageSet(root, tuple(names), tuple(names), "id", ("cat", "dog"))


def texts(found: Audit) -> tuple[list[str], list[str]]:
    return [str(p) for p in found.problems], [str(w) for w in found.warnings]


def test_a_clean_set(tmp_path: Path) -> None:
    names = photos(tmp_path, 20)
    test = image_set(tmp_path / "t", photos(tmp_path / "t", 3, seed=1))
    fold = np.arange(20) // 2 % 5
    assert audit(manifest(tmp_path, names), fold, test, 2) == Audit((), (), 32, 23)
    assert audit(manifest(tmp_path, names), None, None, 1) == Audit((), (), 32, 20)


def test_missing_images_with_their_likely_names(tmp_path: Path) -> None:
    names = photos(tmp_path, 22)
    names[:4] = ["0.png", "2.JPG", "nowhere/x.jpg", "11,.jpg"]
    (problem,), _ = texts(audit(manifest(tmp_path, names), None, None, 2))
    assert problem == (
        f"training images in {tmp_path}: 4 of 22 do not exist: 0.png (there is 0.jpg), "
        "2.JPG (there is 2.jpg), nowhere/x.jpg, 11,.jpg (there is 11.jpg); correct the paths"
    )


def test_all_missing_points_to_the_key(tmp_path: Path) -> None:
    data = manifest(tmp_path, [f"no/{i}.jpg" for i in range(50)])
    problems, _ = texts(audit(data, None, image_set(tmp_path, ["a.jpg"]), 2))
    assert "50 of 50 do not exist" in problems[0]
    assert "no/19.jpg and 30 more; correct the paths or set data.train_images to" in problems[0]
    assert problems[1].startswith(f"test images in {tmp_path}: 1 of 1 do not exist")
    assert "set data.test_images to" in problems[1]


@pytest.mark.parametrize("test_side", [False, True])
def test_damaged_images(tmp_path: Path, test_side: bool) -> None:
    names = photos(tmp_path, 24)
    whole = (tmp_path / "3.jpg").read_bytes()
    (tmp_path / "3.jpg").write_bytes(whole[:-60])
    (tmp_path / "4.jpg").write_bytes(b"")
    (tmp_path / "5.jpg").write_text("<html>not found</html>")
    if test_side:
        found = audit(manifest(tmp_path, names[6:]), None, image_set(tmp_path, names[:6]), 2)
    else:
        found = audit(manifest(tmp_path, names), None, None, 2)
    (problem,), _ = texts(found)
    assert "3 of " in problem
    assert "3.jpg (cannot be decoded: image file is truncated" in problem
    assert "4.jpg (is empty (0 bytes)), 5.jpg (is not an image of a supported kind" in problem
    assert problem.startswith("test images" if test_side else "training images")


def test_duplicates(tmp_path: Path) -> None:
    names = photos(tmp_path, 20)
    for copy, original in ((3, 0), (6, 4), (12, 10)):  # dog = cat; cat = cat; cat = cat
        (tmp_path / names[copy]).write_bytes((tmp_path / names[original]).read_bytes())
    test_names = photos(tmp_path / "t", 2, seed=1)
    (tmp_path / "t" / "1.jpg").write_bytes((tmp_path / "10.jpg").read_bytes())
    fold = np.arange(20) // 2 % 2
    fold[12] = fold[10]
    data = manifest(tmp_path, names)
    problems, warnings = texts(audit(data, fold, image_set(tmp_path / "t", test_names), 2))
    assert problems == []
    assert len(warnings) == 3
    assert "different labels: 0.jpg [cat] = 3.jpg [dog]; one label" in warnings[0]
    assert "different folds: 0.jpg = 3.jpg, 4.jpg = 6.jpg; validation" in warnings[1]
    assert "test images: 1 are also training images: 1.jpg = 10.jpg" in warnings[2]


def test_without_folds_no_warning_about_folds(tmp_path: Path) -> None:
    names = photos(tmp_path, 20)
    (tmp_path / "2.jpg").write_bytes((tmp_path / "0.jpg").read_bytes())
    assert audit(manifest(tmp_path, names), None, None, 2).warnings == ()


def test_tiny_classes(tmp_path: Path) -> None:
    data = manifest(tmp_path, photos(tmp_path, 8))
    _, (warning,) = texts(audit(data, None, None, 2))
    assert "classes with fewer than 10 images: cat (4), dog (4)" in warning
    fold = np.array([0, 0, 0, 0, 1, 0, 1, 1])  # cat: 2 and 2; dog: 3 and 1
    _, (warning,) = texts(audit(data, fold, None, 2))
    assert "fewer than 2 images in some fold: dog (4)" in warning
    split = np.array([0, 0, 0, 0, TRAIN_ONLY, TRAIN_ONLY, HELD_OUT, HELD_OUT])
    assert audit(data, split, None, 2).warnings == ()


@pytest.mark.skipif(not REAL.is_dir(), reason="the sign_digits photos are not on this machine")
def test_real_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLDRACE_CACHE", str(tmp_path))
    data = DataConfig(
        train=str(REAL / "train.zip"),
        test=str(REAL / "test.csv"),
        test_images=str(REAL / "test.zip"),
        test_image_column="img_path",
        sample_submission=str(REAL / "sample_submission.csv"),
    )
    rows = read_manifest(data)
    test = read_test_set(data, rows.classes)
    start = time.perf_counter()
    found = audit(rows, make_folds(rows, FoldsConfig()), test, os.cpu_count() or 1)
    assert time.perf_counter() - start < 10  # 1 s on two cores; 10 s would be a regression
    assert found == Audit((), (), 3024, 2062)
