"""What takes no part is counted and kept, by folders, tables, policies and the audit."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foldrace.config.schema import DataConfig
from foldrace.core.errors import DataError, RunFolderError
from foldrace.core.files import open_files
from foldrace.dataset.audit import audit, kept_rows, scan_rows
from foldrace.dataset.images import IMAGE_SUFFIXES
from foldrace.dataset.left_out import (
    NAME,
    LeftOut,
    left_out_csv,
    left_out_lines,
    read_left_out,
    unknown_kinds,
)
from foldrace.dataset.manifest import Manifest, read_manifest
from foldrace.dataset.test_set import ImageSet, read_test_set


def photo(seed: int, size: int = 60) -> Image.Image:
    """Smooth blobs: no two seeds look alike."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """24 photos that do not resemble one another."""
    for i in range(24):
        photo(i).save(tmp_path / f"{i}.png")
    return tmp_path


def manifest(root: Path, count: int = 24, groups: Sequence[str] | None = None) -> Manifest:
    """Rows alternate between cat and dog."""
    labels = np.arange(count, dtype=np.int64) % 2
    paths = tuple(f"{i}.png" for i in range(count))
    given = None if groups is None else tuple(groups)
    return Manifest(root, paths, labels, ("cat", "dog"), given, None)


def config(**keys: Any) -> DataConfig:
    return DataConfig(train="unused", **keys)


def copy(root: Path, original: int, *copies: int) -> None:
    for other in copies:
        shutil.copy(root / f"{original}.png", root / f"{other}.png")


# --- the file


def test_the_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = (
        LeftOut("a, b.jpg", "training", "copy", '= "c".jpg'),
        LeftOut("사진/\udcff.jpg", "test", "no image of a known kind"),
    )
    files = open_files(tmp_path)
    assert read_left_out(files) == ()
    for written in (rows, ()):
        files.write(NAME, left_out_csv(written))
        assert read_left_out(files) == written
    for damaged in (b"", b"image_path\n", left_out_csv(rows)[:-40], b"\0"):
        files.write(NAME, damaged)
        with pytest.raises(RunFolderError, match=r"left_out\.csv: is damaged"):
            read_left_out(files)


def test_files_of_no_known_kind_are_counted_by_suffix() -> None:
    names = ["a.txt", "b.TXT", "c.heic", "d", "e/f.heic", "g.psd", "h.txt"]
    (line,) = left_out_lines(unknown_kinds(names, "training"))
    assert str(line) == (
        "training data: 7 files left out, no image of a known kind: .txt 3, .heic 2, no suffix 1, "
        ".psd 1 (`pip install pillow-heif` reads them)"
    )
    (line,) = left_out_lines(unknown_kinds(["x.svg"], "test"))
    assert str(line) == "test data: 1 file left out, no image of a known kind: .svg 1"


@pytest.mark.parametrize("other", ["README.md", "cat/x.psd", "cat/noext", "dog/deep/x.json"])
def test_folders_tell_what_they_leave_out(tmp_path: Path, other: str) -> None:
    for name in ("cat/0.png", "cat/1.jpe", "dog/2.JPEG", "dog/deep/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        photo(1).save(tmp_path / name, "PNG")
    for litter in ("Thumbs.db", "cat/.DS_Store", "cat/desktop.ini", ".git/config"):
        (tmp_path / litter).parent.mkdir(exist_ok=True)
        (tmp_path / litter).touch()
    (tmp_path / other).write_text("x")
    data = DataConfig(train=str(tmp_path), test=str(tmp_path))
    assert read_manifest(data).left_out == unknown_kinds([other], "training")
    assert len(read_manifest(data)) == 4
    test = read_test_set(data, ("cat", "dog"))
    assert test is not None and test.left_out == unknown_kinds([other], "test")


def test_files_that_are_left_out_are_named_where_images_are_missing(tmp_path: Path) -> None:
    for name in ("a/0.png", "b/1.png", "c/2.psd", "test/t0.png", "test/t1.psd"):
        (tmp_path / "all" / name).parent.mkdir(parents=True, exist_ok=True)
        photo(1).save(tmp_path / "all" / name, "PNG")
    shutil.move(tmp_path / "all/test", tmp_path / "test")
    (tmp_path / "sample.csv").write_text("id,a,b\nt0,0,0\nt1,0,0\n")
    train, test = str(tmp_path / "all"), str(tmp_path / "test")
    with pytest.raises(DataError) as error:
        read_manifest(DataConfig(train=train))
    assert [str(p) for p in error.value.problems] == [
        f"{train}: class folders without images: c; remove them",
        "training data: 1 file left out, no image of a known kind: .psd 1",
    ]
    sample = str(tmp_path / "sample.csv")
    with pytest.raises(DataError) as error:
        read_test_set(DataConfig(train=train, test=test, sample_submission=sample), ("a", "b"))
    first, second = error.value.problems
    assert "ids without a test image: t1" in str(first)
    assert str(second) == "test data: 1 file left out, no image of a known kind: .psd 1"


def test_jpe_and_avif_are_images_with_this_pillow() -> None:
    assert {".jpe", ".avif"} <= IMAGE_SUFFIXES


# --- on_bad_image


def test_bad_training_images_are_dropped_with_their_reasons(photos: Path) -> None:
    (photos / "3.png").write_bytes((photos / "3.png").read_bytes()[:200])
    (photos / "4.png").unlink()
    (photos / "5.png").write_bytes(b"")
    found = scan_rows(manifest(photos), config(on_bad_image="drop"), 2)
    assert [int(path[:-4]) for path in found.manifest.image_paths] == [
        *range(3), *range(6, 24)
    ]  # fmt: skip
    assert found.manifest.labels.tolist() == [int(p[:-4]) % 2 for p in found.manifest.image_paths]
    assert [info.fault for info in found.infos] == [None] * 21
    assert [row.image_path for row in found.manifest.left_out] == ["3.png", "4.png", "5.png"]
    assert {row.reason for row in found.manifest.left_out} == {"missing or unreadable"}
    assert found.manifest.left_out[1].detail == "it does not exist"
    assert audit(found.manifest, None, None, 2, found.infos).problems == ()
    kept = scan_rows(manifest(photos), config(), 2)
    assert len(kept.manifest) == 24
    problems = audit(kept.manifest, None, None, 2, kept.infos).problems
    assert len(problems) == 3
    assert all(str(p).endswith(", or set data.on_bad_image: drop") for p in problems)


def test_where_most_images_are_bad_the_path_is_wrong(photos: Path) -> None:
    found = scan_rows(manifest(photos / "elsewhere"), config(on_bad_image="drop"), 2)
    assert len(found.manifest) == 24
    problems = audit(found.manifest, None, None, 2, found.infos).problems
    assert "24 of 24 are missing; correct the paths" in str(problems[0])


def test_a_class_without_a_sound_image_is_still_a_class(photos: Path) -> None:
    """So that the folds name it, and no column of the submission goes unseen."""
    rows = manifest(photos, 9)
    labels = rows.labels.copy()
    labels[:] = [0, 0, 0, 0, 1, 1, 1, 2, 2]
    rows = Manifest(photos, rows.image_paths, labels, ("a", "b", "c"), None, None)
    for i in (7, 8):
        (photos / f"{i}.png").write_bytes(b"no")
    found = scan_rows(rows, config(on_bad_image="drop"), 1).manifest
    assert found.classes == ("a", "b", "c")
    assert np.bincount(found.labels, minlength=3).tolist() == [4, 3, 0]


def test_bad_test_images_may_pass(photos: Path) -> None:
    (photos / "1.png").write_bytes(b"no")
    classes = ("cat", "dog")
    paths = tuple(f"{i}.png" for i in range(4))
    test = ImageSet(photos, paths, paths, "id", classes, ("id", *classes))
    rows = manifest(photos)
    rows = rows.chosen(np.arange(4, 24))
    (problem,) = audit(rows, None, test, 2).problems
    assert str(problem).endswith(", or set data.on_bad_test_image: prior")
    passed = audit(rows, None, test, 2, bad_tests_pass=True)
    assert passed.problems == ()
    (line,) = left_out_lines(passed.left_out)
    assert str(line).startswith("test data: 1 image missing or unreadable: 1.png (it is not an im")
    assert str(line).endswith("are the class frequencies of the training images")
    gone = ImageSet(photos / "x", paths, paths, "id", classes, ("id", *classes))
    assert len(audit(rows, None, gone, 2, bad_tests_pass=True).problems) == 1 + 3


# --- duplicates


def test_copies_and_their_copies_are_one_group(photos: Path) -> None:
    """A resized copy, a brighter one of that, and its exact copy; none of the others."""
    photo(0).resize((48, 48)).save(photos / "5.png")
    Image.open(photos / "5.png").point(lambda v: min(255, v + 20)).save(photos / "9.png")
    copy(photos, 9, 11)
    copy(photos, 20, 21)
    found = scan_rows(manifest(photos), config(duplicates="group"), 2).manifest
    assert found.groups is not None
    expected = [f"{i}.png" for i in range(24)]
    for row in (5, 9, 11):
        expected[row] = "0.png"
    expected[21] = "20.png"
    assert list(found.groups) == expected
    assert [str(note) for note in found.notes] == [
        "data.duplicates: group: 6 images equal or nearly equal another one; each of these 2 "
        "clusters is in one group"
    ]
    assert len(found) == 24 and found.left_out == ()


def test_copies_join_the_groups_that_they_lie_in(photos: Path) -> None:
    copy(photos, 0, 10)
    groups = [f"patient {i // 4}" for i in range(24)]  # 0 is of patient 0, 10 of patient 2
    found = scan_rows(manifest(photos, groups=groups), config(duplicates="group"), 2).manifest
    expected = [group.replace("patient 2", "patient 0") for group in groups]
    assert found.groups == tuple(expected)


def test_without_copies_there_are_no_groups(photos: Path) -> None:
    assert scan_rows(manifest(photos), config(duplicates="group"), 2).manifest.groups is None


def test_of_copies_the_first_of_each_label_stays(photos: Path) -> None:
    copy(photos, 0, 2)  # cat, cat
    copy(photos, 4, 7)  # cat and dog: one of the two is wrong
    photo(8).resize((48, 48)).save(photos / "12.png")  # cat, cat
    photo(8).resize((50, 50)).save(photos / "13.png")  # dog
    found = scan_rows(manifest(photos), config(duplicates="drop"), 2)
    gone = {row.image_path: (row.reason, row.detail) for row in found.manifest.left_out}
    assert gone == {
        "2.png": ("copy", "= 0.png"),
        "4.png": ("identical with another label", "= 7.png, cat and dog"),
        "7.png": ("identical with another label", "= 4.png, cat and dog"),
        "12.png": ("copy", "≈ 8.png"),
    }
    assert len(found.infos) == len(found.manifest) == 20
    fold = np.arange(20) // 8 % 2
    (near,) = audit(found.manifest, fold, None, 2, found.infos).warnings
    assert "8.png ≈ 13.png" in str(near)  # of another label: it is told, not decided


def test_kept_rows_are_those_of_the_scan(photos: Path) -> None:
    copy(photos, 0, 2)
    (photos / "3.png").unlink()
    for keys in ({}, {"duplicates": "drop"}, {"on_bad_image": "drop", "duplicates": "group"}):
        rows, data = manifest(photos), config(**keys)
        assert kept_rows(rows, data, 2).image_paths == scan_rows(rows, data, 2).manifest.image_paths
