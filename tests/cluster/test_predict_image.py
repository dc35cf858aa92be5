"""`foldrace predict` with no other packages than Dockerfile.predict installs."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from foldrace.run_folder.blend_records import EnsembleRecord, MemberRecord
from foldrace.run_folder.records import CandidateRecord, TrialRecord
from foldrace.run_folder.store import RunStore
from foldrace.trainables.models.classifier import ModelConfig, build_classifier
from foldrace.trainables.predict import pack_weights
from tests.cluster.launch_files import ROOT, installed_packages
from tests.conftest import TINY_CLASSES, TinyRun


def with_dependencies(names: list[str]) -> dict[str, Distribution]:
    """The packages and whatever they require, by their name."""
    found, left = dict[str, Distribution](), [canonicalize_name(name) for name in names]
    while left:
        name = left.pop()
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:  # CUDA's libraries, which another build of torch requires
            assert name not in names
            continue
        needed = [Requirement(text) for text in found[name].requires or ()]
        left += [
            canonicalize_name(requirement.name)
            for requirement in needed
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        ]
    return found


@pytest.fixture
def small_image(tmp_path: Path) -> Path:
    """A folder of packages as the image has them: links to those that are installed here."""
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "foldrace").symlink_to(ROOT)
    listed = installed_packages("Dockerfile.predict")
    assert {"torch", "timm"} <= set(listed)
    for package in with_dependencies(listed).values():
        for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(package.locate_file(top))))
    assert not any((folder / name).exists() for name in ("ray", "optuna", "pandas", "numba"))
    return folder


@pytest.fixture
def run(tiny_run: TinyRun) -> RunStore:
    """A blend of one untrained candidate."""
    store = tiny_run.store
    store.save_candidate(CandidateRecord(candidate="c0000", backbone="timm/test_resnet", params={}))
    for fold in range(3):
        config = ModelConfig("timm/test_resnet", 3, 32)
        torch.manual_seed(fold)
        store.save_trial(
            TrialRecord(
                candidate="c0000", fold=fold, status="finished", backbone="timm/test_resnet",
                params={"image_size": 32}, folds_hash=store.folds().hash, seed=0,
            ),
            weights={"raw": pack_weights(build_classifier(config).state_dict(), config)},
        )  # fmt: skip
    store.blend.update(
        EnsembleRecord(
            method="greedy", members=(MemberRecord(candidate="c0000", variant="raw", weight=1),),
            oof_logloss=1, crossfit_logloss=1, crossfit_se=0, certificate=0,
            best_single_oof_logloss=1, best_single="c0000 raw", oof_accuracy=0.5,
            single_crossfit_logloss=1, members_considered=1, candidates_considered=1,
            folds_hash=store.folds().hash,
        )
    )  # fmt: skip
    return store


@pytest.mark.slow
def test_prediction_needs_only_what_the_small_image_has(
    run: RunStore, small_image: Path, tiny_images: Path
) -> None:
    images = sorted((tiny_images / "blue").iterdir())[:2]
    done = subprocess.run(
        [sys.executable, "-S", "-m", "foldrace.sweep", "predict", run.root, *images],
        env=dict(os.environ, PYTHONPATH=str(small_image)), cwd=small_image.parent,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(done.stdout.splitlines()))
    assert [row["image_path"] for row in rows] == [str(image) for image in images]
    for row in rows:
        assert row["error"] == ""
        assert sum(float(row[name]) for name in TINY_CLASSES) == pytest.approx(1, abs=1e-4)
