"""`compare`: against scipy's paired test, scipy's optimiser and counts by hand."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy.optimize import minimize_scalar
from scipy.stats import ttest_rel

from foldrace.commands.compare import compare
from foldrace.comparison.differences import config_differences, image_rows, pairs
from foldrace.comparison.models import CANDIDATES, models
from foldrace.comparison.sides import compare_runs, short_names
from foldrace.comparison.submissions import TestPredictions as Predictions
from foldrace.comparison.submissions import rows_csv, shared_test_rows
from foldrace.comparison.together import together
from foldrace.config.schema import DataConfig, RaceConfig, SearchConfig, SweepConfig
from foldrace.core.errors import RunFolderError, UserError
from foldrace.core.metrics import row_losses
from foldrace.run_folder.store import RunStore

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def two(make_run: Make) -> tuple[Any, Any]:
    """Runs of the same images and labels, with other predictions and folds."""
    return make_run(seed=0), make_run(seed=1)


def test_paired_differences_are_those_of_scipy(two: tuple[Any, Any]) -> None:
    a, b = two
    comparison = compare_runs([a.store.root, b.store.root])
    (pair,) = pairs(comparison)
    rows = np.arange(len(a.labels))
    losses = []
    for run in (a, b):
        stored = np.exp(np.log(run.blend).astype(np.float16).astype(np.float64))
        stored /= stored.sum(axis=1, keepdims=True)
        losses.append(-np.log(stored[rows, run.labels]))
    found = ttest_rel(losses[1], losses[0])
    assert pair.loss.value == pytest.approx(np.mean(losses[1]) - np.mean(losses[0]), abs=1e-5)
    assert pair.loss.value / pair.loss.se == pytest.approx(found.statistic, rel=1e-3)
    right = [run.blend.argmax(axis=1) == run.labels for run in (a, b)]
    assert pair.only_first_right == int((right[0] & ~right[1]).sum())
    assert pair.only_second_right == int((right[1] & ~right[0]).sum())
    assert not comparison.same_folds


def test_the_mean_of_both_has_the_weights_that_scipy_finds(two: tuple[Any, Any]) -> None:
    comparison = compare_runs([run.store.root for run in two])
    found = together(comparison)
    assert found is not None
    a, b = (np.exp(-comparison.losses(side)) for side in comparison.sides)
    best = minimize_scalar(
        lambda w: -np.log(w * a + (1 - w) * b).mean(), bounds=(0, 1), method="bounded"
    )
    assert found.weights[0] == pytest.approx(best.x, abs=2e-3)
    losses = np.empty(len(a))
    for fold in range(3):  # cross-fitted by hand
        held = comparison.fold == fold
        w = minimize_scalar(
            lambda w, rest=~held: -np.log(w * a[rest] + (1 - w) * b[rest]).mean(),
            bounds=(0, 1),
            method="bounded",
        ).x
        losses[held] = -np.log(w * a[held] + (1 - w) * b[held])
    assert found.loss.value == pytest.approx(losses.mean(), abs=1e-4)
    least = min(comparison.losses(side).mean() for side in comparison.sides)
    assert found.change.value == pytest.approx(losses.mean() - least, abs=1e-4)


def test_images_come_by_how_far_the_losses_are_apart(two: tuple[Any, Any]) -> None:
    comparison = compare_runs([run.store.root for run in two])
    rows = image_rows(comparison)
    a, b = (comparison.losses(side) for side in comparison.sides)
    assert rows[0].apart == np.abs(a - b).max()
    place = comparison.image_paths.index(rows[0].path)
    assert rows[0].losses == (a[place], b[place])
    assert rows[0].label == comparison.classes[two[0].labels[place]]
    assert len(rows) == 240


def test_a_run_against_its_copy_differs_in_nothing(two: tuple[Any, Any], tmp_path: Path) -> None:
    shutil.copytree(two[0].store.root, tmp_path / "copy")
    comparison = compare_runs([two[0].store.root, str(tmp_path / "copy")])
    (pair,) = pairs(comparison)
    assert comparison.same_folds
    assert (pair.loss.value, pair.loss.se, pair.only_first_right) == (0.0, 0.0, 0)
    assert not pair.loss.is_clear


def test_models_are_the_stored_ones(two: tuple[Any, Any]) -> None:
    comparison = compare_runs([run.store.root for run in two])
    found = models(comparison)
    own = [m for m in found if m.run == comparison.sides[0].name]
    assert own[0].name == "blend" and 1 < len(own) <= 1 + CANDIDATES
    for model in own[1:]:
        prob = two[0].prob[model.name]
        rows = np.arange(len(prob))
        expected = row_losses(prob[rows, two[0].labels]).mean()
        assert model.logloss == pytest.approx(expected, abs=2e-3)
        assert model.accuracy == np.mean(prob.argmax(axis=1) == two[0].labels)


def test_classes_in_another_order_are_brought_together(make_run: Make) -> None:
    a = make_run(classes=("a", "b", "c"), broken=False)
    names = ("b", "c", "a")  # make_run gives row i the class i % 3 of its own order
    b = make_run(classes=names, broken=False, seed=3)
    with pytest.raises(RunFolderError, match="240 of 240 images have another label"):
        compare_runs([a.store.root, b.store.root])
    folds = Path(b.store.root) / "folds.csv"
    lines = folds.read_text().splitlines()
    fields = [line.split(",") for line in lines[1:]]
    mended = [",".join([f[0], "abc"[i % 3], *f[2:]]) for i, f in enumerate(fields)]
    folds.write_text("\n".join([lines[0], *mended]) + "\n")
    mended_store = RunStore(b.store.root)  # the other one remembers folds.csv
    record = mended_store.blend.record()
    assert record is not None
    update = {"folds_hash": mended_store.folds().hash}
    mended_store.blend.update(record.model_copy(update=update))
    comparison = compare_runs([a.store.root, b.store.root])
    side = comparison.sides[1]
    stored = b.store.blend.oof()
    assert side.prob[:, 0] == pytest.approx(stored[:, 2], abs=1e-3)  # "a" is its third class
    assert np.array_equal(side.predicted, side.prob.argmax(axis=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blend": False}, "has no blend yet"),
        ({"classes": ("고양이", "강아지", "other", "fourth")}, "has other classes than"),
    ],
)
def test_runs_that_cannot_be_compared(
    two: tuple[Any, Any], make_run: Make, options: dict[str, Any], message: str
) -> None:
    other = make_run(broken=False, **options)
    with pytest.raises(RunFolderError, match=message):
        compare_runs([two[0].store.root, other.store.root])


def test_one_run_and_the_same_run_twice_are_refused(two: tuple[Any, Any]) -> None:
    with pytest.raises(RunFolderError, match="two run folders or more"):
        compare_runs([two[0].store.root])
    with pytest.raises(RunFolderError, match="given twice"):
        compare_runs([two[0].store.root] * 2)


def test_all_problems_come_at_once(two: tuple[Any, Any], make_run: Make) -> None:
    without = make_run(blend=False)
    with pytest.raises(RunFolderError) as raised:
        compare_runs([two[0].store.root, without.store.root, "/nowhere/at/all"])
    assert len(raised.value.problems) == 2


def test_short_names_differ() -> None:
    assert short_names(["runs/a", "runs/b/"]) == ["a", "b"]
    assert short_names(["x/run", "y/run"]) == ["x/run", "y/run"]
    assert short_names(["s3://bucket/run", "./run/"]) == ["bucket/run", "run"]


def test_keys_that_differ() -> None:
    base = SweepConfig(
        name="old", data=DataConfig(train="a"), search=SearchConfig(backbones=("timm/x",))
    )
    other = base.model_copy(update={"race": RaceConfig(rule="none"), "name": "new"})
    found = {one.key: one.values for one in config_differences([base, other])}
    assert found == {"name": ('"old"', '"new"'), "race.rule": ('"gain"', '"none"')}


def _predictions(name: str, ids: str, predicted: list[int], sure: float) -> Predictions:
    prob = np.full((len(predicted), 3), (1 - sure) / 2)
    prob[np.arange(len(predicted)), predicted] = sure
    return Predictions(name, tuple(ids), np.array(predicted), prob)


def test_rows_of_the_test_set() -> None:
    rows = shared_test_rows(
        [
            _predictions("a", "pqrs", [0, 1, 2, 0], 0.5),
            _predictions("b", "srqp", [1, 2, 1, 0], 0.9),  # another order
            _predictions("c", "pqrsx", [0, 2, 2, 2, 0], 0.6),
        ]
    )
    assert rows is not None
    assert rows.ids == tuple("pqrs")
    lines = list(csv.DictReader(io.StringIO(rows_csv(rows, "img", ("A", "B", "C")))))
    assert [line["b_prediction"] for line in lines] == ["A", "B", "C", "B"]
    assert [line["b_confidence"] for line in lines] == ["0.900000"] * 4
    assert [line["votes"] for line in lines] == ["3", "2", "3", "1"]
    # of s all say something else: the surest run has it
    assert [line["majority"] for line in lines] == ["A", "B", "C", "B"]
    assert [line["agree"] for line in lines] == ["yes", "no", "yes", "no"]
    assert rows.agreement[0].tolist() == [1.0, 0.75, 0.5]
    other = _predictions("d", "t", [0], 0.9)
    assert shared_test_rows([_predictions("a", "p", [0], 0.5), other]) is None


def test_the_command_writes_its_folder_once(two: tuple[Any, Any], tmp_path: Path) -> None:
    text, out = io.StringIO(), tmp_path / "out"
    console = Console(file=text, width=200)
    compare([run.store.root for run in two], out, console)
    written = {path.name for path in out.iterdir()}
    assert written == {
        *("index.html", "model_accuracy.png", "correlation.png"),
        *("differences.csv", "config_differences.csv", "models.csv", "images.csv"),
    }
    assert "has no test set" in text.getvalue()
    page = (out / "index.html").read_text()
    assert "<script>alert" not in page and "http" not in page.split("</style>")[1]
    with pytest.raises(UserError, match="exists"):
        compare([run.store.root for run in two], out, console)
