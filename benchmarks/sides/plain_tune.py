"""The peer of our sweep: plain Ray Tune with its own fold repeater and default settings.

`python plain_tune.py CANDIDATES FOLDS SECONDS OUT`: trials that sleep for SECONDS; writes
what it took as JSON to OUT.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import ray
from ray import tune
from ray.tune.search import Repeater
from ray.tune.search.optuna import OptunaSearch


def main(candidates: int, folds: int, sleep: float, out: Path) -> None:
    def fold_trial(config: dict[str, float]) -> None:
        time.sleep(sleep)
        tune.report({"val_logloss": config["lr"]})

    mark = time.perf_counter()
    ray.init(num_cpus=len(os.sched_getaffinity(0)))
    ray_start = time.perf_counter() - mark
    tuner = tune.Tuner(
        tune.with_resources(fold_trial, {"cpu": 1}),
        param_space={"lr": tune.loguniform(1e-4, 1e-2)},
        tune_config=tune.TuneConfig(
            metric="val_logloss",
            mode="min",
            search_alg=Repeater(OptunaSearch(), repeat=folds),
            num_samples=candidates * folds,
        ),
    )
    mark = time.perf_counter()
    results = tuner.fit()
    seconds = time.perf_counter() - mark
    ended = len(results) - results.num_errors
    out.write_text(json.dumps({"trials": ended, "sweep": seconds, "ray_start": ray_start}))


if __name__ == "__main__":
    given = sys.argv[1:]
    main(int(given[0]), int(given[1]), float(given[2]), Path(given[3]))
