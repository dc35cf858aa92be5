"""Whose fault a failed attempt is: the trial's own, the surroundings', or everybody's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from foldrace.run_folder.records import TrialRecord
from foldrace.scheduling.failures import _kind
from foldrace.scheduling.state import FoldTask
from tests.scheduling.pretend_workers import Live, PretendWorkers, sweep_config

MakeWorkers = Callable[..., PretendWorkers]
NODE_DIED = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: ImplicitFunc\n"
    "The actor died because its node has died. Node Id: 5f\n\tthe actor's node was terminated"
)
MEMORY = "Worker exit type: NODE_OUT_OF_MEMORY Worker exit detail: Task was killed due to the node"
CUT_OFF = (
    "The actor e84d is unavailable: The actor is temporarily unavailable: RpcError: RPC error: "
    "Socket closed rpc_code: 14. The task may or may not have been executed on the actor."
)
KILLED = "Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits"


@pytest.fixture
def make(tmp_path: Path) -> MakeWorkers:
    def made(candidates: int = 4, slots: int = 2, max_failures: int = 2) -> PretendWorkers:
        config = sweep_config("none", candidates, max_failures=max_failures)
        workers = PretendWorkers(tmp_path / "run", config, slots)
        workers.clock = iter(lambda: workers.now, None)  # type: ignore[attr-defined]
        workers.now = 0.0  # type: ignore[attr-defined]
        return workers

    return made


def die(workers: PretendWorkers, trial: Live, ray_says: str) -> None:
    """The trial's process is gone, and Ray has said so."""
    workers.live.remove(trial)
    workers.sweep.trial_over(trial.trial_id, ray_says=ray_says)


def ask(workers: PretendWorkers, name: str) -> object:
    task = workers.sweep.suggest(name)
    if isinstance(task, FoldTask):
        workers._start(name, task)
    return task


@pytest.mark.parametrize("text", [NODE_DIED, MEMORY, CUT_OFF])
def test_lost_surroundings_cost_a_trial_nothing(make: MakeWorkers, text: str) -> None:
    """Not even with max_failures: 0, and it goes on from its saved state."""
    workers = make(candidates=1, slots=1, max_failures=0)
    for epoch in (1, 2, 3):
        workers.fill()
        [trial] = workers.live
        assert trial.epochs == epoch - 1
        workers.epoch(trial)
        workers.save(trial)
        die(workers, trial, text)
        assert workers.store.resume_state("c0000", 0) == str(epoch).encode()
    summaries = workers.run()
    assert [s.status for s in summaries] == ["complete"]


def test_a_killed_worker_is_the_trials_own_fault(make: MakeWorkers) -> None:
    """It may be the trial that makes the process crash; nobody else is left to compare with."""
    workers = make(candidates=1, slots=1, max_failures=0)
    workers.fill()
    die(workers, workers.live[0], KILLED)
    assert workers.fill()
    assert [s.status for s in workers.store.summaries()] == ["failed"]


def fails(workers: PretendWorkers, trial: Live, error: str) -> None:
    workers.live.remove(trial)
    name, fold = trial.key
    workers.store.save_trial(
        TrialRecord(
            candidate=name, fold=fold, status="failed", backbone="timm/x", params={}, seed=0,
            folds_hash=workers.store.folds().hash, error=error,
        )
    )  # fmt: skip
    workers.sweep.trial_over(trial.trial_id)


def test_an_error_of_everybody_pauses_the_sweep_and_is_nobodys(make: MakeWorkers) -> None:
    """The disk goes away in mid-sweep, and comes back: the end is as if nothing had happened."""
    workers = make(candidates=4, slots=2, max_failures=2)
    said: list[str] = []
    workers.sweep.listeners.append(_Ears(said))
    workers.fill()
    for trial in list(workers.live):
        workers.epoch(trial)
    for number in range(7):  # each attempt meets another image
        fails(workers, workers.live[0], f"ImageError: /data/{number}.png: Stale file handle")
        if workers.sweep.failures.outage is None:
            workers.fill()
    outage = workers.sweep.failures.outage
    assert outage is not None and "Stale file handle" in outage.error
    while workers.live:  # what still runs fails, too, and is not counted
        fails(workers, workers.live[0], "ImageError: /data/x.png: Stale file handle")
    assert "Stale file handle" in str(workers.sweep.failures.waiting)
    assert all(ask(workers, f"early{i}") is None for i in range(5))

    workers.now = 11.0  # type: ignore[attr-defined]
    assert isinstance(ask(workers, "look"), FoldTask)
    assert ask(workers, "no second one") is None
    fails(workers, workers.live[0], "ImageError: /data/y.png: Stale file handle")
    workers.now = 12.0  # type: ignore[attr-defined]
    assert ask(workers, "too early") is None  # the pause has grown
    workers.now = 40.0  # type: ignore[attr-defined]
    assert isinstance(ask(workers, "look again"), FoldTask)
    workers.epoch(workers.live[0])
    assert workers.sweep.failures.outage is None and workers.sweep.failures.waiting is None
    summaries = workers.run()
    assert [s.status for s in summaries] == ["complete"] * 4
    assert any("waits: ImageError" in line for line in said)


def test_a_broken_environment_is_told_from_an_outage(make: MakeWorkers) -> None:
    workers = make(candidates=4, slots=2)
    workers.fill()
    attempts = 0
    while workers.sweep.failures.outage is None:
        fails(workers, workers.live[0], "OSError: libcuda.so.1: cannot open shared object file")
        attempts += 1
        if workers.sweep.failures.outage is None:
            workers.fill()
    assert workers.sweep.failures.never_worked
    assert attempts == 2 * 3 + 1  # every one of the first candidate's, and one of the next
    assert not workers.store.trials()


def test_one_bad_candidate_among_good_ones_fails_alone(make: MakeWorkers) -> None:
    """It is held until a good one has ended, and is no outage."""
    workers = make(candidates=3, slots=1, max_failures=1)
    for _ in range(2):
        workers.fill()
        fails(workers, workers.live[0], "RuntimeError: shapes cannot be multiplied")
    assert workers.sweep.state["c0000"].held and workers.store.trial("c0000", 0) is None
    summaries = workers.run()
    assert [s.status for s in summaries] == ["failed", "complete", "complete"]
    assert "shapes" in str(summaries[0].trials[0].error)


def test_two_bad_candidates_of_one_kind_do_not_hold_up_the_others(make: MakeWorkers) -> None:
    """They make an outage, once; a good one ends it, and then they fail for good."""
    workers = make(candidates=5, slots=1, max_failures=0)
    bad = {"c0001", "c0002"}
    for step in range(200):
        workers.now = 400.0 * step  # type: ignore[attr-defined]
        if workers.fill():
            break
        trial = workers.live[0]
        if trial.key[0] in bad:
            fails(workers, trial, "ValueError: kernel size 7 is too large for 4 pixels")
        else:
            workers.epoch(trial)
            workers.end(trial, "finish")
    statuses = {s.candidate.candidate: s.status for s in workers.store.summaries()}
    assert {name for name, status in statuses.items() if status == "failed"} == bad
    assert list(statuses.values()).count("complete") == 3


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("[Errno 5] Input/output: '/d/a 1.png'", "[Errno 5] Input/output: '/d/b.png'", True),
        ("ImageError: /x/7f3a.png: cannot be read", "ImageError: /y/1.png: cannot be read", True),
        ("RuntimeError: CUDA error: device 3", "RuntimeError: CUDA error: device 11", True),
        ("RuntimeError: shapes", "ValueError: shapes", False),
    ],
)  # fmt: skip
def test_the_same_error(one: str, other: str, same: bool) -> None:
    assert (_kind(one) == _kind(other)) == same


class _Ears:
    """A listener that keeps what is noticed."""

    def __init__(self, said: list[str]) -> None:
        self._said = said

    def __getattr__(self, event: str) -> Callable[..., None]:
        return lambda *what: self._said.append(what[0]) if event == "noticed" else None
