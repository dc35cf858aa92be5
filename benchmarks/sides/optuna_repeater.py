"""The peer of a whole sweep: Ray Tune with Repeater(OptunaSearch), over the product's own fold
trials, so that only the search and the order of the trials differ.

`python optuna_repeater.py CONFIG RUN DEADLINE` (seconds since 1970): leaves a run folder with every
fold trial that ended. Worker processes are used again and started as early as ours, which Tune does
not do by itself: it would train less.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import optuna
import ray
from ray import tune
from ray.tune.search import Repeater
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.repeater import TRIAL_INDEX

from foldrace.config.load import parse_config
from foldrace.config.schema import SweepConfig
from foldrace.dataset.folds import folds_csv, make_folds
from foldrace.dataset.manifest import read_manifest
from foldrace.run_folder.records import CandidateRecord
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.ray.fold_trial import CANDIDATE, FOLD, JUDGED, TrialJob, trainable
from foldrace.search_spaces.space import build_space

_BACKBONE = "backbone"
_ENDLESS = 1_000_000  # fold trials: the time is the limit


def _fold_trial(job: TrialJob, config: SweepConfig, drawn: dict[str, Any]) -> None:
    """In a worker process."""
    fold = drawn.pop(TRIAL_INDEX)
    space, _ = build_space(config, "")
    backbone = drawn.pop(_BACKBONE)
    params = space.decode(backbone, drawn)
    digest = hashlib.sha256(json.dumps([backbone, params.as_dict()]).encode()).hexdigest()
    candidate = f"c{int(digest, 16) % 10**9:09d}"
    record = CandidateRecord(candidate=candidate, backbone=backbone, params=params.as_dict())
    RunStore.open(job.run).save_candidate(record)
    trainable(job)({CANDIDATE: candidate, FOLD: fold, JUDGED: False})


def main(path: Path, run: Path, deadline: float) -> None:
    config = parse_config(path, []).require()
    manifest = read_manifest(config.data)
    store = RunStore(run)
    store.create(config, folds_csv(manifest, make_folds(manifest, config.folds)), manifest.classes)
    job = TrialJob(
        run=store.root,
        image_root=str(manifest.image_root),
        session=uuid4().hex,
        use_gpu=False,
    )
    space, _ = build_space(config, "")
    choice = optuna.distributions.CategoricalDistribution(space.backbones)
    search = OptunaSearch(  # the backbones of the benchmark have the same ranges
        space={_BACKBONE: choice, **space.distributions(space.backbones[0])},
        metric="val_logloss",
        mode="min",
        seed=config.search.seed,
    )
    slots = len(os.sched_getaffinity(0))
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(slots)
    ray.init(num_cpus=slots, log_to_driver=False)
    with tempfile.TemporaryDirectory() as scratch:
        tune.Tuner(
            tune.with_resources(lambda drawn: _fold_trial(job, config, drawn), {"cpu": 1}),
            tune_config=tune.TuneConfig(
                search_alg=Repeater(search, repeat=config.folds.k),
                num_samples=_ENDLESS,
                time_budget_s=deadline - time.time(),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(storage_path=scratch, verbose=0),
        ).fit()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
