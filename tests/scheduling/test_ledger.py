"""Whatever the order of events, every candidate ends in one state and no fold runs twice."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiment.records import CandidateRecord, TrialRecord, VariantScore
from scheduling.ledger import FoldTask, Ledger


def candidate(number: int) -> CandidateRecord:
    return CandidateRecord(candidate=f"c{number:04d}", backbone="timm/x", params={})


def ended(task: FoldTask, status: str = "finished", loss: float = 1.0) -> TrialRecord:
    score = VariantScore(rows=10, val_logloss=loss, val_acc=0.5, best_epoch=0)
    return TrialRecord(
        candidate=task.candidate.candidate,
        fold=task.fold,
        status=status,  # type: ignore[arg-type]
        backbone="timm/x",
        params={},
        folds_hash="h",
        seed=0,
        variants={"raw": score} if status == "finished" else {},
    )


def take(ledger: Ledger) -> FoldTask:
    task = ledger.next_task()
    assert task is not None
    ledger.start(task)
    return task


def test_folds_of_the_most_promising_candidate_come_first() -> None:
    ledger = Ledger(folds=3, max_failures=0)
    for number in range(3):
        ledger.add(candidate(number))
    first = take(ledger)
    assert (first.candidate.candidate, first.fold) == ("c0000", 0)
    # c0001 has shown the lower loss, c0002 nothing yet.
    ledger.end(ended(first, loss=0.9))
    second = FoldTask(candidate(1), 0)
    ledger.start(second)
    ledger.end(ended(second, loss=0.5))
    order = [(t.candidate.candidate, t.fold) for t in (take(ledger) for _ in range(5))]
    assert order == [("c0001", 1), ("c0001", 2), ("c0000", 1), ("c0000", 2), ("c0002", 0)]


@pytest.mark.parametrize("status", ["failed", "diverged"])
def test_a_lost_fold_loses_the_candidate_and_spends_nothing_more(status: str) -> None:
    ledger = Ledger(folds=3, max_failures=0)
    ledger.add(candidate(0))
    running, lost = take(ledger), take(ledger)
    assert ledger.end(ended(lost, status)) is None  # a fold still runs
    assert ledger.next_task() is None
    summary = ledger.end(ended(running))
    assert summary is not None and summary.status == status


def test_attempts_are_counted() -> None:
    ledger = Ledger(folds=1, max_failures=2)
    ledger.add(candidate(0))
    again = []
    for _ in range(3):
        take(ledger)
        again.append(ledger.fail("c0000", 0))
    assert again == [True, True, False]


def test_a_vanished_attempt_does_not_count_as_a_failure() -> None:
    ledger = Ledger(folds=1, max_failures=0)
    ledger.add(candidate(0))
    for _ in range(5):
        take(ledger)
        assert ledger.lose("c0000", 0)
    assert ledger.end(ended(take(ledger))) is not None


def test_restored_trials_do_not_run_again() -> None:
    ledger = Ledger(folds=3, max_failures=0)
    ledger.add(candidate(0), [ended(FoldTask(candidate(0), 1))])
    assert [take(ledger).fold for _ in range(2)] == [0, 2]
    assert ledger.next_task() is None
    assert ledger.next_number == 1


@given(
    folds=st.integers(1, 5),
    slots=st.integers(1, 4),
    candidates=st.integers(1, 6),
    max_failures=st.integers(0, 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_candidate_settles_once_in_one_state(
    folds: int, slots: int, candidates: int, max_failures: int, seed: int
) -> None:
    rng = random.Random(seed)
    ledger = Ledger(folds, max_failures)
    running: list[FoldTask] = []
    finished: set[tuple[str, int]] = set()
    settled: list[str] = []
    for _ in range(10_000):
        while len(running) < slots:
            task = ledger.next_task()
            if task is None:
                if len(ledger) == candidates:
                    break
                ledger.add(candidate(ledger.next_number))
                continue
            key = (task.candidate.candidate, task.fold)
            assert key not in finished
            assert key not in {(t.candidate.candidate, t.fold) for t in running}
            ledger.start(task)
            running.append(task)
        if not running:
            break
        task = running.pop(rng.randrange(len(running)))
        name, event = task.candidate.candidate, rng.random()
        if event < 0.15 and ledger.fail(name, task.fold):
            continue
        if 0.15 <= event < 0.25 and ledger.lose(name, task.fold):
            continue
        status = "failed" if event < 0.25 else "diverged" if event < 0.3 else "finished"
        finished.add((name, task.fold))
        summary = ledger.end(ended(task, status, loss=rng.random()))
        if summary is not None:
            settled.append(summary.candidate.candidate)
    assert not running and ledger.next_task() is None and ledger.trials_open == 0
    assert sorted(settled) == [f"c{n:04d}" for n in range(candidates)]
    for summary in ledger.summaries():
        assert summary.status in ("complete", "failed", "diverged")
        whole = [t.fold for t in summary.finished] == list(range(folds))
        assert (summary.status == "complete") == whole


@pytest.mark.parametrize(
    ("max_failures", "expected"), [(0, []), (1, [True]), (3, [False, False, True])]
)
def test_the_last_of_several_attempts(max_failures: int, expected: list[bool]) -> None:
    ledger = Ledger(folds=1, max_failures=max_failures)
    ledger.add(candidate(0))
    found = []
    while ledger.fail("c0000", take(ledger).fold):
        found.append(ledger.last_of_several("c0000", 0))
    assert found == expected
