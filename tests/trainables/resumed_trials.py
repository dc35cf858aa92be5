"""Fold trials that are interrupted and go on: what all tests of saved states share."""

from __future__ import annotations

import csv
import io
import math
import threading
from pathlib import Path
from typing import Any

import pytest

from foldrace.config.hyperparameters import KNOBS
from foldrace.trainables.spec import EpochReport, TrialSpec, TrialStopped
from foldrace.trainables.trial import run_trial
from tests.trainables.written_trials import written_trial

ALWAYS = 1e-6  # seconds between saves: after every epoch


class Watcher:
    """Keeps the reports; asks for the end once so many epochs were reported, after so many more
    batches of the next one."""

    def __init__(self, epochs: float = math.inf, batches: int = 1) -> None:
        self.reports: list[EpochReport] = []
        self._epochs, self._left = epochs, batches

    def report(self, epoch: EpochReport) -> None:
        self.reports.append(epoch)

    def stop_requested(self) -> bool:
        if not self.reports or self.reports[-1].epoch + 1 < self._epochs:
            return False
        self._left -= 1
        return self._left < 0


def spec_for(run: Any, candidate: str, **changes: Any) -> TrialSpec:
    """Everything that draws random numbers or has a state: dropout, stochastic depth, MixUp,
    augmentation, averaged weights, snapshots, clipping, micro-batches, the pull to the start."""
    params: dict[str, Any] = {
        "epochs": 5, "image_size": 32, "batch_size": 14, "lr": 4e-3, "dropout": 0.3,
        "drop_path": 0.2, "mixup_alpha": 0.4, "mixup_prob": 0.7, "label_smoothing": 0.1,
        "ema_epochs": 0.9, "snapshots": 2, "cutmix_prob": 0.2, "random_erasing": 0.3,
        "policy": "randaugment", "flip": 0.5, "l2_sp": 0.1,
    }  # fmt: skip
    params |= {
        "precision": "fp32", "pretrained": False, "save_every": ALWAYS, "micro_batch": 10,
    }  # fmt: skip
    params |= {key: changes.pop(key) for key in set(changes) & set(KNOBS)}
    transforms = ({"torchvision.ColorJitter": {"brightness": 0.3}},)
    backbone = changes.pop("backbone", "timm/test_vit")
    return written_trial(run, candidate, backbone, params, transforms=transforms, **changes)


def folder_of(spec: TrialSpec) -> Path:
    return Path(spec.run) / "trials" / spec.candidate / f"fold{spec.fold}"


def result_files(spec: TrialSpec) -> dict[str, bytes]:
    """What a trial computed: all but its times."""
    kept = [p for p in folder_of(spec).iterdir() if p.suffix in (".npy", ".safetensors")]
    return {p.name: p.read_bytes() for p in kept}


def log_without_times(spec: TrialSpec) -> list[dict[str, str]]:
    text = (folder_of(spec) / "train_log.csv").read_text(encoding="utf-8")
    return [row | {"seconds": ""} for row in csv.DictReader(io.StringIO(text))]


def interrupted(spec: TrialSpec, epochs: int, batches: int = 1) -> Watcher:
    watcher = Watcher(epochs, batches)
    with pytest.raises(TrialStopped):
        run_trial(spec, watcher)
    until_written()
    assert [p.name for p in folder_of(spec).iterdir()] == ["resume.pt"]
    return watcher


def until_written() -> None:
    """A trial that stops does not wait for its state's last write."""
    for thread in threading.enumerate():
        if thread.name.startswith("resume-state"):
            thread.join()


def assert_goes_on(spec: TrialSpec, at_most: int) -> Watcher:
    """It hears of the last saved epoch, then of each further one. (A save is left out where the
    one before is still being written, but never the first.)"""
    watcher = Watcher()
    record = run_trial(spec, watcher)
    heard = [report.epoch for report in watcher.reports]
    assert 0 <= heard[0] < at_most
    assert heard == list(range(heard[0], record.epochs_trained))
    return watcher


def assert_same_results(spec: TrialSpec, undisturbed: TrialSpec) -> None:
    assert result_files(spec) == result_files(undisturbed)
    assert log_without_times(spec) == log_without_times(undisturbed)
