"""A run over data with faults that the config has an answer to, from `check` to the submission."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.end_to_end.conftest import CLASSES, TEST, TRAIN, Project
from tests.end_to_end.runs import Cli, Run, succeeded
from tests.pretend_tune import pretend_ray

RED, GREEN, BLUE = CLASSES
OTHER = "Green  pear"
TRUNCATED, COPY, EXCLUDED, RELABELLED = (f"사진 들/no {i}.png" for i in (3, 6, 9, 12))
BAD_TEST = ("t 2", "t 7")


def with_faults(project: Project) -> Path:
    """A damaged image, a copy, a class of two names, two test images that are none; the config."""
    folder = project.folder
    (folder / TRUNCATED).write_bytes((folder / TRUNCATED).read_bytes()[:300])
    shutil.copy(folder / "사진 들/no 0.png", folder / COPY)
    header, *rows = project.rows("train.csv")
    for i in (1, 4, 7, 10, 13):
        rows[i][1] = OTHER  # 5 of the 20 of its colour
    project.save_rows("train.csv", [header, *rows])
    for name in BAD_TEST:
        (folder / f"test/{name}.png").write_bytes(b"<html>")
    header, *rows = project.rows("sample submission.csv")
    project.save_rows("sample submission.csv", [[*header, OTHER], *([*r, 0] for r in rows)])
    project.save_rows("exclude.csv", [["image_path", "why"], [EXCLUDED, "a hand before it"]])
    project.save_rows("fixes.csv", [["image_path", "target"], [RELABELLED, BLUE]])
    project.config["data"] |= {
        "on_bad_image": "drop",
        "on_bad_test_image": "prior",
        "duplicates": "drop",
        "exclude": "exclude.csv",
        "fixes": "fixes.csv",
        "merge_classes": {GREEN: [GREEN, OTHER]},
    }
    project.config["search"] |= {"backbones": ["timm/test_resnet"], "candidates": 1}
    return project.write()


LINES = (
    f"data.fixes: 1 label changed: {RELABELLED}: {RED} -> {BLUE}",
    f"data.merge_classes: {GREEN} is {GREEN} (15 images), {OTHER} (5 images)",
    f"training data: 1 image left out, excluded: {EXCLUDED}",
    f"training data: 1 image left out, missing or unreadable: {TRUNCATED} (it ",
    f"training data: 1 image left out, copy: {COPY} (= 사진 들/no 0.png)",
    "test data: 2 images missing or unreadable: test/t ",
)


def told(output: str) -> str:
    """The output as it would be on a line without an end."""
    return " ".join(output.split())


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, make_project: Callable[[Path], Project], cli: Cli
) -> tuple[Run, str]:
    root = tmp_path_factory.mktemp("policies")
    config = with_faults(project := make_project(root / "my project"))
    with pytest.MonkeyPatch.context() as patch, pretend_ray():
        patch.setenv("FOLDRACE_CACHE", str(root / "cache"))
        done = succeeded(cli("run", config, "--out", root / "run"))
    return Run(root / "run", project), done.output


def test_what_is_left_out_is_told_at_once(run: tuple[Run, str], cli: Cli) -> None:
    found, output = run
    checked = succeeded(cli("check", found.project.folder / "sweep config.json"))
    for line in map(told, LINES):
        assert line in told(checked.output)
        assert line in told(output)
    assert f"{TRAIN - 3} images, 3 classes, {TEST} test images" in told(output)


def test_what_is_left_out_is_in_a_file_and_in_the_report(run: tuple[Run, str]) -> None:
    found, _ = run
    with (found.folder / "left_out.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(r["image_path"], r["data"], r["reason"]) for r in rows} == {
        (EXCLUDED, "training", "excluded"),
        (TRUNCATED, "training", "missing or unreadable"),
        (COPY, "training", "copy"),
        *((f"test/{name}.png", "test", "missing or unreadable") for name in BAD_TEST),
    }
    folds = found.folds()
    assert len(folds) == TRAIN - 3
    assert not {r["image_path"] for r in rows} & set(folds["image_path"])
    assert found.json("classes.json") == sorted(CLASSES)
    page = (found.folder / "report/index.html").read_text(encoding="utf-8")
    for text in (
        "1 image left out, excluded",
        "1 image left out, copy",
        "2 images missing or unreadable",
        "2 rows of submission.csv have no readable image",
        f"merged of {GREEN}, {OTHER}",
    ):
        assert " ".join(text.split()) in " ".join(page.split()), text


def test_the_submission_has_every_row_and_every_class(run: tuple[Run, str]) -> None:
    found, _ = run
    sample = found.project.rows("sample submission.csv")
    table = pd.read_csv(found.folder / "submission.csv")
    assert list(table.columns) == sample[0]
    assert table["id"].tolist() == [row[0] for row in sample[1:]]
    values = table.set_index("id")
    np.testing.assert_allclose(values.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(values[GREEN], 3 * values[OTHER], rtol=1e-6)  # as 15 to 5
    counts = found.folds()["target"].value_counts()
    for name in BAD_TEST:
        row = values.loc[name]
        assert row[GREEN] + row[OTHER] == pytest.approx(counts[GREEN] / len(found.folds()))
        assert row[RED] == pytest.approx(counts[RED] / len(found.folds()))
    others = values.drop(list(BAD_TEST))
    assert len(others.round(6).drop_duplicates()) == TEST - 2
    receipt = found.json("submission.receipt.json")
    assert set(receipt["without_image"]) == set(BAD_TEST)


def test_resume_leaves_out_the_same_though_the_file_is_sound_by_now(
    run: tuple[Run, str], tmp_path: Path, cli: Cli
) -> None:
    found, _ = run
    copied = shutil.copytree(found.folder, tmp_path / "run")
    broken = (found.project.folder / TRUNCATED).read_bytes()
    try:
        Image.new("RGB", (20, 20), "red").save(found.project.folder / TRUNCATED)
        done = succeeded(cli("resume", copied))
    finally:
        (found.project.folder / TRUNCATED).write_bytes(broken)
    assert "Nothing is left to do" in done.output
    for name in ("left_out.csv", "folds.csv", "merged_classes.json"):
        assert (copied / name).read_bytes() == (found.folder / name).read_bytes()
    refused = cli("resume", copied, "--set", "data.duplicates=report")
    assert refused.exit_code == 2
    assert "data.duplicates" in refused.output


def test_a_test_image_that_breaks_after_the_run(
    run: tuple[Run, str], tmp_path: Path, cli: Cli
) -> None:
    """By default `submit` names it; the key lets it go on."""
    found, _ = run
    copied = shutil.copytree(found.folder, tmp_path / "run")
    test = shutil.copytree(found.project.folder / "test", tmp_path / "data/test")
    for name in ("test.csv", "sample submission.csv"):
        shutil.copy(found.project.folder / name, tmp_path / "data")
    for name in BAD_TEST:
        shutil.copy(test / "t 0.png", test / f"{name}.png")
    (test / "t 4.png").unlink()
    at = [
        *("--test", tmp_path / "data/test.csv"),
        *("--sample-submission", tmp_path / "data/sample submission.csv"),
        *("--out", tmp_path / "s.csv"),
    ]
    refused = cli("submit", copied, *at, "--set", "data.on_bad_test_image=stop")
    assert refused.exit_code == 2, refused.output
    text = told(refused.output)
    assert "test.csv line 6: test/t 4.png: it does not exist; put the file right, or go" in text
    assert not (tmp_path / "s.csv").exists()
    done = succeeded(cli("submit", copied, *at))
    assert "1 row without a readable image, filled with the class freq" in told(done.output)
    assert len(pd.read_csv(tmp_path / "s.csv")) == TEST


def test_split_makes_the_folds_of_the_run(run: tuple[Run, str], tmp_path: Path, cli: Cli) -> None:
    found, _ = run
    out = tmp_path / "folds.csv"
    succeeded(cli("split", found.project.folder / "sweep config.json", "--out", out))
    assert out.read_bytes() == (found.folder / "folds.csv").read_bytes()


def test_without_the_keys_every_fault_is_a_problem(
    tmp_path: Path, make_project: Callable[[Path], Project], cli: Cli
) -> None:
    project = make_project(tmp_path / "my project")
    with_faults(project)
    for key in ("on_bad_image", "on_bad_test_image"):
        del project.config["data"][key]
    refused = cli("check", project.write())
    assert refused.exit_code == 2
    text = told(refused.output)
    assert f"train.csv line 5: {TRUNCATED}: unreadable" in text
    assert "or set data.on_bad_image: drop" in text
    assert text.count("or set data.on_bad_test_image: prior") == 2


def test_predict_counts_what_is_no_image(run: tuple[Run, str], tmp_path: Path, cli: Cli) -> None:
    found, _ = run
    folder = shutil.copytree(found.project.folder / "test", tmp_path / "new photos")
    (folder / "t 1.heic").touch()
    (folder / "notes").write_text("x")
    done = succeeded(cli("predict", found.folder, folder))
    assert "2 files left out, no image of a known kind: " in told(done.stderr)
    table = list(csv.reader(done.stdout.splitlines()))
    assert len(table) == 1 + TEST
    assert sum(row[1] == "ERROR" for row in table) == len(BAD_TEST)


def test_check_counts_what_is_no_image_in_class_folders(tmp_path: Path, cli: Cli) -> None:
    rng = np.random.default_rng(0)
    for i in range(24):
        path = tmp_path / f"photos/{('dog', 'cat')[i % 2]}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
    for name in ("cat/a.heic", "cat/b.heic", "dog/no suffix", "dog/c.psd"):
        (tmp_path / "photos" / name).write_bytes(b"x")
    config = tmp_path / "c.yaml"
    config.write_text(
        "data: {train: photos, test: photos}\nfolds: {k: 2}\n"
        "search: {backbones: [timm/test_resnet], candidates: 1}\n"
        "training: {pretrained: false, image_size: 32}\n"
    )
    text = told(succeeded(cli("check", config)).output)
    for data in ("training", "test"):
        line = f"{data} data: 4 files left out, no image of a known kind: .heic 2, .psd 1, no suf"
        assert line in text
    assert "24 images, 2 classes, 24 test images" in text
