"""What each training technique changes on small images, with seeds.

Each arm is the plain recipe (AdamW, cosine, dropout, the data's own augmentation policy) and one
technique with a usual setting, nothing tuned. For each seed all arms train the same folds; the
figure is a fold's validation log loss at the best epoch of the variant that the technique makes,
and its difference from the plain arm of the same seed, with the standard error over seeds.

digits       scikit-learn's handwritten digits at 32 px, 8 epochs
sign_digits  photos of hands (Mavi 2020) at 48 px, 16 epochs; `--data` names the folder with its
             train.zip (left out where there is none)
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from harness import ROOT, Results, machine, options
from numpy.typing import NDArray

from experiment.config import parse_config
from experiment.demo_data import write_demo
from experiment.folds import folds_csv, make_folds
from experiment.manifest import read_manifest
from experiment.records import TrialRecord, VariantScore
from experiment.store import RunStore
from search_spaces.params import TrialParams
from search_spaces.ranges import Value
from search_spaces.sampling import build_space
from trainables.spec import EpochReport, TrialSpec
from trainables.trial import run_trial

_FOLD = 0
_PLAIN: dict[str, Value] = {
    "dropout": 0.1,
    "drop_path": 0.0,
    "mixup_prob": 0.0,
    "ema_decay": 0.0,
    "label_smoothing": 0.0,
}
_ARMS: dict[str, dict[str, Value]] = {
    "plain": {},
    "+ MixUp": {"mixup_prob": 0.5, "mixup_alpha": 0.4},
    "+ EMA": {"ema_decay": 0.99},
    "+ SAM": {"sam_rho": 0.05},
    "+ R-Drop": {"rdrop_alpha": 1.0},
    "+ label smoothing": {"label_smoothing": 0.1},
}


@dataclass(frozen=True)
class Job:
    """One fold trial."""

    config: Path
    overrides: tuple[str, ...]
    backbone: str
    arm: str
    seed: int


class _Silent:
    def report(self, epoch: EpochReport) -> None:
        """Nobody listens."""

    def stop_requested(self) -> bool:
        return False


def _train(job: Job) -> TrialRecord:
    """In a worker process."""
    overrides = [*job.overrides, f"folds.seed={job.seed}"]
    config = parse_config(job.config, overrides).require()
    manifest = read_manifest(config.data)
    with tempfile.TemporaryDirectory() as folder:
        store = RunStore(folder)
        text = folds_csv(manifest, make_folds(manifest, config.folds))
        store.create(config, text, manifest.classes)
        params = build_space(config, "")[0].default(job.backbone).as_dict()
        spec = TrialSpec(
            run=store.root,
            image_root=str(manifest.image_root),
            candidate="c0000",
            backbone=job.backbone,
            params=TrialParams.from_dict(params | _PLAIN | _ARMS[job.arm]),
            fold=_FOLD,
            training=config.training,
            transforms=config.augment.transforms,
            seed=job.seed,
        )
        return run_trial(spec, _Silent())


def _jobs(config: Path, overrides: tuple[str, ...], backbone: str, seeds: int) -> Iterator[Job]:
    for seed in range(seeds):
        for arm in _ARMS:
            yield Job(config, overrides, backbone, arm, seed)


def _ablate(results: Results, pool: ProcessPoolExecutor, title: str, jobs: list[Job]) -> None:
    records = dict(zip(jobs, pool.map(_train, jobs), strict=True))
    for arm in _ARMS:
        own = [j for j in jobs if j.arm == arm]
        losses = np.array([_loss(records[j]) for j in own])
        plain = np.array([_loss(records[replace(j, arm="plain")]) for j in own])
        accuracy = [_score(records[j]).val_acc for j in own]
        ratio = [records[j].seconds / records[replace(j, arm="plain")].seconds for j in own]
        results.add(
            title,
            arm=arm,
            seeds=len(own),
            logloss=float(losses.mean()),
            logloss_se=_standard_error(losses),
            difference=float((losses - plain).mean()),
            difference_se=_standard_error(losses - plain),
            accuracy=float(np.mean(accuracy)),
            seconds_ratio=float(np.median(ratio)),
        )


def main() -> None:
    given = options(__doc__, data="folder with the train.zip of sign_digits")
    results = Results("ablation")
    cores = machine().cores
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(cores, context) as pool:
        os.environ["FOLDRACE_CACHE"] = f"{folder}/cache"
        demo = write_demo(Path(folder) / "digits")
        short = ("training.epochs=2",) if given.quick else ()
        seeds = 2 if given.quick else 6
        for backbone in ("timm/test_resnet", "timm/test_vit")[: 1 if given.quick else None]:
            jobs = list(_jobs(demo, short, backbone, seeds))
            _ablate(results, pool, f"digits, {backbone}", jobs)
        archive = given.data / "train.zip" if given.data else None
        if archive is not None and not given.quick:
            overrides = (f"data.train={archive}", "data.test=null", "data.sample_submission=null",
                         "data.test_images=null", "training.epochs=16")  # fmt: skip
            signs = ROOT / "configs" / "sign_digits.yaml"
            jobs = list(_jobs(signs, overrides, "timm/test_resnet", 4))
            _ablate(results, pool, "sign_digits, timm/test_resnet", jobs)
    results.publish(given)


def _score(record: TrialRecord) -> VariantScore:
    assert record.best is not None, record.error
    return record.variants[record.best]


def _loss(record: TrialRecord) -> float:
    return _score(record).val_logloss


def _standard_error(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))


if __name__ == "__main__":
    main()
