"""A fold trial that was interrupted goes on from its last saved epoch, to the same bits."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from foldrace.run_folder.records import Oof
from foldrace.run_folder.store import RunStore
from foldrace.trainables.devices import fresh_accelerator, seed_epoch
from foldrace.trainables.history import FoldScore, History
from foldrace.trainables.optimizers import build_optimizer
from foldrace.trainables.resume_state import ResumeState, from_bytes, to_bytes
from foldrace.trainables.schedules import build_schedule
from foldrace.trainables.spec import EpochReport, TrialStopped
from foldrace.trainables.state import TrainState
from foldrace.trainables.trial import run_trial
from tests.trainables.resumed_trials import (
    Watcher,
    assert_goes_on,
    assert_same_results,
    folder_of,
    interrupted,
    spec_for,
    until_written,
)
from tests.trainables.written_trials import another, read

pytestmark = pytest.mark.slow


class Judge(Watcher):
    """A watcher with rungs, which looks at the saved state at each."""

    def __init__(self, store: RunStore, rungs: Collection[int], epochs: float = math.inf) -> None:
        super().__init__(epochs)
        self.rungs, self._store = rungs, store
        self.saved: list[int] = []
        self.written = self.begun = 0

    def at_rung(self) -> None:
        data = self._store.resume_state("c0000", 0)
        assert data is not None and self.written == self.begun
        self.saved.append(len(from_bytes(data)["history"]["log"]))


def test_at_a_rung_nothing_is_being_written(tiny_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of that very epoch is there. A trial that goes on is not judged again where it
    was."""
    store: RunStore = tiny_run.store
    judge, save = Judge(store, {2, 4}, epochs=4), RunStore.save_resume_state

    def slowly(self: RunStore, candidate: str, fold: int, data: bytes | memoryview) -> None:
        judge.begun += 1
        time.sleep(0.5)  # longer than an epoch
        save(self, candidate, fold, data)
        judge.written += 1

    monkeypatch.setattr(RunStore, "save_resume_state", slowly)
    spec = spec_for(tiny_run, "c0000")
    with pytest.raises(TrialStopped):
        run_trial(spec, judge)
    until_written()
    assert judge.saved == [2, 4] and judge.written >= 2
    again = Judge(store, {2, 4})
    run_trial(spec, again)
    assert again.reports[0].epoch + 1 == 4 and again.saved == []


@pytest.mark.parametrize("backbone", ["timm/test_vit", "timm/test_resnet"])
def test_interrupted_after_any_epoch_gives_the_same_bits(tiny_run: Any, backbone: str) -> None:
    """One trial, after each of its epochs in turn."""
    undisturbed = spec_for(tiny_run, "c0000", backbone=backbone)
    whole = run_trial(undisturbed, Watcher())
    assert {"raw", "ema", "snap1", "snap2"} == set(whole.variants)
    spec = another(undisturbed, "c0001")
    for epochs in range(1, whole.epochs_trained):
        heard = [report.epoch for report in interrupted(spec, epochs).reports]
        assert heard[-1] == epochs - 1
        assert heard[0] < max(epochs - 1, 1)
    assert_goes_on(spec, epochs)
    assert_same_results(spec, undisturbed)
    record = tiny_run.store.trial(spec.candidate, 0)
    times = {
        "seconds": 0.0, "candidate": "", "started_at": 0.0, "ended_at": 0.0, "attempt": ""
    }  # fmt: skip
    assert record.model_copy(update=times) == whole.model_copy(update=times)


@pytest.mark.parametrize(
    "technique",
    [
        {"schedule": "plateau", "lr_patience": 1, "optimizer": "sgd"},
        {"cycles": 2, "optimizer": "timm/lamb"},
        {"sam_rho": 0.05, "layer_decay": 0.7},
        {"rdrop_alpha": 1.0, "mixup_alpha": 0.0, "mixup_prob": 0.0, "cutmix_prob": 0.0},
        {"freeze_epochs": 1, "unfreeze_epochs": 2, "size_start": 0.5},
    ],
    ids=lambda technique: next(iter(technique)),
)
def test_techniques_with_a_state_go_on(tiny_run: Any, technique: dict[str, Any]) -> None:
    undisturbed = spec_for(tiny_run, "c0000", backbone="timm/test_resnet", **technique)
    trained = run_trial(undisturbed, Watcher()).epochs_trained
    spec = another(undisturbed, "c0001")
    interrupted(spec, trained - 2)
    assert_goes_on(spec, trained - 2)
    assert_same_results(spec, undisturbed)


def test_interrupted_twice_in_scoring_and_in_training(tiny_run: Any) -> None:
    undisturbed = spec_for(tiny_run, "c0000")
    run_trial(undisturbed, Watcher())
    spec = another(undisturbed, "c0001")
    interrupted(spec, 1, batches=3)
    interrupted(spec, 3, batches=0)
    assert_goes_on(spec, 3)
    assert_same_results(spec, undisturbed)


@pytest.mark.parametrize("snapshots", [0, 2])
def test_a_state_has_no_weights_that_will_not_be_written(tiny_run: Any, snapshots: int) -> None:
    """The model, its average and AdamW's two moments, and the snapshots so far: those after the
    third and the fourth of 5 epochs."""
    spec = spec_for(tiny_run, "c0000", snapshots=snapshots)
    for epochs in (2, 4):
        interrupted(spec, epochs)
        data = (folder_of(spec) / "resume.pt").read_bytes()
        saved = from_bytes(data)
        kept = saved["history"]["kept"]
        trained = len(saved["history"]["log"])
        assert set(kept) == {f"snap{i + 1}" for i in range(snapshots) if trained > 2 + i}
        weights = sum(tensor.nbytes for tensor in saved["train_state"]["model"].values())
        assert 0 < len(data) / weights - (4 + len(kept)) < 0.3


def test_seconds_count_all_sessions(tiny_run: Any) -> None:
    spec = spec_for(tiny_run, "c0000")
    interrupted(spec, 2)
    state = from_bytes((folder_of(spec) / "resume.pt").read_bytes())
    state["seconds"] += 1000.0
    state["started_at"] -= 5000.0
    tiny_run.store.save_resume_state("c0000", 0, to_bytes(state))
    record = run_trial(spec, Watcher())
    assert 1000.0 < record.seconds < 5000.0
    assert record.started_at == state["started_at"]
    assert 5000.0 < record.ended_at - record.started_at < 6000.0


def test_before_the_first_save_it_starts_anew(tiny_run: Any) -> None:
    spec = spec_for(tiny_run, "c0000", save_every=3600.0)
    with pytest.raises(TrialStopped):
        run_trial(spec, Watcher(2))
    assert not folder_of(spec).exists()
    watcher = Watcher()
    run_trial(spec, watcher)
    assert watcher.reports[0].epoch == 0


@pytest.mark.parametrize("stopped", [True, False])
def test_only_a_stop_does_not_wait_for_the_write(
    tiny_run: Any, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    """Tune ends a process that takes 2 seconds to stop."""
    toy, goes_on, written = _Toy(tiny_run, "sgd"), threading.Event(), threading.Event()

    def slow(self: object, *arguments: object) -> None:
        goes_on.wait(30)
        written.set()

    monkeypatch.setattr(type(tiny_run.store), "save_resume_state", slow)
    toy.steps(0, 1)
    with (
        contextlib.suppress(TrialStopped),
        ResumeState(tiny_run.store, toy.trial, started=0.0) as state,
    ):
        state.save_if_due(toy.state, toy.history)
        if stopped:
            raise TrialStopped
        goes_on.set()
    assert written.is_set() is not stopped
    goes_on.set()
    until_written()
    assert written.is_set()


def test_a_trial_goes_on_with_less_memory(tiny_run: Any) -> None:
    """The micro-batch of an attempt after one that ran out of memory is no part of it."""
    spec = spec_for(tiny_run, "c0000", epochs=3)
    interrupted(spec, 2)
    watcher = Watcher()
    record = run_trial(replace(spec, micro_batch=5), watcher)
    assert watcher.reports[0].epoch < 2 and record.micro_batch == 5


def test_leftovers_of_a_killed_attempt_go(tiny_run: Any) -> None:
    spec = spec_for(tiny_run, "c0000", epochs=2)
    folder_of(spec).mkdir(parents=True)
    (folder_of(spec) / ".part-0123-resume.pt").write_bytes(b"half")
    (folder_of(spec) / "oof_snap7.npy").write_bytes(b"old")
    run_trial(spec, Watcher())
    left = {p.name for p in folder_of(spec).iterdir()}
    assert not left & {".part-0123-resume.pt", "oof_snap7.npy", "resume.pt"}


# -- any optimiser and any schedule

TYPICAL = (
    "adamw", "sgd", "timm/lamb", "timm/muon", "timm/adafactorbv", "timm/lion",
    "pytorch_optimizer/kron", "pytorch_optimizer/adashift", "pytorch_optimizer/ranger",
)  # fmt: skip


@pytest.mark.parametrize("name", TYPICAL)
def test_an_optimisers_state_comes_back(tiny_run: Any, name: str) -> None:
    undisturbed = _Toy(tiny_run, name)
    undisturbed.steps(0, 3)
    saved = _Toy(tiny_run, name)
    saved.steps(0, 3)
    with ResumeState(tiny_run.store, saved.trial, started=0.0) as state:
        state.save_if_due(saved.state, saved.history)
    back = _Toy(tiny_run, name)
    with ResumeState(tiny_run.store, back.trial, started=0.0) as state:
        assert state.restore(back.state, back.history)
    for toy in (undisturbed, back):
        toy.steps(3, 6)
    for one, two in zip(
        undisturbed.state.bare.parameters(), back.state.bare.parameters(), strict=True
    ):
        assert torch.equal(one, two)
    assert back.state.updates == undisturbed.state.updates == 6
    assert back.history.log == undisturbed.history.log
    assert back.history.variants().keys() == {"raw", "snap1"}


class _Toy:
    """The training state of a small convolutional net, channels last, on noise."""

    def __init__(self, run: Any, optimizer: str) -> None:
        self.trial = read(spec_for(run, "c0000", use_gpu=False))
        accelerator = fresh_accelerator(self.trial)
        torch.manual_seed(0)
        layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        model = nn.Sequential(*layers, nn.Linear(4 * 36, 5)).to(memory_format=torch.channels_last)
        params = replace(self.trial.params, optimizer=optimizer, schedule="plateau", lr_patience=1)
        inner = build_optimizer(model, params)
        schedule = build_schedule(inner, params, 3, 2)
        wrapped, prepared = accelerator.prepare(model, inner)
        self.state = TrainState(
            accelerator=accelerator,
            model=wrapped,
            bare=model,
            ema=None,
            criterion=nn.functional.cross_entropy,
            optimizer=prepared,
            schedule=schedule,
            sam_rho=0.0,
            rdrop_alpha=0.0,
            activation="softmax",
            layer_ids=None,
            clip_grad=None,
            micro_batch=8,
        )
        self.history = History(last=1, snapshots=(0,))

    def steps(self, first: int, end: int) -> None:
        """An epoch of these updates, which seeds the generators as one does."""
        seed_epoch(self.trial, first, rank=0)
        state = self.state
        for i in range(first, end):
            rng = torch.Generator().manual_seed(i)
            state.model(torch.randn(8, 3, 8, 8, generator=rng)).square().mean().backward()
            state.optimizer.step()
            state.optimizer.zero_grad()
            state.updates += 1
            state.schedule.step_update(state.updates)
        self.history.log.append(EpochReport(len(self.history.log), *[0.5] * 11))
        oof = Oof(np.zeros((2, 5), np.float16), np.ones(2, np.float32))
        scored = FoldScore(0.5, 0.5, 1.0, 0.5 / end, oof)
        self.history.keep({"raw": state.bare}, {"raw": scored})
        state.schedule.epoch_done(0.5)
