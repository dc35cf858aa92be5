"""One device of a trial that has several: started once a device by test_data_parallel.py.

Takes a pickled TrialSpec, what to do beside training, and a file for what only this process
knows; the process group comes from the environment, as Ray Train sets it.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from foldrace.trainables import history, step, trial
from foldrace.trainables import state as train_state
from foldrace.trainables.models.classifier import build_classifier
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


def without_memory(state: TrainState, *arguments: Any) -> Any:
    """`_gradients` on a device whose memory is full."""
    raise torch.OutOfMemoryError("no memory left")


def with_an_idle_parameter(*arguments: Any, **options: Any) -> nn.Module:
    """`build_classifier` of a backbone that has a weight which nothing depends on."""
    model = build_classifier(*arguments, **options)
    model.body.register_parameter("idle", nn.Parameter(torch.ones(3)))
    return model


def main(spec_file: str, what: str, notes_file: str) -> None:
    spec = pickle.loads(Path(spec_file).read_bytes())
    rank = int(os.environ["RANK"])
    if int(os.environ["WORLD_SIZE"]) > 1:
        distributed.init_process_group("gloo")
    seen: dict[str, list[float]] = {}
    trial.score_fold = checksums(seen)  # type: ignore[assignment]
    if what == "full" and rank == 1:
        step._gradients = without_memory
    if what == "idle":
        train_state.build_classifier = with_an_idle_parameter  # type: ignore[assignment]
    watcher = Watcher()
    record = trial.run_trial(spec, watcher)
    seen["train_loss"] = [e.train_loss for e in watcher.epochs]
    seen["draws"] = [float(torch.rand(()))]
    seen["written"] = [float(Path(spec.run, "trials", spec.candidate).is_dir())]
    seen["micro_batch"] = [record.micro_batch]
    Path(notes_file).write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
