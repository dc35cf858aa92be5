"""A trial that gives no sign of life is told of, and in the end its worker is ended."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from foldrace.config.schema import ResourcesConfig
from foldrace.run_folder.records import CandidateRecord, RaceDecision
from foldrace.scheduling.ray import watchdog
from foldrace.scheduling.ray.watchdog import Watchdog
from foldrace.scheduling.spending import RunningFold
from foldrace.scheduling.state import FoldTask
from foldrace.scheduling.updates import ResultUpdates
from tests.conftest import TinyRun


class Clock:
    """Pretended seconds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watchdog, "time", clock)
    return clock


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Workers that Ray was asked to end."""
    found: list[str] = []
    monkeypatch.setattr(watchdog, "ray", SimpleNamespace(kill=found.append))
    return found


def fold(clock: Clock, name: str = "c0007", backbone: str = "timm/x") -> RunningFold:
    record = CandidateRecord(candidate=name, backbone=backbone, params={})
    return RunningFold(FoldTask(record, 2), judged=False, started=clock.now, last_sign=clock.now)


def worker(trial_id: str) -> Any:
    state = SimpleNamespace(ray_actor=f"worker of {trial_id}")
    return SimpleNamespace(
        trial_id=trial_id, status="RUNNING", error_file=None, temporary_state=state
    )


def train(clock: Clock, dog: Watchdog, running: dict[str, RunningFold], seconds: float) -> None:
    """An epoch of every trial ends after so many seconds."""
    clock.now += seconds
    for each in running.values():
        each.epoch, each.last_sign = each.epoch + 1, clock.now
    assert list(dog.look(running, [])) == []


def test_ten_times_the_usual_epoch_is_a_line_and_twenty_times_the_end(
    clock: Clock, killed: list[str]
) -> None:
    dog, running = Watchdog(ResourcesConfig()), {"a": fold(clock)}
    for _ in range(4):
        train(clock, dog, running, 120.0)
    clock.now += 1190.0
    assert list(dog.look(running, [worker("a")])) == []
    clock.now += 20.0
    [line] = dog.look(running, [worker("a")])
    assert line == "c0007 fold2 has ended no epoch for 1210 s; an epoch takes 120 s as a rule"
    clock.now += 2.0
    assert list(dog.look(running, [worker("a")])) == []  # once
    clock.now += 1200.0
    [line] = dog.look(running, [worker("a")])
    assert "is ended, to be tried again" in line and killed == ["worker of a"]
    assert "hung" in str(running["a"].killed)
    clock.now += 2.0
    assert list(dog.look(running, [worker("a")])) == [] and len(killed) == 1


def test_a_limit_that_the_user_set(clock: Clock, killed: list[str]) -> None:
    """It holds from the first epoch on; a trial without a worker cannot be ended yet."""
    dog, running = Watchdog(ResourcesConfig(trial_timeout=30.0)), {"a": fold(clock)}
    clock.now += 31.0
    assert list(dog.look(running, [])) == [] and not killed
    clock.now += 2.0
    assert len(list(dog.look(running, [worker("b"), worker("a")]))) == 1
    assert killed == ["worker of a"]


def test_a_long_first_epoch_is_no_hang(clock: Clock, killed: list[str]) -> None:
    """Of a backbone of which nothing is known, whatever others take."""
    dog = Watchdog(ResourcesConfig())
    quick = {"a": fold(clock)}
    for _ in range(5):
        train(clock, dog, quick, 2.0)
    slow = {"b": fold(clock, "c0008", "timm/large")}
    clock.now += 3600.0
    assert list(dog.look(slow, [worker("b")])) == [] and not killed
    quick = {"c": fold(clock)}
    clock.now += 1801.0
    lines = list(dog.look(quick, [worker("c")]))
    assert len(lines) == 2 and killed == ["worker of c"]


def test_an_update_of_the_result_that_hangs_gives_its_slot_back(
    clock: Clock, killed: list[str], tiny_run: TinyRun
) -> None:
    dog = Watchdog(ResourcesConfig())
    updates = ResultUpdates(tiny_run.store, lambda: 1, clock.monotonic)
    updates.decided(complete(0.5), None)  # type: ignore[arg-type]
    assert updates.is_due(None)
    updates.start("u1")
    clock.now += 1799.0
    assert list(dog.look_at_update(updates, [worker("u1")])) == []
    clock.now += 2.0
    assert list(dog.look_at_update(updates, [])) == []  # it has no worker yet
    [line] = dog.look_at_update(updates, [worker("u1")])
    assert "has hung for 1801 s and is ended" in line and killed == ["worker of u1"]
    assert list(dog.look_at_update(updates, [worker("u1")])) == []  # once
    assert not updates.end() and updates.running is None
    assert not updates.is_due(None)  # until the blend is better


def complete(loss: float) -> RaceDecision:
    """The race's decision on a candidate with which the blend has this loss."""
    return RaceDecision(
        number=0, candidate="c0000", fold=1, rule="gain", action="complete", folds_done=2, rows=60,
        gain=-0.01, gain_se=0.001, complete=1, epochs_trained=2, reason="made up",
        blend_logloss=loss,
    )  # fmt: skip
