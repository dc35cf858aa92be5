"""Whatever the order of events, every candidate ends in one state and no fold runs twice."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldrace.run_folder.records import (
    CandidateRecord,
    CandidateSummary,
    RaceDecision,
    TrialRecord,
    VariantScore,
)
from foldrace.scheduling.ledger import FoldTask, Ledger


def candidate(number: int) -> CandidateRecord:
    return CandidateRecord(candidate=f"c{number:04d}", backbone="timm/x", params={})


def ended(task: FoldTask, status: str = "finished", loss: float = 1.0) -> TrialRecord:
    score = VariantScore(rows=10, val_logloss=loss, calibrated_logloss=loss, val_acc=0.5, epoch=0)
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


def decided(
    task: FoldTask, number: int, action: str = "continue", gain: float | None = None
) -> RaceDecision:
    return RaceDecision(
        number=number, candidate=task.candidate.candidate, fold=task.fold, rule="gain",
        action=action, folds_done=1, rows=10, gain=gain, gain_se=None if gain is None else 0.1,
        z=1.0, complete=0, epochs_trained=0, reason="",  # type: ignore[arg-type]
    )  # fmt: skip


def complete(ledger: Ledger) -> int:
    return sum(summary.status == "complete" for summary in ledger.summaries())


def names(tasks: Iterable[FoldTask]) -> list[tuple[int, int]]:
    """(number of the candidate, fold)."""
    return [(int(task.candidate.candidate[1:]), task.fold) for task in tasks]


def test_without_a_race_the_first_candidates_get_all_their_folds_first() -> None:
    ledger = Ledger(folds=3, max_failures=0)
    for number in range(2):
        ledger.add(candidate(number))
    tasks = [take(ledger) for _ in range(6)]
    assert names(tasks) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert ledger.next_task(spare=True) is None


def finish(ledger: Ledger, task: FoldTask, number: int, gain: float | None, loss: float) -> None:
    ledger.end(ended(task, loss=loss))
    ledger.decide(decided(task, number, gain=gain))


def test_before_enough_are_complete_others_wait_with_their_second_fold() -> None:
    ledger = Ledger(folds=2, max_failures=0, min_complete=1)
    for number in range(3):
        ledger.add(candidate(number))
    tasks = [take(ledger) for _ in range(4)]
    assert names(tasks) == [(0, 0), (0, 1), (1, 0), (2, 0)]
    assert ledger.next_task() is None
    finish(ledger, tasks[2], 0, 0.1, loss=1.0)
    assert ledger.next_task() is None  # a new candidate would be next
    assert names([ledger.next_task(spare=True)]) == [(1, 1)]  # type: ignore[list-item]
    for task in tasks[:2]:
        finish(ledger, task, 1, 0.1, loss=1.0)
    assert complete(ledger) == 1 and names([take(ledger)]) == [(1, 1)]


def test_when_one_of_the_first_is_lost_the_next_takes_its_place() -> None:
    ledger = Ledger(folds=2, max_failures=0, min_complete=1)
    for number in range(3):
        ledger.add(candidate(number))
    first, second, other = take(ledger), take(ledger), take(ledger)
    assert names([first, second, other]) == [(0, 0), (0, 1), (1, 0)]
    ledger.end(ended(first, "diverged"))
    ledger.end(ended(second))
    assert names([take(ledger)]) == [(1, 1)]


def opened(folds: int, candidates: int) -> Ledger:
    """A race that is open; candidate 0 is the complete one."""
    ledger = Ledger(folds, max_failures=1, min_complete=1)
    ledger.add(candidate(0), [ended(FoldTask(candidate(0), fold)) for fold in range(folds)])
    for number in range(1, candidates + 1):
        ledger.add(candidate(number))
    return ledger


def test_the_most_promising_candidate_goes_on_with_one_fold_at_a_time() -> None:
    """The gain that its error allows, an unknown one before all; then first folds."""
    ledger = opened(folds=3, candidates=5)
    tasks = [take(ledger) for _ in range(4)]
    assert names(tasks) == [(1, 0), (2, 0), (3, 0), (4, 0)]
    for task, gain, loss in zip(tasks, [0.1, None, 0.3, 0.1], [1.0, 9.0, 1.0, 0.5], strict=True):
        finish(ledger, task, task.fold, gain, loss)
    order = [take(ledger) for _ in range(5)]
    assert names(order) == [(2, 1), (3, 1), (4, 1), (1, 1), (5, 0)]
    assert ledger.next_task() is None
    assert names(take_spare(ledger, 3)) == [(2, 2), (3, 2), (4, 2)]
    finish(ledger, order[3], 9, 0.5, loss=1.0)
    assert names([take(ledger)]) == [(1, 2)]


def take_spare(ledger: Ledger, tasks: int) -> list[FoldTask]:
    taken = []
    for _ in range(tasks):
        task = ledger.next_task(spare=True)
        assert task is not None
        ledger.start(task)
        taken.append(task)
    return taken


def test_a_new_gain_changes_the_order() -> None:
    ledger = opened(folds=2, candidates=2)
    tasks = [take(ledger), take(ledger)]
    for task, gain in zip(tasks, [0.3, 0.2], strict=True):
        finish(ledger, task, 0, gain, loss=1.0)
    assert names([ledger.next_task()]) == [(1, 1)]  # type: ignore[list-item]
    ledger.decide(decided(tasks[0], 2, gain=0.1))
    assert names([take(ledger), take(ledger)]) == [(2, 1), (1, 1)]


def test_stopped_candidates_never_come_back() -> None:
    ledger = opened(folds=3, candidates=2)
    task = take(ledger)
    assert ledger.end(ended(task)) is None
    stop = decided(task, 0, "stop", gain=-0.2)
    settled = ledger.decide(stop)
    assert settled is not None and settled.status == "stopped"
    assert ledger.gains() == {"timm/x": [-0.2]}
    restored = Ledger(3, max_failures=1, min_complete=1)
    restored.add(candidate(0), [ended(task)], [stop])
    assert restored.summary("c0000").status == "stopped"
    assert restored.next_task(spare=True) is None and restored.trials_open == 0
    without_race = Ledger(3, max_failures=1)
    without_race.add(candidate(0), [ended(task)], [stop])
    assert without_race.next_task(spare=True) is None
    stopped_trial = Ledger(3, max_failures=1)
    stopped_trial.add(candidate(0), [ended(task, "stopped")])
    assert stopped_trial.next_task(spare=True) is None
    assert stopped_trial.summary("c0000").status == "stopped"


def test_a_running_fold_of_a_stopped_candidate_is_not_tried_again() -> None:
    ledger = opened(folds=3, candidates=1)
    first, second = take(ledger), take_spare(ledger, 1)[0]
    ledger.end(ended(first, "stopped"))
    assert ledger.decide(decided(first, 0, "stop")) is None and ledger.is_stopped("c0001")
    assert not ledger.fail("c0001", second.fold)
    settled = ledger.drop("c0001", second.fold)
    assert settled is not None and settled.status == "stopped" and ledger.trials_open == 0


def test_a_deferred_candidate_lets_others_pass() -> None:
    ledger = opened(folds=2, candidates=2)
    ledger.defer("c0001")
    assert names([take(ledger)]) == [(2, 0)]
    assert ledger.next_task(spare=True) is not None
    ledger.defer("c0002")
    assert ledger.next_task(spare=True) is None and ledger.trials_open == 4
    ledger.recall_deferred()
    assert names([take(ledger)]) == [(1, 0)]


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


class Simulation:
    """A sweep in which everything happens in a random order, with restarts in between."""

    def __init__(self, rng: random.Random, folds: int, max_failures: int, needed: int | None):
        self.rng, self.folds, self.settings = rng, folds, (folds, max_failures, needed)
        self.needed = needed
        self.ledger = Ledger(*self.settings)
        self.running: list[FoldTask] = []
        self.finished: set[tuple[str, int]] = set()
        self.settled: list[str] = []
        self.decisions = 0

    def fill(self, slots: int, candidates: int) -> None:
        """As the searcher does."""
        while len(self.running) < slots:
            task = self.ledger.next_task()
            if task is None and len(self.ledger) < candidates:
                self.ledger.add(candidate(self.ledger.next_number))
                continue
            task = task or self.ledger.next_task(spare=True)
            if task is None:
                assert self.waiting == 0  # no slot is idle while a fold could run
                return
            self.check(task)
            self.ledger.start(task)
            self.running.append(task)

    @property
    def waiting(self) -> int:
        return self.ledger.trials_open - len(self.running)

    def check(self, task: FoldTask) -> None:
        name = task.candidate.candidate
        assert (name, task.fold) not in self.finished
        assert (name, task.fold) not in {(t.candidate.candidate, t.fold) for t in self.running}
        assert self.ledger.summary(name).status == "running"

    def end_one(self) -> None:
        task = self.running.pop(self.rng.randrange(len(self.running)))
        name, event = task.candidate.candidate, self.rng.random()
        if event < 0.15 and self.ledger.fail(name, task.fold):
            return
        if 0.15 <= event < 0.25 and self.ledger.lose(name, task.fold):
            return
        if event < 0.25 and self.ledger.is_stopped(name):
            return self.settle(self.ledger.drop(name, task.fold))
        status = "failed" if event < 0.25 else "diverged" if event < 0.3 else "finished"
        if 0.3 <= event < 0.35 and self.needed is not None:
            status = "stopped"
        self.finished.add((name, task.fold))
        summary = self.ledger.end(ended(task, status, loss=self.rng.random()))
        if status == "stopped" or (status == "finished" and not self.ledger.is_hopeless(name)):
            summary = self.decide(task, status)
        self.settle(summary)

    def decide(self, task: FoldTask, status: str) -> CandidateSummary | None:
        name, gain = task.candidate.candidate, self.rng.uniform(-0.2, 0.5)
        open_ = self.needed is not None and complete(self.ledger) >= self.needed
        spared = self.ledger.running_count(name) or not open_
        action = "stop" if status == "stopped" or (gain < 0 and not spared) else "continue"
        if len(self.ledger.summary(name).finished) == self.folds:
            action = "complete"
        self.decisions += 1
        return self.ledger.decide(decided(task, self.decisions, action, gain))

    def settle(self, summary: CandidateSummary | None) -> None:
        if summary is not None:
            self.settled.append(summary.candidate.candidate)

    def restart(self) -> None:
        """What is running is lost; the rest comes back from the records."""
        summaries = self.ledger.summaries()
        self.ledger, self.running = Ledger(*self.settings), []
        for old in summaries:
            self.ledger.add(old.candidate, old.trials, old.decisions)
            new = self.ledger.summary(old.candidate.candidate)
            if new.candidate.candidate in self.settled:
                assert new == old
            elif new.status != "running":  # a running fold was all that was missing
                self.settle(new)


@given(
    folds=st.integers(1, 5),
    slots=st.integers(1, 6),
    candidates=st.integers(1, 8),
    max_failures=st.integers(0, 2),
    needed=st.none() | st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_candidate_settles_once_in_one_state(
    folds: int, slots: int, candidates: int, max_failures: int, needed: int | None, seed: int
) -> None:
    rng = random.Random(seed)
    sweep = Simulation(rng, folds, max_failures, needed)
    for _ in range(10_000):
        sweep.fill(slots, candidates)
        if not sweep.running:
            break
        if rng.random() < 0.03:
            sweep.restart()
            continue
        sweep.end_one()
    ledger = sweep.ledger
    assert not sweep.running and ledger.trials_open == 0
    assert sorted(sweep.settled) == [f"c{n:04d}" for n in range(candidates)]
    summaries = ledger.summaries()
    assert [s.candidate.candidate for s in summaries] == sorted(sweep.settled)
    for summary in summaries:
        assert summary.status in ("complete", "stopped", "failed", "diverged")
        whole = [t.fold for t in summary.finished] == list(range(folds))
        assert (summary.status == "complete") == whole
    statuses = Counter(t.status for s in summaries for t in s.trials)
    assert ledger.trials_started == statuses.total()


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
