"""`evaluate` from stored OOF rows: its tables against scikit-learn and the stored arrays."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
from PIL import Image

from foldrace.commands.evaluate import Asked, evaluate
from foldrace.commands.moved_data import AS_STORED
from foldrace.console.terminal import Terminal
from foldrace.core.errors import RunFolderError, UserError
from foldrace.evaluation.confusion_charts import OTHERS, most_confused, with_others
from foldrace.evaluation.rows import oof_rows
from foldrace.run_folder.blend_records import DecisionRule, MetricChoice
from foldrace.run_folder.store import RunStore
from tests.evaluation.conftest import WRONG, OofRun

pytestmark = pytest.mark.usefixtures("quick_charts")


def table(folder: str | Path, name: str) -> list[dict[str, str]]:
    with (Path(folder) / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def run(store: RunStore, **asked: Any) -> str:
    return evaluate(store.root, Asked(**asked), Terminal(quiet=True), AS_STORED)


def test_metrics_are_those_of_scikit_learn(oof_run: OofRun) -> None:
    folder = run(oof_run.store)
    found = {row["metric"]: row for row in table(folder, "metrics.csv")}
    y, prob = oof_run.labels, oof_run.blend / oof_run.blend.sum(axis=1, keepdims=True)
    said, sk = prob.argmax(axis=1), sklearn.metrics
    expected = {
        "log_loss": sk.log_loss(y, prob),
        "accuracy": sk.accuracy_score(y, said),
        "balanced_accuracy": sk.balanced_accuracy_score(y, said),
    }
    for average in ("macro", "weighted"):
        for name in ("f1", "precision", "recall"):
            score = getattr(sk, f"{name}_score")
            expected[f"{average}_{name}"] = score(y, said, average=average)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float(found[name]["value"]) == pytest.approx(value, abs=2e-3), name
        assert 0 < float(found[name]["standard_error"]) < 0.2
    meta = json.loads((Path(folder) / "metadata.json").read_text())
    assert meta["metrics"]["oof"]["accuracy"]["value"] == expected["accuracy"]
    assert set(meta["files"]) == {p.name for p in Path(folder).iterdir()} - {"metadata.json"}


def test_a_row_an_image(oof_run: OofRun) -> None:
    folder = run(oof_run.store)
    rows, folds = table(folder, "oof_predictions.csv"), oof_run.store.folds()
    assert [row["image_path"] for row in rows] == list(folds.image_paths)
    classes = oof_run.store.classes()
    for i, row in enumerate(rows):
        label = oof_run.labels[i]
        assert (row["label"], row["fold"]) == (classes[label], str(folds.fold[i]))
        assert float(row["p_true"]) == pytest.approx(oof_run.blend[i, label], rel=5e-3)
        assert float(row["loss"]) == pytest.approx(-np.log(float(row["p_true"])), abs=1e-4)
        votes = sum(int(p[i].argmax() == label) for p in oof_run.prob)
        assert (row["members"], row["votes_label"]) == ("2", str(votes))
    wrong = table(folder, "wrong_valid.csv")
    assert {row["image_path"] for row in wrong} >= {folds.image_paths[i] for i in WRONG}
    assert all(row["label"] != row["predicted"] for row in wrong)
    confidence = [float(row["confidence"]) for row in wrong]
    assert confidence == sorted(confidence, reverse=True)


def test_confusions_and_classes(oof_run: OofRun) -> None:
    folder = Path(run(oof_run.store))
    said = oof_run.blend.argmax(axis=1)
    expected = sklearn.metrics.confusion_matrix(oof_run.labels, said)
    with (folder / "confusion.csv").open(newline="") as file:
        _, *rows = csv.reader(file)
    np.testing.assert_array_equal([[int(v) for v in row[1:]] for row in rows], expected)
    pairs = table(folder, "confused_pairs.csv")
    np.fill_diagonal(expected, 0)
    assert sum(int(pair["rows"]) for pair in pairs) == expected.sum()
    counts = [int(row["rows"]) for row in table(folder, "classes.csv")]
    assert counts == np.bincount(oof_run.labels).tolist()
    for name in ("confusion.png", "confused_pairs.png"):
        assert Image.open(folder / name).size[0] > 100


def test_predictions_follow_the_decision_rule(oof_run: OofRun) -> None:
    blend = oof_run.store.blend.record()
    assert blend is not None
    choice = MetricChoice(
        metric="macro_f1", greater_is_better=True, value=0.9, se=None, tried=(), kept=0,
        rule=DecisionRule(log_weights=(50.0, 0.0, 0.0)),
    )  # fmt: skip
    oof_run.store.blend.update(blend.model_copy(update={"choice": choice}))
    rows = table(run(oof_run.store), "oof_predictions.csv")
    assert {row["predicted"] for row in rows} == {"blue"}


def test_each_call_has_a_folder_of_its_own(oof_run: OofRun, tmp_path: Path) -> None:
    assert run(oof_run.store) != run(oof_run.store)
    out = tmp_path / "elsewhere"
    assert run(oof_run.store, out=out) == str(out)
    with pytest.raises(UserError, match="is not empty; name a new folder"):
        run(oof_run.store, out=out)


def test_without_a_blend(tiny_run: Any) -> None:
    with pytest.raises(RunFolderError, match="has no blend yet"):
        run(tiny_run.store)


def test_a_blend_of_other_folds(oof_run: OofRun) -> None:
    blend = oof_run.store.blend.record()
    assert blend is not None
    oof_run.store.blend.update(blend.model_copy(update={"folds_hash": "0" * 64}))
    with pytest.raises(RunFolderError, match=r"of another folds\.csv"):
        oof_rows(oof_run.store)


def test_many_classes_keep_every_row() -> None:
    rng = np.random.default_rng(0)
    counts = np.diag(rng.integers(5, 30, 396)) + (rng.random((396, 396)) < 0.01)
    shown = most_confused(counts, 28)
    part = with_others(counts, shown)
    assert len(shown) <= 28 and len(set(shown)) == len(shown) and OTHERS not in shown
    assert part.sum() == counts.sum()
    np.testing.assert_array_equal(part[:-1, :-1], counts[np.ix_(shown, shown)])
    np.testing.assert_array_equal(part[:-1].sum(axis=1), counts[shown].sum(axis=1))
    wrong = counts - np.diag(np.diagonal(counts))
    a, b = np.unravel_index(np.argmax(wrong + wrong.T), wrong.shape)
    assert {int(a), int(b)} <= set(shown)
