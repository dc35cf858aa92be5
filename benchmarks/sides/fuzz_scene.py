"""Sound examples that fuzz cases begin from: images, tables, an archive, a run folder with a blend.

Made once, in a process of its own, and kept as bytes.
"""

from __future__ import annotations

import io
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

CLASSES = ("cat", "dog", "가")
K = 2


@dataclass
class Examples:
    """What is sound, by the name that it has in a box."""

    data: dict[str, bytes] = field(default_factory=dict)
    """Tables and images of a small competition."""
    run: dict[str, bytes] = field(default_factory=dict)
    """A run folder with a blend and a submission."""
    images: dict[str, bytes] = field(default_factory=dict)
    """An image of each format, by suffix."""
    config: dict[str, Any] = field(default_factory=dict)
    """Keys of the run's config, its paths relative to `data`."""


def read_folder(folder: Path) -> dict[str, bytes]:
    """Every file at any depth."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def images() -> dict[str, bytes]:
    """Small images of every format and of the pixel types that differ."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 255, (24, 20, 3), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 65_535, (9, 7), dtype=np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    found: dict[str, bytes] = {}

    def add(name: str, image: Image.Image, kind: str, **options: Any) -> None:
        file = io.BytesIO()
        try:
            image.save(file, kind, **options)
        except (KeyError, OSError, ValueError):
            return  # this Pillow was built without the format
        found[name] = file.getvalue()

    add("a.jpg", rgb, "JPEG", exif=exif, icc_profile=bytes(200))
    add("b.jpg", rgb, "JPEG", progressive=True, quality=30)
    add("c.jpg", rgb.convert("CMYK"), "JPEG")
    add("d.png", rgb.convert("RGBA"), "PNG")
    add("e.png", deep, "PNG")
    add("f.png", rgb.convert("P"), "PNG", transparency=3)
    add("g.png", rgb, "PNG", save_all=True, append_images=[rgb.rotate(90)])
    add("h.gif", rgb.convert("P"), "GIF", save_all=True, append_images=[rgb.convert("P")])
    add("i.webp", rgb.convert("RGBA"), "WEBP")
    add("j.webp", rgb, "WEBP", lossless=True, exif=exif)
    for name, packing in (("k", None), ("l", "tiff_lzw"), ("m", "tiff_adobe_deflate")):
        add(f"{name}.tif", rgb, "TIFF", **({"compression": packing} if packing else {}))
    add("n.tif", rgb.convert("1"), "TIFF", compression="group4")
    add("o.tif", deep, "TIFF")
    add("p.bmp", rgb, "BMP")
    add("q.ppm", rgb, "PPM")
    add("r.jp2", rgb, "JPEG2000")
    add("s.avif", rgb, "AVIF")
    return found


def write_data(folder: Path) -> dict[str, Any]:
    """A competition; the keys of its config."""
    rng = np.random.default_rng(1)
    small = list(images().items())
    rows, tests = [], []
    for i in range(12):
        suffix, data = small[i % len(small)]
        name = f"train/{CLASSES[i % 3]}/{i}{Path(suffix).suffix}"
        write_folder(folder, {name: data})
        rows.append(f"{name},{CLASSES[i % 3]},g{i // 2}")
    for i in range(4):
        pixels = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        (folder / "test").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"test/t{i}.png")
        tests.append(f"t{i},test/t{i}.png")
    tables = {
        "train.csv": ["image_path,label,group", *rows],
        "test.csv": ["id,image_path", *tests],
        "sample.csv": ["id,dog,cat,가", *(f"t{i},0.3,0.3,0.4" for i in (2, 0, 1, 3))],
        "exclude.csv": ["image_path", rows[0].split(",")[0]],
        "fixes.csv": ["image_path,label", f"{rows[1].split(',')[0]},cat"],
    }
    for name, lines in tables.items():
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    with zipfile.ZipFile(folder / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for row in rows[:6]:
            name = row.split(",")[0]
            archive.write(folder / name, name.removeprefix("train/"))
    return {
        "name": "example",
        "data": {
            "train": "train.csv",
            "test": "test.csv",
            "sample_submission": "sample.csv",
            "label_column": "label",
            "group_column": "group",
        },
        "folds": {"k": K},
        "search": {
            "backbones": ["timm/test_efficientnet"],
            "candidates": 2,
            "space": {"lr": {"low": 2e-3, "high": 1e-2}, "batch_size": 16},
        },
        "training": {"epochs": 1, "image_size": 32, "pretrained": False},
        "augment": {"policy": "none"},
        "race": {"rule": "none"},
    }


def make_examples(root: Path) -> Examples:
    """Everything; the run folder is written by the package, its models are not trained."""
    from foldrace.commands.ensemble import Changes, reblend
    from foldrace.commands.submit import PLAIN, submit
    from foldrace.config.load import parse_mapping
    from foldrace.console.terminal import Terminal
    from foldrace.dataset.folds import folds_csv, make_folds
    from foldrace.dataset.manifest import read_manifest
    from foldrace.run_folder.store import RunStore

    torch.set_num_threads(1)  # a pool of threads is not there after a fork
    os.environ["FOLDRACE_CACHE"] = str(root / "cache")
    config_keys = write_data(root / "data")
    config = parse_mapping(config_keys, "example", root / "data").require()
    manifest = read_manifest(config.data, config.folds.column)
    store = RunStore(root / "run")
    store.create(config, folds_csv(manifest, make_folds(manifest, config.folds)), manifest.classes)
    for i in range(2):
        _add_candidate(store, f"c{i:04d}", seed=i)
    screen = Terminal(io.StringIO())
    reblend(str(root / "run"), Changes(), (), (), screen)
    submit(str(root / "run"), PLAIN, None, screen)
    return Examples(
        read_folder(root / "data"),
        read_folder(root / "run"),
        images(),
        config_keys,
    )


def _add_candidate(store: Any, name: str, seed: int) -> None:
    from foldrace.config.hyperparameters import TrialParams
    from foldrace.run_folder.records import (
        CandidateRecord,
        Oof,
        RaceDecision,
        TrialRecord,
        VariantScore,
    )  # fmt: skip
    from foldrace.trainables.models.classifier import build_classifier, trial_model_config
    from foldrace.trainables.predict import pack_weights

    params = TrialParams.from_dict(
        TrialParams().as_dict() | {"image_size": 32, "epochs": 1, "pretrained": False}
    ).as_dict()
    backbone = "timm/test_efficientnet"
    store.save_candidate(CandidateRecord(candidate=name, backbone=backbone, params=params))
    rng, labels, folds = np.random.default_rng(seed), store.labels(), store.folds()
    for fold in range(K):
        rows = np.flatnonzero(folds.fold == fold)
        prob = rng.dirichlet(np.ones(len(CLASSES)), len(rows)).astype(np.float32)
        true = prob[np.arange(len(rows)), labels[rows]]
        score = VariantScore(
            rows=len(rows), val_logloss=1.2, calibrated_logloss=1.1, val_acc=0.3, epoch=0
        )
        record = TrialRecord(
            candidate=name, fold=fold, status="finished", backbone=backbone, params=params,
            folds_hash=folds.hash, seed=1, variants={"raw": score}, epochs_trained=1, seconds=1.0,
        )  # fmt: skip
        model_config = trial_model_config(
            record, len(CLASSES), store.config().training.meta_features
        )
        torch.manual_seed(fold)
        weights = pack_weights(build_classifier(model_config).state_dict(), model_config)
        oof = Oof(np.log(prob).astype(np.float16), true)
        store.save_trial(record, {"raw": oof}, rows, {"raw": weights}, "epoch,train_loss\n0,1\n")
        store.save_decision(
            RaceDecision(
                number=2 * seed + fold, candidate=name, fold=fold, rule="none",
                action="complete" if fold == K - 1 else "continue", folds_done=fold + 1,
                rows=len(rows), complete=seed, epochs_trained=fold + 1, reason="rule none",
            )
        )  # fmt: skip
