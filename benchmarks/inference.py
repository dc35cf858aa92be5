"""Images a second of a blend of 10 members, from the files to the blend's probabilities.

Untrained models (only their speed is looked at) of 10 candidates x 2 folds, photos of 500 px. Ours
decodes each photo once for all models; the peer is the loop that is written by hand: for each model
a DataLoader over the photos (in this process, and with a process a core), then the mean. Both have
all models in memory before the clock starts; each side runs in a process of its own, in turns.
Also with one model in memory at a time (`--max-memory`). Seconds of the clock and of all
processors: where other work runs beside, the latter say more.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from harness import ROOT, Results, environment, in_turns, options
from sides.photos import write_photos

_MEMBERS, _FOLDS, _CLASSES = 10, 2, 10
_GOAL = 2.0
_OURS, _PLAIN = "ours", "plain loop"
_OTHERS = ("ours, one model at a time", "plain loop, loader processes")


@dataclass(frozen=True)
class Case:
    """Ten members of one backbone."""

    backbone: str
    size: int
    images: int
    pairs: int


_CASES = (
    Case("timm/mobilenetv3_small_100", 128, 40, 1),
    Case("timm/resnet18", 224, 20, 1),
)
_QUICK = (Case("timm/test_resnet", 64, 64, 1),)


def _make_run(root: Path, photos: Path, case: Case) -> None:
    """A run folder with the blend of ten untrained candidates of equal weight."""
    from foldrace.config.schema import DataConfig, FoldsConfig, SearchConfig, SweepConfig
    from foldrace.dataset.folds import folds_csv, make_folds
    from foldrace.dataset.manifest import read_manifest
    from foldrace.run_folder.blend_records import EnsembleRecord, MemberRecord
    from foldrace.run_folder.store import RunStore

    config = SweepConfig(
        name=root.name,
        data=DataConfig(train=str(photos)),
        folds=FoldsConfig(k=_FOLDS),
        search=SearchConfig(backbones=(case.backbone,)),
    )
    manifest = read_manifest(config.data)
    store = RunStore(root)
    store.create(config, folds_csv(manifest, make_folds(manifest, config.folds)), manifest.classes)
    names = [f"c{i:04d}" for i in range(_MEMBERS)]
    for name in names:
        _save_candidate(store, name, case)
    members = (MemberRecord(candidate=n, variant="raw", weight=1 / _MEMBERS) for n in names)
    store.blend.update(
        EnsembleRecord(
            method="uniform", members=tuple(members), oof_logloss=1, crossfit_logloss=1,
            crossfit_se=0, certificate=0, best_single_oof_logloss=1, best_single="c0000 raw",
            single_crossfit_logloss=1, oof_accuracy=0.1, members_considered=_MEMBERS,
            candidates_considered=_MEMBERS, folds_hash=store.folds().hash,
        )
    )  # fmt: skip


def _save_candidate(store, name: str, case: Case) -> None:  # type: ignore[no-untyped-def]
    from foldrace.run_folder.records import CandidateRecord, TrialRecord
    from foldrace.trainables.models.classifier import ModelConfig, build_classifier
    from foldrace.trainables.predict import pack_weights

    config = ModelConfig(case.backbone, _CLASSES, case.size)
    store.save_candidate(CandidateRecord(candidate=name, backbone=case.backbone, params={}))
    for fold in range(_FOLDS):
        torch.manual_seed(int(name[1:]) * _FOLDS + fold)
        trial = TrialRecord(
            candidate=name, fold=fold, status="finished", backbone=case.backbone,
            params={"image_size": case.size}, folds_hash=store.folds().hash, seed=0,
        )  # fmt: skip
        weights = pack_weights(build_classifier(config).state_dict(), config)
        store.save_trial(trial, weights={"raw": weights})


def _side(run: Path, photos: Path, side: str) -> dict[str, float]:
    script = str(ROOT / "benchmarks" / "sides" / "blend_inference.py")
    command = [sys.executable, script, str(run), str(photos), side]
    done = subprocess.run(command, env=environment(), check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measure(results: Results, case: Case, folder: Path) -> float:
    """How many times as fast ours is, by processor time."""
    photos, run = folder / "photos", folder / "run"
    write_photos(photos, case.images)
    _make_run(run, photos, case)
    ours, plain = (partial(_side, run, photos, side) for side in (_OURS, _PLAIN))
    turns = in_turns(ours, plain, case.pairs)
    runs = {_OURS: turns.a, _PLAIN: turns.b}
    runs |= {side: (_side(run, photos, side),) for side in _OTHERS}
    for side, found in runs.items():
        results.add(
            f"{case.backbone}, {case.size} px, {_MEMBERS} members x {_FOLDS} folds, "
            f"{case.images} photos of 500 px, {found[0]['threads']:.0f} thread(s)",
            side=side,
            images_per_second=median(one["images"] / one["seconds"] for one in found),
            processor_ms_per_image=median(
                1000 * one["processor_seconds"] / one["images"] for one in found
            ),
            peak_mb=median(one["peak_mb"] for one in found),
        )
    return median(1 / ratio for ratio in turns.ratios(lambda one: one["processor_seconds"]))


def main() -> None:
    given = options(__doc__)
    results = Results("inference")
    for case in _QUICK if given.quick else _CASES:
        with tempfile.TemporaryDirectory() as scratch:
            ratio = _measure(results, case, Path(scratch))
        goal = f"{case.backbone}, {case.size} px: times as fast as the plain loop"
        results.at_least(goal, _GOAL, ratio)
        results.publish(given)  # after each, so that an end in between loses nothing


if __name__ == "__main__":
    main()
