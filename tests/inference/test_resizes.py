"""Each way to make an image square: whatever scores an image later goes by the candidate's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from foldrace.config.schema import DataConfig, FoldsConfig, SearchConfig, SweepConfig
from foldrace.dataset.folds import folds_csv, make_folds
from foldrace.dataset.manifest import read_manifest
from foldrace.inference.predictor import Predictor
from foldrace.inference.run_models import RunModels
from foldrace.inference.soup_scoring import Ingredient, Scorer
from foldrace.run_folder.blend_records import EnsembleRecord, MemberRecord
from foldrace.run_folder.store import RunStore
from foldrace.trainables.predict import pack_weights, read_model_config
from foldrace.trainables.spec import EpochReport
from foldrace.trainables.trial import run_trial
from tests.conftest import TinyRun
from tests.trainables.written_trials import written_trial

PARAMS: dict[str, Any] = {
    "precision": "fp32", "pretrained": False, "epochs": 6, "image_size": 32, "batch_size": 12,
    "lr": 5e-3, "policy": "light", "mixup_prob": 0.0, "ema_epochs": 0.0,
}  # fmt: skip


class Patient:
    """Lets the trial end."""

    def report(self, epoch: EpochReport) -> None:
        pass

    def stop_requested(self) -> bool:
        return False


@pytest.fixture
def run(tmp_path: Path) -> TinyRun:
    """Wide noise of two classes, which differ in the first and last sixth alone."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(("blue", "red")):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for i in range(30):
            pixels = rng.integers(0, 256, (24 + i % 3, 72, 3))
            pixels[:, :12, label], pixels[:, -12:, label] = 255, 255
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    config = SweepConfig(
        name="run",
        data=DataConfig(train=str(tmp_path / "images")),
        folds=FoldsConfig(k=1),
        search=SearchConfig(backbones=("timm/test_resnet",)),
    )
    manifest = read_manifest(config.data)
    store = RunStore(tmp_path / "run")
    folds = folds_csv(manifest, make_folds(manifest, config.folds))
    store.create(config, folds, manifest.classes, ())
    return TinyRun(store, manifest.image_root)


def blend_of(store: RunStore, candidate: str) -> EnsembleRecord:
    return EnsembleRecord(
        method="greedy", members=(MemberRecord(candidate=candidate, variant="raw", weight=1.0),),
        oof_logloss=1, crossfit_logloss=1, crossfit_se=0, certificate=0,
        best_single_oof_logloss=1, best_single=f"{candidate} raw", oof_accuracy=0.5,
        single_crossfit_logloss=1, members_considered=1, candidates_considered=1,
        folds_hash=store.folds().hash,
    )  # fmt: skip


def test_predictions_are_the_out_of_fold_rows(run: TinyRun) -> None:
    store, losses = run.store, {}
    rows = np.flatnonzero(store.folds().fold == 0)
    files = [run.images / store.folds().image_paths[row] for row in rows]
    for number, how in enumerate(("squash", "pad", "crop")):
        name = f"c000{number}"
        spec = written_trial(run, name, "timm/test_resnet", PARAMS | {"resize": how})
        record = run_trial(spec, Patient())
        losses[how] = record.variants["raw"].calibrated_logloss
        oof = store.oof(name, "raw")
        store.blend.update(blend_of(store, name))
        found = Predictor(store).probabilities(files)
        np.testing.assert_allclose(found, oof, atol=2e-3)

        weights = store.weights(name, 0, "raw")
        models, card = RunModels(store, torch.device("cpu")), read_model_config(weights)
        assert card.resize == how and models.model_config(record) == card
        again = Scorer(models, 1).average([Ingredient(name, "raw", 0.0)], card)
        np.testing.assert_allclose(again.folds[0].log_prob, np.log(found), atol=2e-2)

        other = replace(card, resize="crop" if how != "crop" else "pad")
        state = models.state(name, "raw", 0)
        of_other = record.model_copy(update={"params": record.params | {"resize": other.resize}})
        store.save_trial(of_other, weights={"raw": pack_weights(state, other)})
        assert np.abs(Predictor(store).probabilities(files) - oof).max() > 0.05
    assert losses["squash"] < 0.2 and losses["pad"] < 0.2  # nats
    assert losses["crop"] > 0.5  # what is scored holds no class: ln 2 is 0.69
