"""The same configurations trained on many small data sets, one fold each: what the portfolio of
first candidates is chosen from.

Takes a folder, leaves `seen/<start>/<set>/<number>.npz` in it for each fold trial; goes on where it
was interrupted, and leaves out what the committed table has. Each process on one thread.
Configurations are drawn at random, each from its number alone, so that a longer recording adds to a
shorter one: the first over the whole space, then some by hand, then around these, which were far
better. `start` is `scratch`, or `pretrained`: from ImageNet weights of EfficientNet-Lite;
`efficientnet_lite0.safetensors`, ... lie in the folder that the environment variable
`LITE_WEIGHTS` names.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import shutil
from collections.abc import Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sides.fold_spec import Silent
from sides.image_sets import IMAGE_SETS, write_image_set

from foldrace.config.hyperparameters import TrialParams
from foldrace.config.ranges import Value
from foldrace.config.schema import SweepConfig
from foldrace.core.temperature import fit_temperature, true_prob_at
from foldrace.dataset.folds import folds_csv, make_folds
from foldrace.dataset.manifest import read_manifest
from foldrace.run_folder.records import CandidateRecord, TrialRecord
from foldrace.run_folder.store import RunStore
from foldrace.run_folder.trials import suffix
from foldrace.trainables.spec import TrialSpec
from foldrace.trainables.trial import run_trial

_FOLDS = 3  # of which one is trained
_NICE = 15
_AROUND = {"scratch": 18, "pretrained": 6}  # from this number on, drawn around those by hand
_VARIED = 0.3  # of the hyperparameters differ from those by hand, in a configuration around them


@dataclass(frozen=True)
class Start:
    """What the trials of a table begin with."""

    name: str
    sets: tuple[str, ...]
    backbones: tuple[str, ...]
    """In turn: those that learn more from few images more often."""
    around: tuple[str, ...]
    """In turn, for the configurations around those by hand: the best ones."""
    epochs: int
    images: int
    """Training images at most, of all folds together."""
    size: int | None
    """Side in pixels; None: the data set's own."""


STARTS = {
    row.name: row
    for row in (
        Start(
            "scratch",
            tuple(IMAGE_SETS),
            (
                "timm/test_resnet",
                "timm/test_efficientnet",
                "timm/test_convnext3",
                "timm/test_byobnet",
                "timm/test_mambaout",
                "timm/test_vit",
                "timm/test_resnet",
                "timm/test_efficientnet",
                "timm/test_resnet",
                "timm/test_convnext3",
                "timm/test_resnet",
                "timm/test_byobnet",
            ),
            ("timm/test_resnet", "timm/test_efficientnet", "timm/test_resnet", "timm/resnet10t"),
            16,
            1000,
            None,
        ),
        Start(
            "pretrained",
            ("sign_digits", "small_photos", "clothing", "smiles", "omniglot"),
            ("timm/efficientnet_lite0", "timm/efficientnet_lite1", "timm/efficientnet_lite2"),
            ("timm/efficientnet_lite0", "timm/efficientnet_lite1", "timm/efficientnet_lite2"),
            10,
            600,
            64,
        ),
    )
}


@dataclass(frozen=True)
class Key:
    """One fold trial of the table."""

    start: str
    set: str
    number: int

    @property
    def name(self) -> str:
        """Its file, without ending."""
        return f"{self.start}/{self.set}/{self.number:04d}"


BY_HAND: dict[str, Value] = {
    "weight_decay": 0.02, "warmup": 0.1, "batch_size": 32, "dropout": 0.1, "drop_path": 0.0,
    "mixup_prob": 0.0, "mixup_alpha": 0.2, "cutmix_prob": 0.0, "mix_off": 0.1,
    "label_smoothing": 0.0, "policy": "light", "flip": 0.5, "random_erasing": 0.0,
    "ema_epochs": 0.5, "schedule": "cosine",
}  # fmt: skip
"""What somebody would try by hand."""
_FINE_TUNING: dict[str, Value] = {"head_lr": 1.0, "layer_decay": 1.0, "freeze_epochs": 0}
_MIXED: dict[str, Value] = {"mixup_prob": 0.5, "mixup_alpha": 0.5}
_SLOWLY: dict[str, Value] = {"warmup": 0.3}
_BY_LAYER: dict[str, Value] = {"head_lr": 3.0, "layer_decay": 0.9}
SEARCHED = frozenset(
    ("lr", "weight_decay", "warmup", "dropout", "drop_path", "mixup_prob", "mixup_alpha",
     "label_smoothing", "policy", "flip", "head_lr", "layer_decay")
)  # fmt: skip
"""What a sweep searches by default, and so can take from another one."""
_ANCHORS: dict[tuple[str, int], tuple[str, dict[str, Value]]] = {
    ("scratch", 12): ("timm/test_resnet", {"lr": 4e-3, "flip": 0.0}),
    ("scratch", 13): ("timm/test_resnet", {"lr": 4e-3}),
    ("scratch", 14): ("timm/test_resnet", {"lr": 6e-3, "schedule": "one_cycle", "warmup": 0.3}),
    ("scratch", 15): ("timm/test_efficientnet", {"lr": 4e-3}),
    ("scratch", 16): ("timm/test_convnext3", {"lr": 2e-3}),
    ("scratch", 17): ("timm/test_byobnet", {"lr": 4e-3}),
    ("scratch", 24): ("timm/test_resnet", {"lr": 8e-3, "flip": 0.0}),
    ("scratch", 25): ("timm/test_resnet", {"lr": 6e-3, "warmup": 0.3, "flip": 0.0}),
    ("scratch", 26): ("timm/test_resnet", {"lr": 8e-3, "warmup": 0.3}),
    ("scratch", 27): ("timm/test_efficientnet", {"lr": 8e-3, "flip": 0.0}),
    ("scratch", 28): ("timm/test_resnet", {"lr": 1.2e-2, **_MIXED}),
    ("scratch", 29): ("timm/test_resnet", {"lr": 1.2e-2, **_MIXED, "flip": 0.0}),
    ("scratch", 30): ("timm/test_efficientnet", {"lr": 1.2e-2, **_MIXED}),
    ("scratch", 31): ("timm/test_resnet", {"lr": 1.8e-2, **_MIXED, "policy": "none"}),
    ("scratch", 32): ("timm/test_resnet", {"lr": 8e-3, **_MIXED}),
    ("scratch", 33): ("timm/test_efficientnet", {"lr": 8e-3, **_MIXED, "flip": 0.0}),
    ("scratch", 34): ("timm/test_resnet", {"lr": 1.8e-2, **_SLOWLY}),
    ("scratch", 35): ("timm/test_resnet", {"lr": 1.8e-2, **_SLOWLY, "flip": 0.0}),
    ("scratch", 36): ("timm/test_resnet", {"lr": 1.2e-2, **_SLOWLY, "flip": 0.0}),
    ("scratch", 37): ("timm/test_resnet", {"lr": 1.2e-2, **_SLOWLY}),
    ("scratch", 38): ("timm/test_efficientnet", {"lr": 1.2e-2, **_SLOWLY, "flip": 0.0}),
    ("scratch", 39): ("timm/test_efficientnet", {"lr": 1.8e-2, **_SLOWLY}),
    ("pretrained", 0): ("timm/efficientnet_lite0", {"lr": 1e-3, **_BY_LAYER}),
    ("pretrained", 1): ("timm/efficientnet_lite0", {"lr": 3e-3}),
    ("pretrained", 2): ("timm/efficientnet_lite1", {"lr": 3e-3, **_BY_LAYER}),
    ("pretrained", 3): ("timm/efficientnet_lite0", {"lr": 6e-3}),
    ("pretrained", 4): ("timm/efficientnet_lite0", {"lr": 3e-3, "flip": 0.0, **_BY_LAYER}),
    ("pretrained", 5): ("timm/efficientnet_lite1", {"lr": 3e-3}),
}
"""Configurations by hand, among those drawn: (start, number) -> backbone, what differs."""


def configuration(start: Start, number: int) -> tuple[str, dict[str, Value]]:
    """Backbone and hyperparameters of configuration `number`, for every data set the same."""
    if (start.name, number) in _ANCHORS:
        backbone, own = _ANCHORS[start.name, number]
        return backbone, BY_HAND | (_FINE_TUNING if start.name == "pretrained" else {}) | own
    draw = random.Random(f"{start.name}/{number}")

    def log(low: float, high: float) -> float:
        return float(f"{math.exp(draw.uniform(math.log(low), math.log(high))):.3g}")

    def often_off(chance: float, low: float, high: float) -> float:
        value = round(draw.uniform(low, high), 3)
        return value if draw.random() < chance else 0.0

    is_around = number >= _AROUND[start.name]
    backbones = start.around if is_around else start.backbones
    backbone = backbones[number % len(backbones)]
    pretrained = start.name == "pretrained"
    params: dict[str, Value] = {
        "lr": log(3e-4, 1e-2) if pretrained else log(5e-4, 2e-2),
        "weight_decay": log(1e-3, 0.3),
        "warmup": round(draw.uniform(0.03, 0.3), 3),
        "batch_size": draw.choice((16, 32)) if pretrained else draw.choice((16, 32, 32, 64)),
        "dropout": round(draw.uniform(0.0, 0.4), 3),
        "drop_path": round(draw.uniform(0.0, 0.15), 3),
        "mixup_prob": often_off(0.5, 0.2, 1.0),
        "mixup_alpha": round(draw.uniform(0.2, 1.0), 3),
        "cutmix_prob": often_off(0.3, 0.2, 0.6),
        "mix_off": draw.choice((0.0, 0.1, 0.3)),
        "label_smoothing": often_off(0.5, 0.02, 0.1),
        "policy": draw.choice(
            ("none", "light", "light", "medium", "heavy", "randaugment", "trivialaugment")
        ),
        "flip": draw.choice((0.0, 0.5)),
        "random_erasing": often_off(0.3, 0.1, 0.4),
        "ema_epochs": log(0.2, 3.0),
        "schedule": draw.choice(("cosine", "cosine", "one_cycle")),
    }
    if pretrained:
        params |= {
            "head_lr": log(1.0, 20.0) if draw.random() < 0.6 else 1.0,
            "layer_decay": round(draw.uniform(0.6, 0.95), 3) if draw.random() < 0.6 else 1.0,
            "freeze_epochs": draw.choice((0, 0, 1, 2)),
        }
    if is_around:
        lr = log(1e-3, 1.2e-2) if pretrained else log(1.5e-3, 1.2e-2)
        drawn = {
            name: name == "flip" or (draw.random() < _VARIED and name in SEARCHED)
            for name in sorted(params)
        }
        usual = params | BY_HAND | _FINE_TUNING
        params = {name: (params if drawn[name] else usual)[name] for name in params}
        params["lr"] = lr
    if params["mixup_prob"] + params["cutmix_prob"] > 1:  # type: ignore[operator]
        params["cutmix_prob"] = 0.0
    return backbone, params


def keys(start: Start, configurations: int) -> Iterator[Key]:
    """Every data set with the first configuration, then with the second, ...

    So a recording that was cut off holds whole rows.
    """
    for number in range(configurations):
        for name in start.sets:
            yield Key(start.name, name, number)


def record(folder: Path, wanted: dict[str, int], done: set[str], processes: int) -> None:
    """Train what neither `folder` nor `done` (names of keys) holds.

    `wanted`: start -> configurations.
    """
    folder = folder.resolve()
    prepare(folder, {name for start in wanted for name in STARTS[start].sets})
    every = [key for start, count in wanted.items() for key in keys(STARTS[start], count)]
    left = [key for key in every if key.name not in done and not seen_file(folder, key).is_file()]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, os.nice, (_NICE,)) as pool:
        for count, line in enumerate(pool.map(partial(_record_one, folder), left), 1):
            print(f"{len(every) - len(left) + count}/{len(every)} {line}", flush=True)


def prepare(folder: Path, sets: Collection[str]) -> None:
    """Write the data sets that the folder lacks; set the environment of the processes to come."""
    os.environ["FOLDRACE_CACHE"] = str(folder / "cache")
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in sets:
        if not (folder / "sets" / name / "test_labels.csv").is_file():
            write_image_set(IMAGE_SETS[name], folder / "sets" / name)


def seen_file(folder: Path, key: Key) -> Path:
    """`facts`, a JSON text, and `prob_raw`, `prob_ema`: (rows,) float16 calibrated true-class
    probabilities of the fold, after the last epoch."""
    return folder / "seen" / f"{key.name}.npz"


def _config(folder: Path, start: Start, name: str, classes: int) -> SweepConfig:
    weights: bool | str = False
    if start.name == "pretrained":
        weights = str(Path(os.environ["LITE_WEIGHTS"]).resolve())
    raw = {
        "name": f"{start.name}_{name}",
        "data": {
            "train": str(folder / "sets" / name / "data" / "train"),
            "max_per_class": math.ceil(start.images / classes),
        },
        "folds": {"k": _FOLDS},
        "search": {"backbones": sorted({*start.backbones, *start.around})},
        "training": {
            "epochs": start.epochs,
            "image_size": start.size or IMAGE_SETS[name].size,
            "pretrained": weights,
        },
    }
    return SweepConfig.model_validate_json(json.dumps(raw))


@dataclass(frozen=True)
class Trained:
    """A fold trial that has ended, and the run folder that it lies in."""

    store: RunStore
    result: TrialRecord
    image_size: int
    rows: int
    classes: int

    def log(self) -> str:
        """The text of its train_log.csv."""
        path = Path(self.store.root) / "trials" / "c0000" / "fold0" / "train_log.csv"
        return path.read_text(encoding="utf-8")


def train_fold(
    folder: Path, start: Start, name: str, backbone: str, drawn: dict[str, Value], root: Path
) -> Trained:
    """Train the first fold of a data set of `folder` on one thread; `root`: its run folder."""
    torch.set_num_threads(1)
    train = folder / "sets" / name / "data" / "train"
    config = _config(folder, start, name, len(list(train.iterdir())))
    manifest = read_manifest(config.data)
    store = RunStore(root)
    store.create(config, folds_csv(manifest, make_folds(manifest, config.folds)), manifest.classes)
    params = TrialParams.from_dict(config.fixed | drawn)
    store.save_candidate(
        CandidateRecord(candidate="c0000", backbone=backbone, params=params.as_dict())
    )
    spec = TrialSpec(
        run=store.root,
        image_root=str(manifest.image_root),
        candidate="c0000",
        fold=0,
        use_gpu=False,
    )
    found = run_trial(spec, Silent())
    return Trained(store, found, params.image_size, len(manifest), len(manifest.classes))


def _record_one(folder: Path, key: Key) -> str:
    start = STARTS[key.start]
    root = folder / "runs" / key.name
    shutil.rmtree(root, ignore_errors=True)
    backbone, drawn = configuration(start, key.number)
    trained = train_fold(folder, start, key.set, backbone, drawn, root)
    found = trained.result
    columns = {f"prob_{name}": _column(trained.store, name) for name in found.variants}
    facts = {
        "backbone": backbone,
        "params": drawn,
        "epochs": start.epochs,
        "image_size": trained.image_size,
        "rows": trained.rows,
        "classes": trained.classes,
        "status": found.status,
        "seconds": round(found.seconds, 1),
        "loss": {name: round(v.calibrated_logloss, 5) for name, v in found.variants.items()},
        "accuracy": {name: round(v.val_acc, 4) for name, v in found.variants.items()},
    }
    path = seen_file(folder, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"aside-{path.name}")
    np.savez_compressed(aside, facts=np.array(json.dumps(facts)), **columns)  # type: ignore[arg-type]
    aside.replace(path)
    shutil.rmtree(root)
    return f"{key.name} {backbone} {facts['status']} {facts['loss']} {facts['seconds']} s"


def _column(store: RunStore, variant: str) -> NDArray[np.float16]:
    """(rows,) calibrated true-class probabilities of fold 0."""
    log_prob = np.load(
        Path(store.root) / "trials" / "c0000" / "fold0" / f"oof{suffix(variant)}.npy"
    )
    rows = np.load(Path(store.root) / "trials" / "c0000" / "fold0" / "rows.npy")
    labels = store.labels()[rows]
    calibrated = true_prob_at(log_prob, labels, fit_temperature(log_prob, labels))
    return calibrated.astype(np.float16)
