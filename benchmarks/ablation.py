"""What each training technique changes on small images, with seeds.

Each arm is the plain recipe (AdamW, cosine, dropout, the data's own augmentation policy) and one
technique with a usual setting, nothing tuned. For each seed all arms train the same folds, to the
last epoch. The figure is a fold's calibrated log loss after it, as the blend sees it, of the
averaged weights in the EMA arm and of the raw ones in all others, and its change from the plain arm
of the same seed, with the standard error (se) over seeds.

digits       scikit-learn's handwritten digits at 32 px, 8 epochs
sign_digits  photos of hands (Mavi 2020) at 48 px, 16 epochs; `--data` names the folder with its
             train.zip (left out where there is none)
"""

from __future__ import annotations

import csv
import io
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
from harness import ROOT, Results, machine, options
from numpy.typing import NDArray
from sides.fold_spec import FOLD, Silent, fold_spec, params_of

from foldrace.config.load import parse_config
from foldrace.config.ranges import Value
from foldrace.dataset.demo import write_demo
from foldrace.run_folder.store import RunStore
from foldrace.trainables.trial import run_trial

_PLAIN: dict[str, Value] = {
    "dropout": 0.1,
    "drop_path": 0.0,
    "mixup_prob": 0.0,
    "ema_epochs": 0.0,
    "label_smoothing": 0.0,
    "flip": 0.0,
}
_ARMS: dict[str, dict[str, Value]] = {
    "plain": {},
    "+ MixUp": {"mixup_prob": 0.5, "mixup_alpha": 0.4},
    "+ EMA": {"ema_epochs": 1.0},
    "+ SAM": {"sam_rho": 0.05},
    "+ R-Drop": {"rdrop_alpha": 1.0},
    "+ label smoothing": {"label_smoothing": 0.1},
    "+ flip": {"flip": 0.5},
}


@dataclass(frozen=True)
class Job:
    """One fold trial."""

    config: Path
    overrides: tuple[str, ...]
    backbone: str
    arm: str
    seed: int


@dataclass(frozen=True)
class Trained:
    """What a fold trial reached after its last epoch, with the weights that its arm is about."""

    loss: float
    """Calibrated log loss."""
    accuracy: float
    seconds: float


def _train(job: Job) -> Trained:
    """In a worker process."""
    config = parse_config(job.config, [*job.overrides, f"folds.seed={job.seed}"]).require()
    with tempfile.TemporaryDirectory() as folder:
        knobs = _PLAIN | _ARMS[job.arm]
        spec = fold_spec(config, Path(folder), job.backbone, knobs, seed=job.seed)
        record = run_trial(spec, Silent())
        log = RunStore.open(spec.run).train_log(spec.candidate, FOLD)
        epochs = params_of(spec).epochs
    assert record.status == "finished" and log is not None, record.error
    prefix = "ema_" if job.arm == "+ EMA" else ""
    lines = list(csv.DictReader(io.StringIO(log)))
    assert len(lines) == epochs
    last = lines[-1]
    loss, accuracy = (float(last[f"{prefix}val_{n}"]) for n in ("calibrated_logloss", "acc"))
    return Trained(loss, accuracy, record.seconds)


def _jobs(
    config: Path, epochs: int, backbone: str, seeds: int, overrides: tuple[str, ...] = ()
) -> list[Job]:
    """Seed by seed, so that all arms meet the same load of the machine."""
    overrides = (*overrides, f"search.backbones=[{backbone}]", f"training.epochs={epochs}")
    return [Job(config, overrides, backbone, arm, seed) for seed in range(seeds) for arm in _ARMS]


def _ablate(results: Results, pool: ProcessPoolExecutor, title: str, jobs: list[Job]) -> None:
    trained = dict(zip(jobs, pool.map(_train, jobs), strict=True))
    for arm in _ARMS:
        own = [trained[job] for job in jobs if job.arm == arm]
        plain = [trained[replace(job, arm="plain")] for job in jobs if job.arm == arm]
        changes = np.array([a.loss - b.loss for a, b in zip(own, plain, strict=True)])
        results.add(
            title,
            arm=arm,
            seeds=len(own),
            logloss=float(np.mean([one.loss for one in own])),
            change=float(changes.mean()),
            se=_standard_error(changes),
            accuracy=float(np.mean([one.accuracy for one in own])),
            seconds_ratio=median(a.seconds / b.seconds for a, b in zip(own, plain, strict=True)),
        )


def main() -> None:
    given = options(__doc__, data="folder with the train.zip of sign_digits")
    results = Results("ablation")
    cores = machine().cores
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(cores, context) as pool:
        os.environ["FOLDRACE_CACHE"] = f"{folder}/cache"
        demo = write_demo(Path(folder) / "digits")
        epochs, seeds = (2, 2) if given.quick else (8, 6)
        for backbone in ("timm/test_resnet", "timm/test_vit")[: 1 if given.quick else None]:
            jobs = _jobs(demo, epochs, backbone, seeds)
            _ablate(results, pool, f"digits, {backbone}", jobs)
        archive = given.data / "train.zip" if given.data else None
        if archive is not None and not given.quick:
            overrides = (f"data.train={archive}", "data.test=null", "data.sample_submission=null",
                         "data.test_images=null")  # fmt: skip
            signs = ROOT / "configs" / "sign_digits.yaml"
            jobs = _jobs(signs, 16, "timm/test_resnet", 4, overrides)
            _ablate(results, pool, "sign_digits, timm/test_resnet", jobs)
    results.publish(given)


def _standard_error(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))


if __name__ == "__main__":
    main()
