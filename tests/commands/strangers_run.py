"""A run folder with a blend of one untrained model, as somebody else may have sent it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import Result
from typer.testing import CliRunner

from foldrace.dataset.folds import FoldTable
from foldrace.run_folder.blend_records import EnsembleRecord, MemberRecord
from foldrace.run_folder.records import CandidateRecord, Oof, TrialRecord, VariantScore
from foldrace.run_folder.store import RunStore
from foldrace.sweep import app
from foldrace.trainables.models.classifier import ModelConfig, build_classifier
from foldrace.trainables.predict import pack_weights

K, SIZE, BACKBONE = 2, 32, "timm/test_resnet"
CARD = ModelConfig(BACKBONE, 3, SIZE)


def add_blend(store: RunStore) -> RunStore:
    """One complete candidate, c0000, which is the blend."""
    params = {"image_size": SIZE}
    store.save_candidate(CandidateRecord(candidate="c0000", backbone=BACKBONE, params=params))
    torch.manual_seed(0)
    weights = pack_weights(build_classifier(CARD).state_dict(), CARD)
    for fold in range(K):
        rows = _rows(store.folds(), fold)
        score = VariantScore(
            rows=len(rows), val_logloss=1.1, calibrated_logloss=1.0, val_acc=0.3, epoch=0
        )
        prob = np.full((len(rows), 3), 1 / 3)
        store.save_trial(
            TrialRecord(
                candidate="c0000", fold=fold, status="finished", backbone=BACKBONE, params=params,
                folds_hash=store.folds().hash, seed=0, variants={"raw": score}, epochs_trained=1,
            ),
            oof={"raw": Oof(np.log(prob).astype(np.float16), prob[:, 0].astype(np.float32))},
            rows=rows,
            weights={"raw": weights},
        )  # fmt: skip
    store.blend.update(
        EnsembleRecord(
            method="greedy", members=(MemberRecord(candidate="c0000", variant="raw", weight=1.0),),
            oof_logloss=1.1, crossfit_logloss=1.1, crossfit_se=0, certificate=0,
            best_single_oof_logloss=1.1, best_single="c0000 raw", oof_accuracy=0.5,
            single_crossfit_logloss=1.1, members_considered=1, candidates_considered=1,
            folds_hash=store.folds().hash,
        )
    )  # fmt: skip
    return store


def typed(*words: object) -> Result:
    """A command line, in this process."""
    return CliRunner().invoke(app, [str(word) for word in words])


def edit(file: Path, **values: Any) -> None:
    """Put values into a JSON file; `a__b` is `b` within `a`, and `members__0__x` of a list."""
    found = json.loads(file.read_text(encoding="utf-8"))
    for path, value in values.items():
        *outer, last = path.split("__")
        inner = found
        for key in outer:
            inner = inner[int(key) if isinstance(inner, list) else key]
        inner[last] = value
    file.write_text(json.dumps(found), encoding="utf-8")


def _rows(folds: FoldTable, fold: int) -> Any:
    return np.flatnonzero(folds.fold == fold)
