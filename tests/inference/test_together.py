"""All models at once against one model after the other, and images in every form."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from foldrace.core.errors import UserError
from foldrace.core.metrics import log_loss
from foldrace.inference.engine.passes import FoldKey, memory_limit, passes
from foldrace.inference.predictor import Predictor
from foldrace.inference.run_models import RunModels
from foldrace.inference.tta import AveragedViews, find_tta
from foldrace.run_folder.store import RunStore
from foldrace.sweep import app
from foldrace.trainables.data.loader import loader_settings
from foldrace.trainables.predict import log_probabilities, scoring_loader
from tests.inference.tiny_blend import MEMBERS, WEIGHTS, K, with_blend

CPU = torch.device("cpu")


@pytest.fixture
def blend(make_tiny_run: Callable[..., Any]) -> RunStore:
    """Untrained models of three candidates, two of which see the same images."""
    return with_blend(make_tiny_run("run", k=K).store)


@pytest.fixture
def files(tiny_images: Path) -> list[Path]:
    """More than one batch of 64, of different shapes."""
    found = sorted(tiny_images.rglob("*.png"))
    return [*found, *found[:20]]


def one_by_one(store: RunStore, files: list[Path], tta: str = "none") -> NDArray[np.float64]:
    """Each model with a loader of its own: how a blend was predicted before."""
    run = RunModels(store, CPU)
    product = np.ones((len(files), 3))
    for fold in range(K):
        mixed = np.zeros((len(files), 3))
        for name, weight in zip(MEMBERS, WEIGHTS, strict=True):
            model = run.open(name, "raw", fold)
            source = run.images(files, model.model_config, 1, "a session")
            settings, rows = loader_settings(1, "cpu"), np.arange(len(files))
            loader = scoring_loader(source, rows, model.model_config, 64, settings, run.parts)
            seen = AveragedViews(model.module, find_tta(tta), "softmax")
            mixed += weight * np.exp(
                log_probabilities(seen, loader, CPU, model.autocast, "softmax")[0]
            )
        product *= mixed
    mean = product ** (1 / K)
    return mean / mean.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("tta", ["none", "flip,scale:1.2"])
@pytest.mark.parametrize("max_memory", [None, 1])
def test_together_is_one_by_one(
    blend: RunStore, files: list[Path], tta: str, max_memory: int | None
) -> None:
    done: list[int] = []
    predictor = Predictor(blend, workers=2, tta=tta, device="cpu", max_memory=max_memory)
    found = predictor.probabilities(files, done.append)
    np.testing.assert_allclose(found, one_by_one(blend, files, tta), atol=2e-6)
    assert done == list(range(1, 7))
    np.testing.assert_allclose(predictor.probabilities(files[:3]), found[:3], atol=2e-6)


def test_images_of_every_form_in_their_order(
    blend: RunStore, files: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pixels = np.asarray(Image.open(files[0]))
    grey, rgba = pixels[..., 0], np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"nothing")
    given = [
        files[0], broken, pixels, str(files[0]), Image.fromarray(pixels), rgba, grey,
        grey[..., None], tmp_path / "absent.png", pixels.astype(np.float32), files[1],
    ]  # fmt: skip
    before = {path: path.stat().st_mtime_ns for path in Path(blend.root).rglob("*")}
    with caplog.at_level(logging.INFO, "foldrace"):
        found = Predictor(blend, device="cpu").predict(given, top_k=2)
    assert {path: path.stat().st_mtime_ns for path in Path(blend.root).rglob("*")} == before
    assert [i for i, one in enumerate(found) if one.label == "ERROR"] == [1, 8, 9]
    assert "not an image" in found[1].error and "not exist" in found[8].error
    assert "image 9" not in found[9].error and "float32" in found[9].error
    expected = one_by_one(blend, [files[0], files[1]])
    for i in (0, 2, 3, 4, 5):
        np.testing.assert_allclose(found[i].probabilities, expected[0], atol=2e-6)
    np.testing.assert_allclose(found[10].probabilities, expected[1], atol=2e-6)
    np.testing.assert_allclose(found[6].probabilities, found[7].probabilities, atol=1e-9)
    best = int(expected[0].argmax())
    assert found[0].label == ("blue", "green", "red")[best] == found[0].top_k[0][0]
    assert found[0].confidence == found[0].top_k[0][1] > found[0].top_k[1][1]
    assert len(found[0].top_k) == 2
    assert "8 images predicted, 3 unreadable" in caplog.text and "ms an image" in caplog.text


def test_nothing_and_nothing_readable(blend: RunStore, tmp_path: Path) -> None:
    predictor = Predictor(blend, device="cpu", max_memory=1)
    assert predictor.predict([]) == []
    assert predictor.probabilities([]).shape == (0, 3)
    assert [one.label for one in predictor.predict([tmp_path / "absent.png"] * 2)] == ["ERROR"] * 2


def test_oof_rows_are_predicted_by_models_that_did_not_train_on_them(blend: RunStore) -> None:
    rows, fold = np.arange(60), blend.folds().fold
    found = Predictor(blend, device="cpu").oof_probabilities(rows)
    images = Path(blend.config().data.train)
    listed = [images / path for path in blend.folds().image_paths]
    run, expected = RunModels(blend, CPU), np.zeros((60, 3))
    for k in range(K):
        mine = np.flatnonzero(fold == k)
        for name, weight in zip(MEMBERS, WEIGHTS, strict=True):
            model = run.open(name, "raw", k)
            source = run.images(listed, model.model_config, 1, "a session")
            loader = scoring_loader(source, mine, model.model_config, 64, loader_settings(1, "cpu"))
            log_prob, _ = log_probabilities(model.module, loader, CPU, model.autocast, "softmax")
            expected[mine] += weight * np.exp(log_prob)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert np.isfinite(log_loss(found, blend.labels()))


def test_passes_hold_what_fits() -> None:
    keys = [FoldKey("", f"c{i}", "raw", 0) for i in range(5)]
    sizes = dict(zip(keys, (3, 3, 9, 1, 1), strict=True))
    assert passes(keys, sizes, 6) == [tuple(keys[:2]), (keys[2],), tuple(keys[3:])]
    assert passes(keys, sizes, 100) == [tuple(keys)]
    assert passes([], {}, 1) == []


@pytest.mark.parametrize(
    ("text", "count"), [("2GB", 2 * 10**9), ("1.5 mb", 1_500_000), ("800", 800), (7, 7)]
)
def test_sizes_of_memory(text: str | int, count: int) -> None:
    assert memory_limit(text, CPU) == count


@pytest.mark.parametrize("text", ["lots", "0", "-1GB", "2GiB", ""])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--max-memory: got .*allowed: a size above 0 such as 2GB"):
        memory_limit(text, CPU)


def test_the_command_takes_any_column_and_the_likeliest_classes(
    blend: RunStore, files: list[Path], tmp_path: Path
) -> None:
    table = tmp_path / "photos.csv"
    table.write_text("who,photo\n" + "".join(f"a,{file}\n" for file in files[:2]))
    asked = ["predict", blend.root, "--csv", str(table), "--column", "photo"]
    done = CliRunner().invoke(app, [*asked, "--top-k", "2", "--max-memory", "1MB"])
    assert done.exit_code == 0, done.output
    header, *rows = [line.split(",") for line in done.stdout.splitlines()]
    assert header == ["image_path", "class", "confidence", "class_2", "confidence_2", "error"]
    expected = one_by_one(blend, files[:2])
    for row, prob in zip(rows, expected, strict=True):
        second, best = np.argsort(prob)[-2:]
        names = ("blue", "green", "red")
        assert (row[1], row[3]) == (names[best], names[second])
        assert [float(row[2]), float(row[4])] == pytest.approx([prob[best], prob[second]], rel=1e-4)
    wrong = CliRunner().invoke(app, [*asked[:4], "--column", "foto", "--tta", "scale:9"])
    assert wrong.exit_code == 2 and "did you mean 'photo'?" in wrong.stderr
    many = CliRunner().invoke(app, ["predict", blend.root, str(files[0]), "--top-k", "4"])
    assert many.exit_code == 2 and "allowed: 1 to 3" in many.stderr
