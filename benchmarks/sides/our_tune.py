"""Our scheduling alone: `run_sweep` with a trainable that sleeps instead of training.

`python our_tune.py CANDIDATES FOLDS SECONDS OUT`, as `plain_tune.py`. All else is the
product's own: searcher, ledger, study, journal, tables, and a record in the run folder for each
trial.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from foldrace.config.schema import SweepConfig
from foldrace.run_folder.records import TrialRecord, VariantScore
from foldrace.run_folder.store import RunStore
from foldrace.run_folder.variants import RAW
from foldrace.scheduling.ray import tuner
from foldrace.scheduling.ray.cluster import connect
from foldrace.scheduling.ray.fold_trial import TrialJob
from foldrace.search_spaces.space import build_space

_ROWS = 30


def _sleeper(sleep: float) -> Callable[[TrialJob], Callable[[dict[str, Any]], None]]:
    """Stands in for the function that makes the trainable of a sweep."""

    def trainable(job: TrialJob) -> Callable[[dict[str, Any]], None]:
        def fold_trial(config: dict[str, Any]) -> None:
            from ray import tune

            time.sleep(sleep)
            store = RunStore.open(job.run)
            candidate = store.candidate(config["candidate"])
            loss = float(candidate.params["lr"])
            tune.report({"epoch": 0, "val_logloss": loss})
            store.save_trial(
                TrialRecord(
                    candidate=config["candidate"],
                    fold=config["fold"],
                    status="finished",
                    backbone=candidate.backbone,
                    params=candidate.params,
                    folds_hash=store.folds().hash,
                    seed=0,
                    variants={
                        RAW: VariantScore(
                            rows=_ROWS,
                            val_logloss=loss,
                            calibrated_logloss=loss,
                            val_acc=0.5,
                            epoch=0,
                        )
                    },
                )
            )

        return fold_trial

    return trainable


def _run_folder(folder: str, candidates: int, folds: int) -> tuple[RunStore, SweepConfig]:
    settings = {
        "name": "trivial",
        "data": {"train": "train.csv"},
        "folds": {"k": folds},
        "search": {
            "backbones": ["timm/test_resnet"],
            "candidates": candidates,
            "space": {"lr": {"low": 1e-4, "high": 1e-2, "log": True}},
        },
        "race": {"rule": "none"},  # every fold of every candidate, as the Repeater's
        "training": {"pretrained": False},
        "resources": {"cpus_per_trial": 1},
    }
    config = SweepConfig.model_validate_json(json.dumps(settings))
    lines = [f"{row}.png,{'ab'[row % 2]},,{row % folds}" for row in range(_ROWS)]
    store = RunStore(folder)
    store.create(config, "\n".join(["image_path,target,group,fold", *lines, ""]), ["a", "b"])
    return store, config


def main(candidates: int, folds: int, sleep: float, out: Path) -> None:
    tuner.trainable = _sleeper(sleep)
    with tempfile.TemporaryDirectory() as folder:
        store, config = _run_folder(folder, candidates, folds)
        space, _ = build_space(config, "")
        mark = time.perf_counter()
        with connect(None, config.resources) as cluster:
            ray_start = time.perf_counter() - mark
            mark = time.perf_counter()
            outcome = tuner.run_sweep(store, config, space, "", cluster, lambda progress: None)
            seconds = time.perf_counter() - mark
        ended = sum(len(summary.finished) for summary in outcome.summaries)
    out.write_text(json.dumps({"trials": ended, "sweep": seconds, "ray_start": ray_start}))


if __name__ == "__main__":
    given = sys.argv[1:]
    main(int(given[0]), int(given[1]), float(given[2]), Path(given[3]))
