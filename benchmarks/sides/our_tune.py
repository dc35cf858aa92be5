"""Our scheduling alone: `run_sweep` with a trainable that sleeps instead of training.

`python our_tune.py CANDIDATES FOLDS SECONDS OUT [NODES GPUS]`, as `plain_tune.py`; with NODES on a
cluster of so many raylets with so many declared GPUs each. All else is the product's own: searcher,
state, study, journal, tables, and a record in the run folder for each trial.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray

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

            started = time.time()
            time.sleep(sleep)
            store = RunStore.open(job.run)
            candidate = store.candidate(config["candidate"])
            loss = float(candidate.params["lr"])
            tune.report({"epoch": 0, "val_calibrated_logloss": loss})
            store.save_trial(
                TrialRecord(
                    candidate=config["candidate"],
                    fold=config["fold"],
                    status="finished",
                    backbone=candidate.backbone,
                    params=candidate.params,
                    folds_hash=store.folds().hash,
                    seed=0,
                    started_at=started,
                    ended_at=time.time(),
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


@contextlib.contextmanager
def _cluster(nodes: int, gpus: int) -> Iterator[None]:
    """Raylets on this machine, each with declared GPUs and a core for each of them."""
    from ray.cluster_utils import Cluster as Raylets

    raylets = Raylets()
    for _ in range(nodes):
        raylets.add_node(num_cpus=gpus, num_gpus=gpus, include_dashboard=False)
    try:
        raylets.connect()
        yield
    finally:
        ray.shutdown()
        raylets.shutdown()


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


def _use(records: Sequence[TrialRecord], slots: int, sleep: float) -> dict[str, float]:
    """How much of the slots' time was slept, while all of them could be in use."""
    starts = sorted(record.started_at for record in records)
    full, last = starts[slots - 1], starts[-1]
    slept = [max(0.0, min(r.started_at + sleep, last) - max(r.started_at, full)) for r in records]
    return {
        "slots_busy": sum(slept) / (slots * (last - full)) if last > full else float("nan"),
        "until_full_s": full - starts[0],
        "pauses_s": sleep * (slots * (last - full) / sum(slept) - 1) if sum(slept) else 0.0,
    }


def main(candidates: int, folds: int, sleep: float, out: Path, nodes: int, gpus: int) -> None:
    tuner.trainable = _sleeper(sleep)
    raylets = _cluster(nodes, gpus) if nodes else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as folder, raylets:
        store, config = _run_folder(folder, candidates, folds)
        space, _ = build_space(config, "")
        mark = time.perf_counter()
        with connect(None, config.resources) as cluster:
            ray_start, slots = time.perf_counter() - mark, cluster.room.slots()
            mark, cpu = time.perf_counter(), time.process_time()
            outcome = tuner.run_sweep(store, config, space, "", cluster, lambda progress: None)
            seconds, used = time.perf_counter() - mark, time.process_time() - cpu
        records = [trial for summary in outcome.summaries for trial in summary.finished]
    figures = {"trials": len(records), "sweep": seconds, "ray_start": ray_start, "cpu": used}
    if nodes:
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        figures |= {"slots": slots, "rss_mb": rss} | _use(records, slots, sleep)
    out.write_text(json.dumps(figures))


if __name__ == "__main__":
    given = sys.argv[1:]
    more = [int(word) for word in given[4:]] or [0, 0]
    main(int(given[0]), int(given[1]), float(given[2]), Path(given[3]), *more)
