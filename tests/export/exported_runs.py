"""Small runs of untrained models to export, and processes in which Foldrace does not exist."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from foldrace.config.schema import DataConfig, FoldsConfig, SearchConfig, SweepConfig
from foldrace.core.plugin_files import PluginFile
from foldrace.dataset.folds import folds_csv, make_folds
from foldrace.dataset.manifest import read_manifest
from foldrace.inference.run_models import RunModels
from foldrace.run_folder.blend_records import EnsembleRecord, MemberRecord
from foldrace.run_folder.records import CandidateRecord, TrialRecord
from foldrace.run_folder.store import RunStore
from foldrace.trainables.models.classifier import build_classifier
from foldrace.trainables.predict import pack_weights

FORBIDDEN = ("foldrace", "ray", "optuna", "albumentations", "cv2")


@dataclass(frozen=True)
class MadeModel:
    """One member of a made run."""

    backbone: str
    weight: float
    temperature: float = 1.0
    image_size: int = 32
    head: str = "linear"
    loss: str = "cross_entropy"
    resize: str = "squash"


def make_run(
    root: Path,
    images: Path,
    models: Sequence[MadeModel],
    k: int = 2,
    meta: tuple[str, ...] = (),
    plugins: Sequence[PluginFile] = (),
    data: DataConfig | None = None,
    **record: object,
) -> RunStore:
    """A run with a blend of these models; `record` are further fields of its record."""
    config = SweepConfig.model_validate(
        {
            "name": root.name,
            "data": data or DataConfig(train=str(images)),
            "folds": FoldsConfig(k=k),
            "search": SearchConfig(backbones=("timm/test_vit",)),
            "training": {"meta_features": meta},
        }
    )
    manifest = read_manifest(config.data)
    store = RunStore(root)
    table = folds_csv(manifest, make_folds(manifest, config.folds))
    store.create(config, table, manifest.classes, plugins)
    for number, model in enumerate(models):
        _save(store, f"c{number:04d}", model, k)
    store.blend.update(
        EnsembleRecord.model_validate(
            {
                "method": "greedy",
                "members": tuple(
                    MemberRecord(
                        candidate=f"c{i:04d}", variant="raw", weight=m.weight,
                        temperature=m.temperature,
                    )
                    for i, m in enumerate(models)
                ),
                "oof_logloss": 1, "crossfit_logloss": 1, "crossfit_se": 0, "certificate": 0,
                "best_single_oof_logloss": 1, "best_single": "c0000 raw", "oof_accuracy": 0.5,
                "single_crossfit_logloss": 1, "members_considered": 2, "k": k,
                "candidates_considered": 2, "folds_hash": store.folds().hash,
            }
            | record
        )
    )  # fmt: skip
    return store


def _save(store: RunStore, name: str, model: MadeModel, k: int) -> None:
    params = {
        "image_size": model.image_size, "head": model.head, "loss": model.loss,
        "resize": model.resize,
    }  # fmt: skip
    store.save_candidate(CandidateRecord(candidate=name, backbone=model.backbone, params=params))
    models = RunModels(store, torch.device("cpu"))
    for fold in range(k):
        record = TrialRecord(
            candidate=name, fold=fold, status="finished", backbone=model.backbone, params=params,
            folds_hash=store.folds().hash, seed=0,
        )  # fmt: skip
        torch.manual_seed(1000 * fold + len(model.backbone))
        config = models.model_config(record)
        built = build_classifier(config, parts=models.parts)
        for parameter in built.head.parameters():  # a fresh head is nearly indifferent
            parameter.data.mul_(4)
        store.save_trial(record, weights={"raw": pack_weights(built.state_dict(), config)})


def noisy_images(folder: Path) -> list[str]:
    """Images of several shapes, one that is none, and one that is not there."""
    from PIL import Image

    folder.mkdir(parents=True)
    rng = np.random.default_rng(5)
    for i, (height, width) in enumerate([(40, 40), (90, 60), (20, 33), (64, 64), (130, 200)]):
        coarse = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(
            folder / f"사진 {i}.png"
        )
    (folder / "bad.png").write_bytes(b"no image")
    names = [f"사진 {i}.png" for i in range(5)]
    return [*names[:2], "bad.png", *names[2:], "missing.png"]


def run_without(
    forbidden: Sequence[str], code: str, cwd: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process in which these packages cannot be imported."""
    blocker = (
        "import sys\n"
        f"forbidden = {tuple(forbidden)!r}\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in forbidden:\n"
        "            raise ModuleNotFoundError(f'{name} is forbidden here', name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
    )
    import os

    done = subprocess.run(
        [sys.executable, "-c", blocker + code], cwd=cwd, capture_output=True, text=True,
        timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done
