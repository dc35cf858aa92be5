"""What is exported of a blend, and which rows a fold model may score."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from foldrace.commands.export import ExportOptions, export
from foldrace.console.terminal import Terminal
from foldrace.core.consent import allow_plugins
from foldrace.core.errors import RunFolderError, UserError
from foldrace.core.plugin_files import PluginFile
from foldrace.dataset.folds import FoldTable
from foldrace.export.blend import ExportedBlend, open_blend
from foldrace.run_folder.store import RunStore
from tests.export.exported_runs import MadeModel, make_run

ONE = (MadeModel("timm/test_resnet", 1.0),)
PLUGIN = b"""from torch import nn
from foldrace.parts import Head
PARTS = [Head("wide", "a head", lambda f, c, d: nn.Sequential(nn.Linear(f, c)))]
"""


def exporting(store: RunStore, out: Path, **options: object) -> UserError:
    with pytest.raises(UserError) as raised:
        export(store.root, out, ExportOptions(**options), Terminal())  # type: ignore[arg-type]
    assert not out.exists() or not (out / "bundle.json").exists()
    assert [p for p in out.parent.iterdir() if p.name.startswith(f".{out.name}")] == []
    return raised.value


def test_wrong_options_are_named_before_anything_is_done(tmp_path: Path, tiny_images: Path) -> None:
    store = make_run(tmp_path / "run", tiny_images, ONE)
    error = exporting(store, tmp_path / "out", form="bundel")
    assert str(error) == "--format: got 'bundel'; did you mean 'bundle'? allowed: bundle, onnx"
    error = exporting(store, tmp_path / "out", fp16=True, int8=True)
    assert [problem.where for problem in error.problems] == ["--fp16", "--int8"]
    (tmp_path / "out").mkdir()
    assert "exists; remove it" in str(exporting(store, tmp_path / "out"))
    error = exporting(store, tmp_path / "kaggle", kaggle=True)
    assert "--kaggle: the run has no data.test" in str(error)


def test_the_command_says_what_was_written(
    tmp_path: Path, tiny_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_run(tmp_path / "run", tiny_images, ONE)
    out = tmp_path / "new" / "bundle"
    export(store.root, out, ExportOptions(), Terminal())
    text = " ".join(capsys.readouterr().out.split())
    assert "bundle: 1 member, 2 fold models," in text
    assert "Parity on 60 OOF images: probabilities differ by at most" in text
    assert "Licences of the first weights: timm/test_resnet: apache-2.0" in text
    assert text.endswith("predict.py IMAGE ...")
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]


def test_what_has_no_model_is_refused(tmp_path: Path, tiny_images: Path) -> None:
    store = make_run(tmp_path / "run", tiny_images, ONE)
    record = store.blend.record()
    assert record is not None
    members = (record.members[0].model_copy(update={"added": True, "candidate": "notebook"}),)
    store.blend.update(record.model_copy(update={"members": members}))
    error = exporting(store, tmp_path / "out")
    assert isinstance(error, RunFolderError) and "predicted elsewhere (notebook)" in str(error)


def test_a_plugins_head_goes_into_no_bundle(tmp_path: Path, tiny_images: Path) -> None:
    plugins = [PluginFile("mine", PLUGIN, "mine.py")]
    allow_plugins(plugins)
    models = (MadeModel("timm/test_resnet", 1.0, head="wide"),)
    store = make_run(tmp_path / "run", tiny_images, models, plugins=plugins)
    error = exporting(store, tmp_path / "out")
    assert "head wide is a plugin's" in str(error) and "`--format onnx`" in str(error)
    assert open_blend(store, code_free=False).members[0].model_config.head == "wide"


def _blend_of_folds(store: RunStore, table: FoldTable, classes: int) -> ExportedBlend:
    """One member; its store has these folds."""
    blend = open_blend(store)
    store._folds = table
    return replace(blend, oof_logloss=0.0)


def test_oof_rows_are_scored_by_the_models_that_have_not_seen_them(
    tmp_path: Path, tiny_images: Path
) -> None:
    """Model f says class f of everything: the classes found are the folds asked."""
    store = make_run(tmp_path / "run", tiny_images, ONE)
    blend = open_blend(store)
    first = np.array([0, 1, 2, 0, 1, 2])
    later = np.array([5, 4, 3, 3, 4, 5])
    store._folds = FoldTable(("a",) * 6, ("x",) * 6, None, first, "hash", (later,))
    rows = np.array([4, 0, 2])
    log_probs = np.full((1, 6, 3, 6), np.log(0.02), np.float32)
    log_probs[0, np.arange(6), :, np.arange(6)] = np.log(0.9)
    prob = blend.of_own_folds(log_probs, rows)
    expected = [{1, 4}, {0, 5}, {2, 3}]
    assert [set(row.argsort()[-2:].tolist()) for row in prob] == expected
    np.testing.assert_allclose(np.sort(prob, axis=1)[:, -2:], 0.46, atol=1e-6)


def test_fewer_members_have_their_weights_and_temperature_anew(
    tmp_path: Path, tiny_images: Path
) -> None:
    models = [MadeModel("timm/test_resnet", weight) for weight in (0.1, 0.6, 0.3)]
    store = make_run(tmp_path / "run", tiny_images, models, blend_temperature=0.8)
    rng = np.random.default_rng(0)
    labels, rows = store.labels(), np.arange(len(store.labels()))
    logits = rng.normal(0, 1, (3, len(rows), 3))
    logits[:, rows, labels] += 1.5
    prob = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    _save_oof(store, prob)
    blend = open_blend(store, 2)
    assert [m.record.candidate for m in blend.members] == ["c0001", "c0002"]
    np.testing.assert_allclose(blend.combiner.weights, [2 / 3, 1 / 3])
    mixed = 2 / 3 * prob[1] + 1 / 3 * prob[2]
    cooled = mixed ** (1 / blend.temperature)
    cooled /= cooled.sum(axis=1, keepdims=True)
    assert blend.oof_logloss == pytest.approx(-np.log(cooled[rows, labels]).mean(), abs=1e-3)
    assert blend.temperature != 0.8 and blend.considered == 3


def _save_oof(store: RunStore, prob: np.ndarray) -> None:  # type: ignore[type-arg]
    """OOF rows of each candidate, beside the weights that are there."""
    from foldrace.run_folder.records import Oof, VariantScore

    table = store.folds()
    for i in range(len(prob)):
        for fold in range(table.k):
            name, rows = f"c{i:04d}", table.rows_of(fold)
            record = store.trial(name, fold)
            assert record is not None
            weights = {"raw": store.weights(name, fold, "raw")}
            own = prob[i, rows]
            true = own[np.arange(len(rows)), store.labels()[rows]].astype(np.float32)
            score = VariantScore(
                rows=len(rows), val_logloss=1.0, calibrated_logloss=1.0, val_acc=0.5, epoch=0
            )
            store.clear_trial(name, fold)
            store.save_trial(
                record.model_copy(update={"variants": {"raw": score}}),
                {"raw": Oof(np.log(own).astype(np.float16), true)}, rows, weights,
            )  # fmt: skip
