"""A student of a blend against the same student without a teacher, and against the blend, on
held-out images.

Two small networks from scratch, three folds each, are blended; the student is one of them at a
smaller image size. `alpha` 0 is the student without a teacher.
Each fold's student is scored alone, at the temperature that its own fold gives, as one deployed
model would be; `loss` and `accuracy` are means over the three. `gain` is the loss without a teacher
less the loss, its error over seeds. `sharpness` is the mean entropy (nats) of the soft labels on
the images that the teacher has learnt / on the rows that it has not.

`--data` takes the folder with `sign_digits/train.zip` and `small_photos/train.zip`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from harness import Results, options
from numpy.typing import NDArray

from foldrace.config.hyperparameters import TrialParams
from foldrace.config.schema import DataConfig, SweepConfig
from foldrace.core.metrics import accuracy, log_loss
from foldrace.core.temperature import at_temperature, fit_temperature
from foldrace.dataset.folds import folds_csv, make_folds
from foldrace.dataset.manifest import Manifest, read_manifest
from foldrace.run_folder.records import CandidateRecord, TeacherRef
from foldrace.run_folder.store import RunStore
from foldrace.trainables.spec import EpochReport, TrialSpec

_SETS = ("sign_digits", "small_photos")
_TRAIN, _HELD, _K = 500, 500, 3
_TEACHERS, _SIZE = ("timm/test_resnet", "timm/test_efficientnet"), 40
_STUDENT, _STUDENT_SIZE = "timm/test_efficientnet", 24
_TAUGHT = ((0.7, 1.0), (0.7, 4.0), (0.95, 4.0))
_LR = 6e-3
_PROCESSES = 2


@dataclass(frozen=True)
class Job:
    """One data set with one draw of its images."""

    set: str
    seed: int
    train: int
    epochs: int
    taught: tuple[tuple[float, float], ...]


class _Silent:
    """A monitor that asks for nothing."""

    def report(self, epoch: EpochReport) -> None:
        """Ignore it."""

    def stop_requested(self) -> bool:
        """Never."""
        return False


def _config(job: Job, train: Path) -> SweepConfig:
    raw = {
        "name": job.set,
        "data": {"train": str(train), "duplicates": "report"},
        "folds": {"k": _K, "seed": job.seed},
        "search": {"backbones": list(_TEACHERS), "seed": job.seed},
        "training": {"epochs": job.epochs, "image_size": _SIZE, "pretrained": False},
        "augment": {"flip": 0.5},
    }
    return SweepConfig.model_validate_json(json.dumps(raw))


def _tables(job: Job, data: Path, folder: Path) -> tuple[Path, list[Path], NDArray[np.int64]]:
    """The table of the training images; held-out files and their labels."""
    from sides.hard_digits import write_labels

    every = read_manifest(DataConfig(train=str((data / job.set / "train.zip").resolve())))
    order = np.random.default_rng(job.seed).permutation(len(every))
    train, held = order[: job.train], order[job.train : job.train + _HELD]
    table = folder / "train.csv"
    names = [every.classes[label] for label in every.labels]
    write_labels(table, ((str(every.file(int(i))), names[int(i)]) for i in np.sort(train)))
    return table, [every.file(int(i)) for i in held], np.asarray(every.labels)[held]


def _train(
    store: RunStore,
    manifest: Manifest,
    name: str,
    backbone: str,
    teacher: TeacherRef | None,
    **own: Any,
) -> None:
    from foldrace.trainables.trial import run_trial

    config = store.config()
    params = TrialParams.from_dict(config.fixed | {"lr": _LR} | own)
    record = CandidateRecord(
        candidate=name, backbone=backbone, params=params.as_dict(), teacher=teacher
    )
    store.save_candidate(record)
    for fold in range(_K):
        spec = TrialSpec(store.root, str(manifest.image_root), name, fold, use_gpu=False)
        run_trial(spec, _Silent())


def _alone(
    store: RunStore, name: str, files: list[Path], labels: NDArray[np.int64]
) -> tuple[float, float, float]:
    """Held-out loss and accuracy of one fold's model, means over folds; ms an image of one."""
    import torch

    from foldrace.inference.run_models import BATCH, RunModels
    from foldrace.trainables.data.loader import loader_settings
    from foldrace.trainables.predict import log_probabilities, scoring_loader

    models = RunModels(store, torch.device("cpu"))
    losses, right, seconds = [], [], []
    for fold in range(_K):
        trial = store.trial(name, fold)
        assert trial is not None and trial.best is not None
        model = models.open(name, trial.best, fold)
        source = models.images(files, model.model_config, 1, f"{store.root}{name}")
        loader = scoring_loader(
            source, np.arange(len(files)), model.model_config, BATCH, loader_settings(1, "cpu")
        )
        run = partial(log_probabilities, model.module, loader, models.device, model.autocast)
        run("softmax")  # decodes the images
        began = time.perf_counter()
        log_prob = run(model.model_config.activation)[0]
        seconds.append(time.perf_counter() - began)
        own = store.oof_log_prob(name, trial.best, [fold])
        cooled = at_temperature(
            log_prob, fit_temperature(own, store.labels()[store.folds().rows_of(fold)])
        )
        prob = np.exp(cooled.astype(np.float64))
        losses.append(log_loss(prob, labels))
        right.append(accuracy(prob, labels))
    return float(np.mean(losses)), float(np.mean(right)), min(seconds) / len(files) * 1e3


def _blend(
    store: RunStore, files: list[Path], labels: NDArray[np.int64]
) -> tuple[float, float, float]:
    from foldrace.ensemble.selection.eligible import Prices
    from foldrace.ensemble.selection.select import Request, blend_run
    from foldrace.inference.predictor import Predictor

    blend_run(store, store.config().ensemble, Request(lambda members: Prices({}, {})))
    predictor = Predictor(store, device="cpu")
    predictor.probabilities(files)
    began = time.perf_counter()
    prob = predictor.probabilities(files)
    seconds = time.perf_counter() - began
    return log_loss(prob, labels), accuracy(prob, labels), seconds / len(files) * 1e3


def _entropies(store: RunStore, teacher: TeacherRef) -> tuple[float, float]:
    """Of the soft labels of training images, and of the blend's OOF rows."""

    def mean(log_prob: NDArray[np.floating]) -> float:
        wide = log_prob.astype(np.float64)
        return float(-(np.exp(wide) * wide).sum(1).mean())

    seen = [store.teachers.log_prob(teacher.digest, k, store.folds()) for k in range(_K)]
    return mean(np.concatenate(seen)), mean(np.log(store.blend.oof()))


def measure(data: Path, job: Job) -> list[dict[str, Any]]:
    """One row for the blend and each student."""
    import torch

    from foldrace.inference.teachers import make_teacher

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        table, files, labels = _tables(job, data, Path(scratch))
        config = _config(job, table)
        manifest = read_manifest(config.data)
        fold = make_folds(manifest, config.folds)
        store = RunStore(Path(scratch) / "run")
        store.create(config, folds_csv(manifest, fold), manifest.classes)
        for number, backbone in enumerate(_TEACHERS):
            _train(store, manifest, f"c{number:04d}", backbone, None)
        found = [("blend", None, None, _blend(store, files, labels))]
        own = [manifest.file(row) for row in range(len(manifest))]
        teacher = make_teacher(store, own, "blend")
        seen, unseen = _entropies(store, teacher)
        students = ((0.0, 1.0), *job.taught)
        for number, (alpha, temperature) in enumerate(students, len(_TEACHERS)):
            name, taught = f"c{number:04d}", teacher if alpha else None
            _train(
                store, manifest, name, _STUDENT, taught, image_size=_STUDENT_SIZE,
                distill_alpha=alpha, distill_temperature=temperature,
            )  # fmt: skip
            scores = _alone(store, name, files, labels)
            found.append(("student", alpha, temperature if alpha else None, scores))
    return [
        {
            "set": job.set, "seed": job.seed, "who": who, "alpha": alpha, "temperature": t,
            "loss": loss, "accuracy": right, "ms": ms, "sharpness": f"{seen:.3f} / {unseen:.3f}",
        }
        for who, alpha, t, (loss, right, ms) in found
    ]  # fmt: skip


def _table(results: Results, rows: list[dict[str, Any]], name: str) -> None:
    mine = [row for row in rows if row["set"] == name]
    kinds = list(dict.fromkeys((r["who"], r["alpha"], r["temperature"]) for r in mine))
    plain = {r["seed"]: r["loss"] for r in mine if r["who"] == "student" and r["alpha"] == 0}
    for kind in kinds:
        own = [r for r in mine if (r["who"], r["alpha"], r["temperature"]) == kind]
        gains = [plain[r["seed"]] - r["loss"] for r in own]
        many = len(gains) > 1
        results.add(
            name,
            who=kind[0],
            alpha=kind[1],
            temperature=kind[2],
            loss=float(np.mean([r["loss"] for r in own])),
            accuracy=float(np.mean([r["accuracy"] for r in own])),
            ms_per_image=float(np.median([r["ms"] for r in own])),
            gain=float(np.mean(gains)),
            gain_error=float(np.std(gains, ddof=1) / np.sqrt(len(gains))) if many else None,
            seeds=len(own),
            sharpness=", ".join(r["sharpness"] for r in own) if kind[0] == "blend" else None,
        )


def main() -> None:
    given = options(__doc__, data="the folder with sign_digits and small_photos")
    if given.data is None:
        raise SystemExit("--data: should name the folder with sign_digits and small_photos")
    sets, seeds = (_SETS[:1], (0,)) if given.quick else (_SETS, (0, 1, 2))
    train, epochs = (150, 4) if given.quick else (_TRAIN, 16)
    taught = _TAUGHT[:1] if given.quick else _TAUGHT
    jobs = [Job(name, seed, train, epochs, taught) for seed in seeds for name in sets]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(_PROCESSES, context, os.nice, (10,)) as pool:
        rows = [row for each in pool.map(partial(measure, given.data), jobs) for row in each]
    results = Results("distill")
    for name in sets:
        _table(results, rows, name)
    results.publish(given)


if __name__ == "__main__":
    main()
