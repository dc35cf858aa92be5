"""`evaluate` where it runs models: on labelled images, on those trained on, and what they look at;
against `Predictor` and against the fold models one by one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from foldrace.commands.evaluate import Asked, evaluate
from foldrace.commands.moved_data import AS_STORED
from foldrace.console.terminal import Terminal
from foldrace.core.errors import DataError, RunFailure
from foldrace.dataset.curation import merged_json
from foldrace.evaluation.labelled import read_labelled
from foldrace.evaluation.models import trained_on, trained_rows
from foldrace.inference.predictor import Predictor
from foldrace.inference.run_models import RunModels
from foldrace.run_folder.belonging import training_data
from foldrace.run_folder.store import RunStore
from tests.evaluation.conftest import WEIGHTS
from tests.evaluation.test_evaluate import table

pytestmark = pytest.mark.usefixtures("quick_charts")


def run(store: RunStore, **asked: Any) -> Path:
    return Path(evaluate(store.root, Asked(**asked), Terminal(quiet=True), AS_STORED))


@pytest.fixture
def labelled(tiny_images: Path, tmp_path: Path) -> Path:
    """A folder of some of the images, one damaged."""
    root = tmp_path / "labelled"
    for name in ("blue", "green", "red"):
        (root / name).mkdir(parents=True)
        for i in range(4):
            shutil.copy(tiny_images / name / f"{i}.png", root / name)
    (root / "green" / "broken.png").write_bytes(b"no image")
    return root


def test_labelled_images(model_run: RunStore, labelled: Path) -> None:
    folder = run(model_run, data=labelled)
    rows = table(folder, "inference_results.csv")
    [bad] = [row for row in rows if row["predicted"] == "ERROR"]
    assert bad["image_path"] == "green/broken.png" and bad["label"] == "green" and bad["error"]
    good = [row for row in rows if row is not bad]
    files = [labelled / row["image_path"] for row in good]
    predictor = Predictor(model_run)
    prob = predictor.probabilities(files)
    for row, p in zip(good, prob, strict=True):
        np.testing.assert_allclose([float(row[f"p_{c}"]) for c in predictor.classes], p, rtol=1e-4)
        assert row["predicted"] == predictor.classes[p.argmax()]
        assert row["label"] == Path(row["image_path"]).parent.name
    wrong = {row["image_path"] for row in table(folder, "wrong_test.csv")}
    assert wrong == {row["image_path"] for row in good if row["label"] != row["predicted"]}
    for name, of_member in predictor.member_probabilities(files).items():
        own = table(folder, f"output_{name.replace(' ', '_')}.csv")
        found = [[float(row[c]) for c in predictor.classes] for row in own]
        np.testing.assert_allclose(found, of_member, rtol=1e-4, atol=1e-6)
    about = json.loads((folder / "metadata.json").read_text())
    assert about["data"]["images"] == 12 and about["data"]["unreadable"] == 1
    assert about["data"]["ms_per_image"] > 0 and set(about["metrics"]) == {"oof", "data"}


def test_unknown_labels_are_named(model_run: RunStore, labelled: Path) -> None:
    (labelled / "red").rename(labelled / "rde")
    (labelled / "blue").rename(labelled / "teal")
    with pytest.raises(DataError) as error:
        run(model_run, data=labelled)
    text = str(error.value)
    assert "'rde' (4), 'teal' (4)" in text and "did you mean 'red'" in text
    assert "classes: blue, green, red" in text


def test_what_is_not_there_is_named_by_its_option(model_run: RunStore, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^--data .*/nowhere: .*does not exist"):
        run(model_run, data=tmp_path / "nowhere")


def test_a_part_of_a_merged_class_is_of_it(model_run: RunStore, labelled: Path) -> None:
    model_run.files.write("merged_classes.json", merged_json({"red": {"rot": 9, "rouge": 11}}))
    (labelled / "red").rename(labelled / "rouge")
    found = read_labelled(model_run, labelled, 1)
    assert sorted({model_run.classes()[i] for i in found.labels}) == ["blue", "green", "red"]


def test_nothing_readable(model_run: RunStore, labelled: Path) -> None:
    for file in labelled.rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(RunFailure, match="none of its 13 images could be read"):
        run(model_run, data=labelled)


def fold_blend(store: RunStore, fold: int, files: list[Path]) -> NDArray[np.float64]:
    """(n, C) of one fold's two models, each opened and run by itself, image by image."""
    models = RunModels(store, torch.device("cpu"))
    total = np.zeros((len(files), len(store.classes())))
    for number, weight in enumerate(WEIGHTS):
        model = models.open(f"c{number:04d}", "raw", fold)
        for row, file in enumerate(files):
            pixels = cv2.resize(np.asarray(Image.open(file).convert("RGB")), (32, 32))
            image = torch.from_numpy(pixels / np.float32(255)).permute(2, 0, 1)[None]
            with torch.no_grad():
                total[row] += weight * torch.softmax(model.module(image)[0], dim=0).numpy()
    return total


def test_a_row_is_trained_on_by_the_other_folds(model_run: RunStore) -> None:
    data = training_data(model_run)
    files = [data.file(row) for row in range(len(data))]
    found = trained_rows(Predictor(model_run), data, lambda done: None)
    fold = model_run.folds().fold
    for k in range(2):  # with two folds a row is trained on by exactly the other one
        np.testing.assert_allclose(
            found.prob[fold == k], fold_blend(model_run, 1 - k, files)[fold == k], atol=1e-5
        )
    rows = table(run(model_run, train=True), "wrong_train.csv")
    assert {row["image_path"] for row in rows} == {found.paths[i] for i in found.mistakes}


def test_who_is_trained_on_with_a_fixed_split() -> None:
    class Folds:
        k, by_repeat = 1, np.array([[0, -1, -2, -1]])

    class Store:
        def folds(self) -> type[Folds]:
            return Folds

    class Stub:
        store = Store()

    assert trained_on(Stub()).tolist() == [[False, True, False, True]]  # type: ignore[arg-type]


def test_pictures_of_the_highest_losses(model_run: RunStore, labelled: Path) -> None:
    folder = run(model_run, explain=3)
    worst = sorted(table(folder, "oof_predictions.csv"), key=lambda row: -float(row["loss"]))[:3]
    stems = [Path(row["image_path"]).stem for row in worst]
    names = sorted(path.name for path in (folder / "explain").iterdir())
    assert names == sorted([*(f"{i}_{s}.png" for i, s in enumerate(stems, 1)), "contact_sheet.png"])
    for name in names:
        assert len(np.unique(np.asarray(Image.open(folder / "explain" / name)))) > 50
    assert len(list((run(model_run, data=labelled, explain=2) / "explain").iterdir())) == 3
