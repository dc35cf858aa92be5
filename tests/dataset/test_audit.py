"""The audit of hand-made folders: every fault planted is found, and nothing else."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from foldrace.config.schema import DataConfig, FoldsConfig
from foldrace.dataset.audit import Audit, audit
from foldrace.dataset.folds import HELD_OUT, TRAIN_ONLY, make_folds
from foldrace.dataset.manifest import Manifest, read_manifest
from foldrace.dataset.test_set import ImageSet, read_test_set

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
    classes = ("cat", "dog")
    return ImageSet(root, tuple(names), tuple(names), "id", classes, ("id", *classes))


def texts(found: Audit) -> tuple[list[str], list[str]]:
    return [str(p) for p in found.problems], [str(w) for w in found.warnings]


def test_a_clean_set(tmp_path: Path) -> None:
    names = photos(tmp_path, 20)
    test = image_set(tmp_path / "t", photos(tmp_path / "t", 3, seed=1))
    fold = np.arange(20) // 2 % 5
    assert audit(manifest(tmp_path, names), fold, test, 2) == Audit((), (), ((32, 24),) * 23)
    assert audit(manifest(tmp_path, names), None, None, 1) == Audit((), (), ((32, 24),) * 20)


def from_csv(path: Path, names: Sequence[str]) -> Manifest:
    """The same rows as of `manifest`, in a table with a line left empty at its top."""
    rows = (f"{name},{'cat' if i % 2 == 0 else 'dog'}\n" for i, name in enumerate(names))
    path.write_text("image_path,target\n\n" + "".join(rows))
    return read_manifest(DataConfig(train=str(path)))


def test_missing_images_with_their_lines_and_likely_names(tmp_path: Path) -> None:
    names = photos(tmp_path, 22)
    names[:4] = ["0.png", "2.JPG", "nowhere/x.jpg", "11,.jpg"]
    problems, _ = texts(audit(manifest(tmp_path, names), None, None, 2))
    where = f"training images in {tmp_path}"
    advice = "correct the path or remove the row, or set data.on_bad_image: drop"
    assert problems == [
        f"{where}: 0.png: missing; {tmp_path}/0.png does not exist, but there is 0.jpg; {advice}",
        f"{where}: 2.JPG: missing; {tmp_path}/2.JPG does not exist, but there is 2.jpg; {advice}",
        f"{where}: nowhere/x.jpg: missing; {tmp_path}/nowhere/x.jpg does not exist; {advice}",
        f"{where}: 11,.jpg: missing; {tmp_path}/11,.jpg does not exist, but there is 11.jpg; "
        + advice,
    ]
    names[3] = "3.jpg"
    of_table = from_csv(tmp_path / "train.csv", names)  # which takes 0.jpg and 2.jpg for them
    problems, _ = texts(audit(of_table, None, None, 2))
    assert problems == [
        f"{tmp_path}/train.csv line 5: nowhere/x.jpg: missing; {tmp_path}/nowhere/x.jpg does not "
        f"exist; {advice}"
    ]
    assert of_table.image_paths[:2] == ("0.jpg", "2.jpg") and of_table.readings


def test_all_missing_points_to_the_key(tmp_path: Path) -> None:
    names = [f"no/{i}.jpg" for i in range(50)]
    data = from_csv(tmp_path / "train.csv", names)
    problems, _ = texts(audit(data, None, image_set(tmp_path, ["a.jpg"]), 2))
    assert len(problems) == 1 + 3 + 1 + 1
    assert problems[0] == (
        f"training images in {tmp_path}: 50 of 50 are missing; correct the paths or set "
        "data.train_images to the folder that they are relative to"
    )
    assert problems[3].startswith(f"{tmp_path}/train.csv line 5: no/2.jpg: missing; ")
    assert problems[4].startswith(f"test images in {tmp_path}: 1 of 1 are missing")
    assert "set data.test_images to" in problems[4]
    assert problems[5].startswith(f"test images in {tmp_path}: a.jpg: missing; ")


def test_a_name_too_long_is_a_missing_image(tmp_path: Path) -> None:
    names = [*photos(tmp_path, 20), "x" * 300 + ".jpg"]
    (problem,), _ = texts(audit(manifest(tmp_path, names), None, None, 2))
    assert "xx.jpg: missing; " in problem


@pytest.mark.parametrize("test_side", [False, True])
@pytest.mark.parametrize("table", [False, True])
def test_damaged_images(tmp_path: Path, test_side: bool, table: bool) -> None:
    names = photos(tmp_path, 24)
    whole = (tmp_path / "3.jpg").read_bytes()
    (tmp_path / "3.jpg").write_bytes(whole[:-60])
    (tmp_path / "4.jpg").write_bytes(b"")
    (tmp_path / "5.jpg").write_text("<html>not found</html>")
    name, lines = ("some.csv", tuple(range(2, 26))) if table else (None, None)
    if test_side:
        test = replace(image_set(tmp_path, names[:6]), table=name, lines=lines)
        found = audit(manifest(tmp_path, names[6:]), None, test, 2)
    else:
        found = audit(replace(manifest(tmp_path, names), table=name, lines=lines), None, None, 2)
    problems, _ = texts(found)
    kind = "test" if test_side else "training"
    for line, problem in enumerate(problems, start=5):
        where = f"some.csv line {line}" if table else f"{kind} images in {tmp_path}"
        assert problem.startswith(f"{where}: {line - 2}.jpg: unreadable; it ")
        policy = "on_bad_test_image: prior" if test_side else "on_bad_image: drop"
        assert problem.endswith(f"; replace or remove the file, or set data.{policy}")
    assert len(problems) == 3
    assert "it cannot be decoded: image file is truncated" in problems[0]
    assert "it is empty (0 bytes)" in problems[1]
    assert "it is not an image of a supported kind" in problems[2]


def test_many_damaged_images_are_capped(tmp_path: Path) -> None:
    names = photos(tmp_path, 31)
    for name in names[:30]:
        (tmp_path / name).write_bytes(b"")
    problems, _ = texts(audit(manifest(tmp_path, names), None, None, 2))
    assert len(problems) == 21
    assert problems[0] == f"training images in {tmp_path}: 30 of 31 are unreadable"


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


def test_duplicates_name_their_lines(tmp_path: Path) -> None:
    names = photos(tmp_path, 20)
    (tmp_path / names[3]).write_bytes((tmp_path / names[0]).read_bytes())
    data = from_csv(tmp_path / "train.csv", names)
    _, warnings = texts(audit(data, np.arange(20) // 2 % 2, image_set(tmp_path, ["0.jpg"]), 2))
    assert "different labels: 0.jpg (line 3) [cat] = 3.jpg (line 6) [dog]; one" in warnings[0]
    assert "different folds: 0.jpg (line 3) = 3.jpg (line 6); validation" in warnings[1]
    assert "1 are also training images: 0.jpg = 0.jpg (line 3); their" in warnings[2]


def scene(path: Path, seed: int) -> None:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((120, 90), Image.Resampling.BICUBIC).save(path)


def test_near_duplicates(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    names = [f"{i}.png" for i in range(20)]
    for i, name in enumerate(names):
        scene(tmp_path / name, i)
    for copy, original in (("3.png", "0.png"), ("5.png", "4.png")):
        Image.open(tmp_path / original).resize((100, 75)).save(tmp_path / copy)
    Image.open(tmp_path / "0.png").resize((80, 60)).save(tmp_path / "t" / "0.png")
    (tmp_path / "9.png").write_bytes((tmp_path / "7.png").read_bytes())
    (tmp_path / "t" / "1.png").write_bytes((tmp_path / "8.png").read_bytes())
    scene(tmp_path / "t" / "2.png", 50)
    test = image_set(tmp_path / "t", ["0.png", "1.png", "2.png"])
    data = from_csv(tmp_path / "train.csv", names)
    fold = np.arange(20) // 2 % 5  # 4 and 5 are in one
    found = audit(data, fold, test, 2)
    _, warnings = texts(found)
    assert warnings[-2:] == [
        "training images: 2 nearly equal one of another fold: 0.png (line 3) ≈ 3.png (line 6); "
        "validation scores may be too good: give the copies one group or drop them "
        "(data.duplicates: group or drop)",
        "training images: 2 nearly equal a test image: 0.png (line 3) ≈ 0.png, 3.png (line 6) ≈ "
        "0.png; scores there say little about new images",
    ]
    listed = [(n.image_path, n.other, n.kind) for n in found.near_duplicates]
    assert listed == [
        ("0.png", "3.png", "fold"),
        ("3.png", "0.png", "fold"),
        ("7.png", "9.png", "fold"),
        ("9.png", "7.png", "fold"),
        ("0.png", "0.png", "test"),
        ("3.png", "0.png", "test"),
        ("8.png", "1.png", "test"),
    ]
    assert audit(data, None, None, 1).near_duplicates == ()


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
    start = time.process_time()  # of all threads: what other processes do must not count
    found = audit(rows, make_folds(rows, FoldsConfig()), test, os.cpu_count() or 1)
    assert time.process_time() - start < 10  # 2 s; 10 s would be a regression
    assert (found.problems, found.warnings) == ((), ())
    assert len(found.sizes) == 2062 and max(map(max, found.sizes)) == 3024


# --- images with nothing in them, and classes that are none


def saved(folder: Path, name: str, pixels: NDArray[np.generic]) -> str:
    """Written by OpenCV, which keeps 16 bits a value."""
    assert cv2.imwrite(str(folder / name), pixels)
    return name


@pytest.mark.parametrize("top", [2**10 - 1, 2**12 - 1])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_few_bits_in_a_16_bit_file(tmp_path: Path, suffix: str, top: int, channels: int) -> None:
    rng = np.random.default_rng(0)
    names = photos(tmp_path, 20)
    shape = (24, 32) if channels == 1 else (24, 32, 3)
    names[4] = saved(tmp_path, f"few{suffix}", rng.integers(0, top, shape).astype(np.uint16))
    names[5] = saved(tmp_path, f"all{suffix}", rng.integers(0, 65536, shape).astype(np.uint16))
    problems, (warning,) = texts(audit(manifest(tmp_path, names), None, None, 2))
    assert problems == []
    assert warning.startswith("training images: 1 of 20 have 16 bits a value, but use less than an")
    assert warning.endswith(f"10-bit ones times 64: few{suffix}")


def test_black_and_plain_images(tmp_path: Path) -> None:
    names = photos(tmp_path, 20)
    test_names = photos(tmp_path / "t", 3, seed=1)
    noise = np.random.default_rng(0).integers(0, 4, (24, 32, 3)).astype(np.uint8)
    names[2] = saved(tmp_path, "black.png", noise)
    names[3] = saved(tmp_path, "black16.png", np.zeros((24, 32), np.uint16))
    names[4] = saved(tmp_path, "grey.png", noise + 100)
    dot = np.full((24, 32, 3), 255, np.uint8)
    dot[12, 16] = 0  # a faint drawing is no empty sheet
    names[5] = saved(tmp_path, "dot.png", dot)
    test_names[1] = saved(tmp_path / "t", "white.png", noise + 252)
    found = audit(manifest(tmp_path, names), None, image_set(tmp_path / "t", test_names), 2)
    assert [line for line in texts(found)[1] if "nearly equal" not in line] == [
        "training images: 2 of 20 are black: black.png, black16.png",
        "training images: 1 of 20 are of one colour, or nearly so: grey.png",
        "test images: 1 of 3 are of one colour, or nearly so: white.png",
    ]


@pytest.mark.parametrize("name", ["nan", "NaN", "<NA>", "null", "#N/A"])
def test_a_class_called_like_a_missing_value_is_told(tmp_path: Path, name: str) -> None:
    data = replace(manifest(tmp_path, photos(tmp_path, 20)), classes=("cat", name))
    _, (warning,) = texts(audit(data, None, None, 2))
    assert f"classes called like a missing value: {name!r} (10); leave these images out" in warning
    others = replace(data, classes=("None", "NA"))  # no defect, and natrium
    assert texts(audit(others, None, None, 2))[1] == []


@pytest.mark.parametrize("other", ["Cat", "c a t", "ｃａｔ", "cAT"])
def test_classes_that_differ_in_case_or_blanks_are_told(tmp_path: Path, other: str) -> None:
    data = replace(manifest(tmp_path, photos(tmp_path, 20)), classes=("cat", other))
    _, (warning,) = texts(audit(data, None, None, 2))
    assert f"in case or blanks alone: 'cat' (10) and {other!r} (10); if they are" in warning
    assert f"(data.merge_classes: {{cat: [cat, {other}]}})" in warning
