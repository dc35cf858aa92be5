"""One device of trials that have several: started once a device by test_data_parallel.py, for one
trial after another, since most of a process's time goes into its imports.

Takes pickled pairs of a TrialSpec and what to do beside training, and a file for what only this
process knows of each; the process group comes from the environment, as Ray Train sets it.
"""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import distributed, nn

from foldrace.trainables import history, trial
from foldrace.trainables import state as train_state
from foldrace.trainables.models.classifier import build_classifier
from foldrace.trainables.spec import TrialSpec
from foldrace.trainables.state import TrainState


class Watcher:
    """Keeps the reports."""

    def __init__(self) -> None:
        self.epochs: list[Any] = []

    def report(self, epoch: Any) -> None:
        self.epochs.append(epoch)

    def stop_requested(self) -> bool:
        return False


def checksums(seen: dict[str, list[float]]) -> Any:
    """`score_fold`, which notes what the models were that it scored."""
    real = history.score_fold

    def watching(train_state: TrainState, *arguments: Any) -> Any:
        for model in train_state.variants().values():
            state = [t for t in model.state_dict().values() if t.is_floating_point()]
            seen.setdefault("scored", []).append(float(sum(t.double().sum() for t in state)))
        return real(train_state, *arguments)

    return watching


def with_an_idle_parameter(*arguments: Any, **options: Any) -> nn.Module:
    """`build_classifier` of a backbone that has a weight which nothing depends on."""
    model = build_classifier(*arguments, **options)
    model.body.register_parameter("idle", nn.Parameter(torch.ones(3)))
    return model


def train(spec: TrialSpec, what: str) -> dict[str, list[float]]:
    """Train it, in a process that has drawn nothing yet; gives what only this process knows."""
    torch.manual_seed(0)
    seen: dict[str, list[float]] = {}
    watcher = Watcher()
    built = with_an_idle_parameter if what == "idle" else build_classifier
    with (
        patch.object(trial, "score_fold", checksums(seen)),
        patch.object(train_state, "build_classifier", built),
    ):
        record = trial.run_trial(spec, watcher)
    seen["train_loss"] = [e.train_loss for e in watcher.epochs]
    seen["draws"] = [float(torch.rand(()))]
    seen["written"] = [float(Path(spec.run, "trials", spec.candidate).is_dir())]
    seen["micro_batch"] = [record.micro_batch]
    return seen


def main(jobs_file: str, notes_file: str) -> None:
    """The first trial that fails ends the process."""
    distributed.init_process_group("gloo")
    notes: dict[str, dict[str, list[float]]] = {}
    for spec, what in pickle.loads(Path(jobs_file).read_bytes()):
        notes[spec.candidate] = train(spec, what)
        Path(notes_file).write_text(json.dumps(notes), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
