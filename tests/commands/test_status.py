"""`status` from the run folder alone, while a sweep is at work on it and afterwards."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

import foldrace.commands.status
from foldrace.commands.status import status
from foldrace.console.machine import only_driver
from foldrace.console.terminal import Terminal
from foldrace.run_folder.records import CandidateRecord, RaceDecision, TrialRecord, VariantScore
from foldrace.run_folder.store import RunStore

FOLDS = 3
Action = Literal["continue", "park", "stop", "complete"]


@pytest.fixture
def store(make_tiny_run: Callable[..., Any]) -> RunStore:
    """Two candidates that were stopped, one with all folds, one with one of three; of 5."""
    store: RunStore = make_tiny_run(k=FOLDS).store
    config = store.config()
    search = config.search.model_copy(update={"candidates": 5, "fold_trials": 12})
    store.save_config(config.model_copy(update={"search": search}))
    number = 0
    for candidate, folds in enumerate((1, 2, 3, 1)):
        name = f"c{candidate:04d}"
        store.save_candidate(CandidateRecord(candidate=name, backbone="timm/test_vit", params={}))
        for fold in range(folds):
            _save_trial(store, name, fold)
            goes_on = fold < folds - 1 or candidate == 3
            last = fold == FOLDS - 1
            action: Action = "continue" if goes_on else "complete" if last else "stop"
            _save_decision(store, name, fold, number, action)
            number += 1
    return store


def _save_trial(store: RunStore, candidate: str, fold: int) -> None:
    score = VariantScore(rows=20, val_logloss=0.5, calibrated_logloss=0.5, val_acc=0.8, epoch=1)
    store.save_trial(
        TrialRecord(
            candidate=candidate, fold=fold, status="finished", backbone="timm/test_vit", params={},
            folds_hash=store.folds().hash, seed=0, seconds=60.0, epochs_trained=2,
            variants={"raw": score},
        )
    )  # fmt: skip


def _save_decision(
    store: RunStore,
    candidate: str,
    fold: int,
    number: int,
    action: Action,
    epoch: int | None = None,
) -> None:
    gain = -0.0031 if action == "stop" else 0.002
    store.save_decision(
        RaceDecision(
            number=number, candidate=candidate, fold=fold, rule="gain", action=action,
            epoch=epoch, folds_done=fold + (epoch is None), rows=20, gain=gain, gain_se=0.0009,
            complete=0, blend_logloss=0.321, epochs_trained=2, reason=f"gain {gain:+.4f} ± 0.0009",
        )
    )  # fmt: skip


def _shown(store: RunStore, watch: bool = False) -> str:
    console = Terminal(width=100)
    with console.capture() as capture:
        status(store.root, watch, console)
    return capture.get()


def test_while_a_sweep_is_at_work(store: RunStore) -> None:
    with only_driver(store, "run"):
        lines = _shown(store).splitlines()
    assert "4 candidates: 2 stopped, 1 complete, 1 running" in lines
    # The settled candidates had 6 of 9 folds: 2/3 of the 5 folds that the open and the new one may
    # still have, 60 s each.
    assert "7 of 11 fold trials ended; about 3m20s of training left" in lines
    assert "race: the blend of the complete candidates has log loss 0.3210" in lines
    assert lines[-4:] == [
        "  c0002 goes on after fold 1: gain +0.0020 ± 0.0009",
        "  c0002 complete after fold 2: gain +0.0020 ± 0.0009",
        "  c0003 goes on after fold 0: gain +0.0020 ± 0.0009",
        "budget: 4 of 5 candidates, 7 of 12 fold trials",
    ]
    assert any("+0.0020" in line for line in lines if "c0002" in line and "complete " in line)


@pytest.mark.parametrize("at_work", [True, False])
def test_parked_candidates_are_counted_and_shown(store: RunStore, at_work: bool) -> None:
    """One in its first fold, which counts as begun in the budget, and one after its first fold."""
    name = "c0004"
    store.save_candidate(CandidateRecord(candidate=name, backbone="timm/test_vit", params={}))
    _save_decision(store, name, 0, number=8, action="park", epoch=3)
    _save_decision(store, "c0003", 0, number=9, action="park")
    with only_driver(store, "run") if at_work else contextlib.nullcontext():
        lines = _shown(store).splitlines()
    counts = next(line for line in lines if line.startswith("5 candidates: "))
    assert set(counts.removeprefix("5 candidates: ").split(", ")) == {
        "2 stopped", "2 parked", "1 complete",
    }  # fmt: skip
    for candidate in ("c0003", name):
        assert any(candidate in line and " parked " in line and "/3" in line for line in lines)
    assert lines[-3:] == [
        "  c0004 parked after epoch 3 of fold 0: gain +0.0020 ± 0.0009",
        "  c0003 parked after fold 0: gain +0.0020 ± 0.0009",
        "budget: 5 of 5 candidates, 8 of 12 fold trials",
    ]


def test_with_a_time_budget_nothing_is_said_of_the_end(store: RunStore) -> None:
    config = store.config()
    resources = config.resources.model_copy(update={"time_budget": 5400.0})
    store.save_config(config.model_copy(update={"resources": resources}))
    with only_driver(store, "run"):
        assert "7 fold trials ended; the run has a time budget of 1h30m" in _shown(store)


def test_after_a_sweep_that_its_budget_ended(store: RunStore) -> None:
    """No process holds the lock, and no candidate waits for anything: watching has an end."""
    with only_driver(store, "run"):
        pass
    lines = _shown(store, watch=True).splitlines()
    assert "4 candidates: 2 stopped, 1 complete, 1 unfinished" in lines
    assert "7 fold trials ended; no run or resume is at work on this folder" in lines


def test_a_run_whose_logs_are_gone_is_not_at_work(store: RunStore) -> None:
    assert not (Path(store.root) / "logs" / "driver.lock").exists()
    assert "no run or resume" in _shown(store)


def test_watching_ends_with_the_sweep(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foldrace.commands.status, "_WATCH_EVERY", 0.02)
    seen: list[str] = []
    watcher = threading.Thread(target=lambda: seen.append(_shown(store, watch=True)))
    with only_driver(store, "run"):
        watcher.start()
        watcher.join(0.5)
        assert watcher.is_alive()
    watcher.join(20)
    assert not watcher.is_alive()
    assert "1 running" in seen[0] and "1 unfinished" in seen[0]
