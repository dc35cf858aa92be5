"""The notebook of `--kaggle`, run outside of Kaggle on a small competition."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from foldrace.config.schema import DataConfig
from foldrace.core.errors import EnvironmentProblem
from foldrace.export.blend import open_blend
from foldrace.export.bundle import write_bundle
from foldrace.export.folder import new_folder
from foldrace.export.kaggle import download_wheels, require_test_set, write_kaggle
from foldrace.export.shipped.bundle_predict import Blend
from foldrace.export.shipped.kaggle_submission import write_submission
from foldrace.inference.predictor import Predictor
from foldrace.run_folder.store import RunStore
from tests.export.exported_runs import FORBIDDEN, MadeModel, make_run, run_without

CLASSES = ("blue", "green", "red")
SAMPLES = {
    "probabilities": "id,red,blue,green\n{0},0,0,0\n{1},0,0,0\n{2},0,0,0\n",
    "labels": "id,label\n{0},blue\n{1},red\n{2},green\n",
    "long": "key,p\n" + "".join(f"{{{i}}}_{c},0\n" for i in range(3) for c in CLASSES),
}


def competition(root: Path, ids: list[str], sample: str) -> Path:
    """A table of test images, the images and a sample, as a competition gives them."""
    (root / "test").mkdir(parents=True)
    (root / "train").mkdir()
    rng = np.random.default_rng(len(ids[0]) + int(ids[0]))
    for name in ids:
        for part in ("test", "train"):  # the training images have the same names
            coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((32, 32)).save(root / part / f"{name}.png")
    (root / "sample_submission.csv").write_text(sample.format(*ids))
    return root


def exported(tmp_path: Path, images: Path, sample: str) -> tuple[RunStore, Path]:
    known = competition(tmp_path / "known", ["001", "002", "003"], sample)
    data = DataConfig(
        train=str(images), test=str(known / "test"),
        sample_submission=str(known / "sample_submission.csv"),
    )  # fmt: skip
    store = make_run(tmp_path / "run", images, [MadeModel("timm/test_resnet", 1.0)], data=data)
    blend = open_blend(store)
    folder = tmp_path / "input" / "datasets" / "me" / "blend"
    with new_folder(folder) as part:
        write_kaggle(blend, require_test_set(blend), part, "bundle")
        write_bundle(blend, part, 1)
    return store, folder


def run_notebook(tmp_path: Path, folder: Path) -> list[list[str]]:
    """Rows of the submission that the notebook writes of a hidden test set."""
    notebook = nbformat.read(folder / "submission.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    (tmp_path / "work").mkdir()
    run_without(
        FORBIDDEN, code, tmp_path,
        KAGGLE_INPUT=str(tmp_path / "input"), KAGGLE_WORKING=str(tmp_path / "work"),
    )  # fmt: skip
    with (tmp_path / "work" / "submission.csv").open(newline="") as file:
        return list(csv.reader(file))


IDS = ["107", "105", "106"]


def test_the_notebook_submits_a_hidden_test_set(tmp_path: Path, tiny_images: Path) -> None:
    """An unreadable image gets the frequencies of the classes."""
    store, folder = exported(tmp_path, tiny_images, SAMPLES["probabilities"])
    hidden = competition(tmp_path / "input" / "contest", IDS, SAMPLES["probabilities"])
    (hidden / "test" / "105.png").write_bytes(b"no image")
    header, *rows = run_notebook(tmp_path, folder)
    assert header == ["id", "red", "blue", "green"] and [row[0] for row in rows] == IDS
    found = np.array([row[1:] for row in rows], float)
    readable = [hidden / "test" / f"{name}.png" for name in ("107", "106")]
    expected = Predictor(store, device="cpu").probabilities(readable)[:, [2, 0, 1]]
    np.testing.assert_allclose(found[[0, 2]], expected, atol=0.01)
    np.testing.assert_allclose(found[1], 1 / 3, atol=1e-6)
    assert abs(found[0, 0] - 1 / 3) > 1e-4


@pytest.mark.parametrize("kind", ["labels", "long"])
def test_other_forms_of_samples(tmp_path: Path, tiny_images: Path, kind: str) -> None:
    store, folder = exported(tmp_path, tiny_images, SAMPLES[kind])
    hidden = competition(tmp_path / "input" / "contest", IDS, SAMPLES[kind])
    out = tmp_path / "submission.csv"
    assert "3 images, 0 unreadable" in write_submission(
        tmp_path / "input", Blend(folder, "cpu"), out
    )
    header, *rows = csv.reader(out.read_text().splitlines())
    images = [hidden / "test" / f"{name}.png" for name in IDS]
    prob = Predictor(store, device="cpu").probabilities(images)
    if kind == "labels":
        assert header == ["id", "label"]
        assert rows == [[i, CLASSES[c]] for i, c in zip(IDS, prob.argmax(axis=1), strict=True)]
    else:
        assert [row[0] for row in rows] == [f"{i}_{c}" for i in IDS for c in CLASSES]
        found = np.array([row[1] for row in rows], float).reshape(3, 3)
        np.testing.assert_allclose(found, prob, atol=0.01)


def test_what_the_data_set_says_of_itself(tmp_path: Path, tiny_images: Path) -> None:
    _, folder = exported(tmp_path, tiny_images, SAMPLES["labels"])
    about = json.loads((folder / "dataset-metadata.json").read_text())
    assert about["id"].endswith("/run-blend") and about["title"] == "run blend"
    form = json.loads((folder / "submission_form.json").read_text())
    assert (form["kind"], form["id_at"], form["value_at"]) == ("labels", 0, 1)


def test_no_network_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_NO_CACHE_DIR": "1",
        "PIP_CONFIG_FILE": "/dev/null", "PIP_TIMEOUT": "2",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with pytest.raises(EnvironmentProblem) as raised:
        download_wheels(tmp_path, "bundle")
    text = str(raised.value)
    assert text.startswith("--kaggle: the wheels of timm==") and "cannot be downloaded" in text
    assert "Is the package index within reach?" in text
