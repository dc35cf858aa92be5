"""When the result so far is written: after the first complete candidate, whenever the race's blend
has improved, and never for more than its part of the time."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foldrace.core.files import to_bytes
from foldrace.run_folder.blend_records import ResultUpdate
from foldrace.run_folder.records import CandidateRecord, CandidateSummary, RaceAction, RaceDecision
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.budget import UpdateCost
from foldrace.scheduling.room import Room
from foldrace.scheduling.search.study import open_study
from foldrace.scheduling.state import FoldTask
from foldrace.scheduling.sweep import FINISHED, Sweep
from foldrace.scheduling.updates import UPDATE, ResultUpdates
from foldrace.search_spaces.space import build_space
from tests.conftest import examples
from tests.scheduling.pretend_workers import PretendWorkers, sweep_config

PART = 0.02


def with_one_complete(root: Path, candidates: int) -> tuple[PretendWorkers, ResultUpdates]:
    """A sweep in one slot whose first candidate is complete, and its updates."""
    workers = PretendWorkers(root, sweep_config("none", candidates=candidates), slots=1)
    while not any(s.status == "complete" for s in workers.sweep.state.summaries()):
        workers.fill()
        workers.end(workers.live[0], "finish")
    updates = ResultUpdates(workers.store, lambda: workers.slots)
    workers.sweep.updates = updates
    for summary in workers.sweep.state.summaries():
        for decision in summary.decisions:
            updates.decided(decision, summary)
    return workers, updates


@dataclass
class Clock:
    """Seconds that a test sets."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Session:
    """The updates of a session, and how they went."""

    root: Path
    slots: int = 1
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.store = RunStore(self.root)
        self.store.save_config(sweep_config("none", candidates=1))
        self.updates = ResultUpdates(self.store, lambda: self.slots, self.clock)
        self.began = self.clock.now

    def blend(self, loss: float | None, action: RaceAction = "complete") -> None:
        """The race decides: with it the blend has that log loss."""
        candidate = CandidateRecord(candidate="c0000", backbone="timm/test_vit", params={})
        decision = RaceDecision(
            number=0, candidate="c0000", fold=0, rule="gain", action=action, folds_done=1, rows=9,
            complete=1, blend_logloss=loss, epochs_trained=1, reason="",
        )  # fmt: skip
        self.updates.decided(decision, CandidateSummary(candidate, "complete", (), 1))

    def update(self, seconds: float, error: str | None = "") -> None:
        """One runs for so long; `error` None: its worker says nothing."""
        self.updates.start("t0")
        assert self.updates.running == "t0" and not self.updates.is_due(None)
        self.clock.now += seconds
        if error is not None:
            self.updates.tell("t0", error)
        self.updates.end()
        assert self.updates.running is None


def test_the_first_comes_with_the_first_complete_candidate(tmp_path: Path) -> None:
    session = Session(tmp_path)
    assert not session.updates.is_due(None)
    session.blend(0.9, action="continue")
    session.blend(None)  # rows that cannot be read
    assert not session.updates.is_due(None)
    session.blend(0.9)
    assert session.updates.is_due(None) and session.updates.is_due(0.1)


def test_the_next_waits_for_a_better_blend_and_for_its_time(tmp_path: Path) -> None:
    """4 s in one of two slots cost 2 s; two such updates are 2 % of 200 s."""
    session = Session(tmp_path, slots=2)
    session.blend(0.9)
    session.update(4.0)
    session.clock.now = session.began + 1e6
    assert not session.updates.is_due(None)
    session.blend(0.9 - 1e-6)  # the race's blend is not known that well
    assert not session.updates.is_due(None)
    session.blend(0.8)
    assert session.updates.cost == UpdateCost(4.0, pending=1)
    session.clock.now = session.began + 199.0
    assert not session.updates.is_due(None)
    session.clock.now = session.began + 201.0
    assert session.updates.is_due(None)
    assert session.updates.is_due(5.0) and not session.updates.is_due(3.0)  # before the deadline


@settings(max_examples=examples(100), deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.floats(0.0, 500.0), st.floats(0.1, 30.0), st.booleans()), max_size=40
    ),
    slots=st.integers(1, 8),
)
def test_all_but_the_first_stay_within_their_part_of_the_time(
    steps: list[tuple[float, float, bool]], slots: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever updates take: where the next takes as long as the last, the sum is in its part."""
    session = Session(tmp_path_factory.mktemp("run"), slots)
    spent, last, longest, loss = 0.0, 0.0, 0.0, 1.0
    for waiting, seconds, is_better in steps:
        session.clock.now += waiting
        loss -= 0.01 * is_better
        session.blend(loss)
        if session.updates.is_due(None):
            elapsed = session.clock.now - session.began
            assert spent == 0.0 or spent + last / slots <= PART * elapsed * (1 + 1e-9)
            session.update(seconds)
            spent, last = spent + seconds / slots, seconds
            longest = max(longest, seconds)
            assert session.updates.cost == UpdateCost(pytest.approx(longest), 0)
    assert not steps or spent > 0.0


@pytest.mark.parametrize("error", ["No space left on device", None])
def test_a_failed_one_is_a_warning_and_waits_for_a_better_blend(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: str | None
) -> None:
    session = Session(tmp_path)
    session.blend(0.9)
    with caplog.at_level(logging.WARNING, "foldrace"):
        session.update(1.0, error)
    assert len(caplog.records) == 1 and session.store.last_update() is None
    assert (error or "its worker ended without a result") in caplog.text
    session.clock.now += 1e6
    assert not session.updates.is_due(None)
    session.blend(0.8)
    assert session.updates.is_due(None)


def test_a_full_disk_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: RunStore, update: ResultUpdate) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunStore, "save_update", full)
    session = Session(tmp_path)
    session.blend(0.9)
    session.update(1.0)
    assert "No space left" in caplog.text and session.updates.cost == UpdateCost(
        pytest.approx(1.0), 0
    )


def test_a_later_session_knows_what_was_written_and_what_it_took(tmp_path: Path) -> None:
    first = Session(tmp_path)
    first.blend(0.9)
    first.update(3.0)
    text = '{"created": "2026-01-02T03:04:05+00:00", "crossfit_logloss": 0.95, "rows": 7}'
    first.store.files.write("submission.receipt.json", to_bytes(text))
    second = Session(tmp_path)
    assert second.updates.cost == UpdateCost(3.0, 0)
    assert second.updates.submission is not None
    assert second.updates.submission.crossfit_logloss == 0.95
    second.blend(0.9)
    second.clock.now += 1e6
    assert not second.updates.is_due(None)
    second.blend(0.8)
    assert second.updates.is_due(None)
    second.clock.now = second.began + 149.0  # 3 s are 2 % of 150 s
    assert not second.updates.is_due(None)


def test_an_update_takes_a_slot_of_the_sweep(tmp_path: Path) -> None:
    workers, updates = with_one_complete(tmp_path, candidates=3)
    sweep = workers.sweep
    assert sweep.suggest("u") == UPDATE and sweep.updating == "u"
    assert sweep.suggest("a") is None  # the only slot is taken
    workers.slots = 2
    assert isinstance(sweep.suggest("b"), FoldTask)
    assert sweep.suggest("c") is None
    updates.tell("u", "")
    sweep.trial_over("u")
    assert sweep.updating is None and set(sweep.running) == {"b"}
    assert isinstance(sweep.suggest("d"), FoldTask)  # not due again


def test_at_the_end_of_a_sweep_nothing_is_written_twice(tmp_path: Path) -> None:
    workers, updates = with_one_complete(tmp_path, candidates=1)
    assert updates.is_due(None) and workers.sweep.suggest("u") == FINISHED


def test_an_update_that_a_stop_has_ended_is_no_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    workers, _ = with_one_complete(tmp_path, candidates=3)
    assert workers.sweep.suggest("u") == UPDATE
    workers.sweep.stopped = True
    workers.sweep.trial_over("u")
    assert "were not written" not in caplog.text and workers.store.last_update() is None


def test_time_that_fits_no_candidate_is_used_all_the_same(tmp_path: Path) -> None:
    """What the deadline ends goes on with `resume`; after it nothing starts."""
    workers, _ = with_one_complete(tmp_path, candidates=3)
    for (name, fold), trial in workers.store.trials().items():
        assert name == "c0000" and fold < 3
        workers.store.save_trial(trial.model_copy(update={"seconds": 100.0}))
    left = [50.0]
    space, _ = build_space(workers.config, "")
    study = open_study(workers.store, workers.config, space)
    sweep = Sweep(workers.store, workers.config, study, Room(lambda: 1), lambda: left[0])
    sweep.replay(workers.store.summaries(running=True))
    assert sweep.limit == "resources.time_budget: 50 s of it are left for fold trials"
    task = sweep.suggest("a")
    assert isinstance(task, FoldTask) and task.candidate.candidate == "c0001"
    sweep.running.clear()
    left[0] = 0.0
    assert sweep.suggest("b") == FINISHED
