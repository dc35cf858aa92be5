"""The searcher with race, study and store in random orders of events: Tune is played, all else is
real."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foldrace.config.schema import (
    DataConfig,
    FoldsConfig,
    PointConfig,
    RaceConfig,
    ResourcesConfig,
    SearchConfig,
    SweepConfig,
)
from foldrace.run_folder.records import CandidateSummary, RaceDecision, TrialRecord
from foldrace.scheduling.budget import Budget, CompletionCost
from foldrace.scheduling.ledger import Ledger
from foldrace.scheduling.race import Race
from foldrace.scheduling.ray.fold_searcher import CANDIDATE, FOLD, FoldSearcher
from foldrace.scheduling.search.backbone_allocation import BackboneAllocation
from foldrace.scheduling.search.study import CandidateStudy
from foldrace.search_spaces.space import SearchSpace, build_space
from tests.conftest import examples
from tests.scheduling.raced_runs import RacedRun
from tests.scheduling.search.searches import running

K, NEEDED = 3, 2
BACKBONES = ("timm/test_vit", "timm/test_resnet")


def space_of(search: SearchConfig) -> SearchSpace:
    config = SweepConfig(
        name="x", data=DataConfig(train="t"), folds=FoldsConfig(k=K), search=search
    )
    space, problems = build_space(config, "")
    assert not problems
    return space


class Session:
    """One process of a sweep: it plays Tune with some slots."""

    def __init__(self, run: RacedRun, search: SearchConfig, race: RaceConfig, slots: int = 2):
        self.run, self.settled = run, list[CandidateSummary]()
        self.race = Race(run.store, race)
        self.study = CandidateStudy(space_of(search), search, 3)
        needed = None if race.rule == "none" else race.min_complete
        self.searcher = FoldSearcher(
            run.store, self.study, Ledger(K, 1, needed), self.race,
            Budget(search, ResourcesConfig()),
            BackboneAllocation(search.backbones, search.candidates, search.min_share, search.seed),
            lambda: slots, on_settled=self.settled.append,
        )  # fmt: skip
        self.searcher.replay(run.store.summaries(running=True))
        self.names = (f"t{n}" for n in range(10_000))

    def fill(self) -> list[tuple[str, str, int]]:
        """Trial id, candidate and fold of what starts."""
        started = []
        while isinstance(task := self.searcher.suggest(name := next(self.names)), dict):
            started.append((name, task[CANDIDATE], task[FOLD]))
        self.finished = task == FoldSearcher.FINISHED
        return started

    def end(self, name: str, candidate: str, fold: int, event: str) -> None:
        """As a worker and Tune do it."""
        number = int(candidate[1:])
        skill = 1.2 if number % 3 else -1.5
        if event == "finished":
            self.run.finish(candidate, fold, {"raw": self.run.model(number, skill)})
        elif event in ("failed", "diverged"):
            self.run.store.save_trial(self.record(candidate, fold, event))
        elif event == "stop":
            self.searcher.request_stop(name, epoch_decision(candidate, fold))
        self.searcher.on_trial_complete(name)

    def record(self, candidate: str, fold: int, status: str) -> TrialRecord:
        return TrialRecord(
            candidate=candidate, fold=fold, status=status, backbone="timm/x", params={},  # type: ignore[arg-type]
            folds_hash=self.run.store.folds().hash, seed=0, error="boom",
        )  # fmt: skip


def epoch_decision(candidate: str, fold: int) -> RaceDecision:
    return RaceDecision(
        number=0, candidate=candidate, fold=fold, epoch=2, rule="epoch", action="stop",
        folds_done=0, rows=10, complete=0, epochs_trained=0, reason="lags behind",
    )  # fmt: skip


@settings(
    max_examples=examples(8),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 2**32 - 1), slots=st.integers(1, 4))
def test_whatever_happens_every_candidate_ends_in_one_state(
    tmp_path_factory: pytest.TempPathFactory, seed: int, slots: int
) -> None:
    rng = random.Random(seed)
    run = RacedRun.make(tmp_path_factory.mktemp("run") / "run", rows=60, k=K)
    search = SearchConfig(backbones=BACKBONES, candidates=9, sampler="random", seed=seed % 1000)
    race = RaceConfig(min_complete=NEEDED)
    session = Session(run, search, race, slots)
    flying: list[tuple[str, str, int]] = []
    ended: dict[tuple[str, int], str] = {}
    told: list[str] = []
    for _ in range(500):
        flying += session.fill()
        assert len(flying) <= slots and len({f[1:] for f in flying}) == len(flying)
        assert not ended.keys() & {f[1:] for f in flying}  # no fold runs twice
        if not flying:
            break
        if rng.random() < 0.05:  # the driver dies; whoever it waits for is lost
            told += [s.candidate.candidate for s in session.settled]
            session, flying = Session(run, search, race, slots), []
            continue
        name, candidate, fold = flying.pop(rng.randrange(len(flying)))
        event = rng.choices(["finished", "killed", "failed", "diverged", "stop"], [80, 5, 5, 5, 5])[
            0
        ]
        session.end(name, candidate, fold, event)
        record = run.store.trial(candidate, fold)
        if record is not None:
            ended[candidate, fold] = record.status
    told += [s.candidate.candidate for s in session.settled]
    assert session.finished and not flying and running(session.study) == 0
    summaries = run.store.summaries()
    assert [s.candidate.candidate for s in summaries] == [f"c{n:04d}" for n in range(9)]
    assert sorted(set(told)) == sorted(told)  # nobody is settled twice
    assert set(told) <= {s.candidate.candidate for s in summaries}
    for summary in summaries:
        assert summary.status in ("complete", "stopped", "failed", "diverged")
        assert (summary.status == "complete") == (len(summary.finished) == K)
        assert summary == session.searcher.ledger.summary(summary.candidate.candidate)
    numbers = sorted(d.number for s in summaries for d in s.decisions)
    assert numbers == sorted(set(numbers))


@pytest.fixture
def run(tmp_path: Path) -> RacedRun:
    return RacedRun.make(tmp_path / "run", rows=60, k=K)


def search(**changes: Any) -> SearchConfig:
    return SearchConfig(backbones=BACKBONES[:1], sampler="random", **changes)


def test_a_trial_stopped_in_its_middle_stops_its_candidate(run: RacedRun) -> None:
    session = Session(run, search(candidates=1), RaceConfig(), slots=1)
    (flight,) = session.fill()
    for epoch in range(2):
        session.searcher.on_trial_result(flight[0], {"epoch": epoch, "val_logloss": 1.0})
    run.store.save_resume_state(*flight[1:], b"state")
    session.end(*flight, "stop")
    (summary,) = run.store.summaries()
    (trial,), (decision,) = summary.trials, summary.decisions
    assert (summary.status, trial.status, trial.epochs_trained) == ("stopped", "stopped", 2)
    assert (decision.epoch, decision.epochs_trained) == (2, 2)
    assert run.store.resume_state(*flight[1:]) is None
    assert session.fill() == [] and session.finished
    again = Session(run, search(candidates=1), RaceConfig(rule="none"))
    assert again.fill() == [] and again.finished and again.settled == []


class Killed(BaseException):
    pass


def test_a_kill_within_a_stop_leaves_its_reason(
    run: RacedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver dies between the decision and the trial's record, which a resume writes."""
    session = Session(run, search(candidates=1), RaceConfig(), slots=1)
    (flight,) = session.fill()
    log = (
        "epoch,val_calibrated_logloss,ema_val_calibrated_logloss,seconds\n"
        "0,1.0,nan,1.5\n1,0.9,nan,2.0\n"
    )
    run.store.save_train_log(*flight[1:], log)

    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run.store, "save_trial", die)
        session.end(*flight, "stop")
    (killed,) = run.store.summaries()
    assert (killed.status, killed.trials) == ("stopped", ())
    again = Session(run, search(candidates=1), RaceConfig(rule="none"))
    assert again.fill() == [] and again.finished
    (summary,) = run.store.summaries()
    assert summary == again.searcher.ledger.summaries()[0]
    (trial,), (decision,) = summary.trials, summary.decisions
    assert (trial.status, trial.epochs_trained, trial.seconds) == ("stopped", 2, 3.5)
    assert (summary.status, decision.number, decision.epochs_trained) == ("stopped", 0, 2)
    assert again.searcher.usage.device_seconds == 3.5
    assert again.race.numbered(epoch_decision("c0000", 0)).epochs_trained == 2


def test_a_trial_that_finished_before_it_could_be_stopped_has_finished(run: RacedRun) -> None:
    session = Session(run, search(candidates=1), RaceConfig(), slots=1)
    name, candidate, fold = session.fill()[0]
    session.searcher.request_stop(name, epoch_decision(candidate, fold))
    session.end(name, candidate, fold, "finished")
    summary = run.summary(candidate)
    assert (summary.status, summary.trials[0].status) == ("running", "finished")
    assert [d.action for d in summary.decisions] == ["continue"]
    assert [fold for *_, fold in session.fill()] == [1]


def test_no_fold_starts_beside_one_that_is_to_stop(run: RacedRun) -> None:
    session = Session(run, search(candidates=1), RaceConfig(min_complete=1), slots=2)
    task = session.searcher.suggest("first")
    assert isinstance(task, dict)
    flight = "first", task[CANDIDATE], task[FOLD]
    session.searcher.request_stop("first", epoch_decision(*flight[1:]))
    assert session.fill() == []
    session.end(*flight, "finished")
    assert [f for *_, f in session.fill()] == [1, 2]


def test_who_waits_is_judged_again_by_a_grown_blend(run: RacedRun) -> None:
    """c0001 has its first fold before anybody may be stopped, and waits for its second."""
    session = Session(run, search(candidates=3), RaceConfig(min_complete=1), slots=2)
    flying = {(c, f): name for name, c, f in session.fill()}

    def finish(candidate: str, fold: int, skill: float) -> None:
        run.finish(candidate, fold, {"raw": run.model(int(candidate[1:]), skill)})
        session.searcher.on_trial_complete(flying.pop((candidate, fold)))
        flying.update({(c, f): name for name, c, f in session.fill()})

    finish("c0000", 0, 1.5)
    finish("c0000", 1, 1.5)
    finish("c0001", 0, -1.5)
    assert [d.action for d in run.summary("c0001").decisions] == ["continue"]
    assert set(flying) == {("c0000", 2), ("c0002", 0)}
    finish("c0000", 2, 1.5)
    (decision,) = run.summary("c0001").decisions
    assert (decision.action, decision.folds_done, decision.complete) == ("stop", 1, 1)
    assert [s.status for s in session.settled] == ["complete", "stopped"]
    assert set(flying) == {("c0002", 0), ("c0002", 1)}


def test_the_budget_of_fold_trials_is_kept(run: RacedRun) -> None:
    """No candidate begins that could not be complete; nothing is left running."""
    limited = search(candidates=9, fold_trials=2 * K + 1)
    session = Session(run, limited, RaceConfig(rule="none"), slots=2)
    started = []
    while flights := session.fill():
        started += flights
        for flight in flights:
            session.end(*flight, "finished")
    assert len(started) == 2 * K and session.finished
    assert [s.status for s in run.store.summaries()] == ["complete"] * 2


def test_a_list_that_is_used_up_ends_the_sweep(run: RacedRun) -> None:
    points = tuple(PointConfig(backbone=BACKBONES[0], params={"dropout": d}) for d in (0.1, 0.2))
    config = search(candidates=5, points=points).model_copy(update={"sampler": "list"})
    session = Session(run, config, RaceConfig(rule="none"), slots=4)
    while flights := session.fill():
        for flight in flights:
            session.end(*flight, "finished")
    assert session.finished and len(run.store.summaries()) == 2


def test_hours_are_committed_to_what_runs(run: RacedRun) -> None:
    """However many slots there are: trials that have just started have spent next to nothing."""
    limited, seconds = search(candidates=9), 100.0
    searcher = FoldSearcher(
        run.store, CandidateStudy(space_of(limited), limited, 3), Ledger(K, 1),
        Race(run.store, RaceConfig(rule="none")),
        Budget(limited, ResourcesConfig(gpu_hours=2 * K * seconds / 3600)),
        BackboneAllocation(limited.backbones, 9, limited.min_share, limited.seed), lambda: 20,
        cost=lambda backbone, folds: CompletionCost(folds, seconds, 20),
    )  # fmt: skip
    started: list[tuple[str, int]] = []
    while isinstance(task := searcher.suggest(f"t{len(started)}"), dict):
        started.append((task[CANDIDATE], task[FOLD]))
    assert task is None
    assert started == [(f"c000{number}", fold) for number in range(2) for fold in range(K)]
    assert searcher.usage.device_seconds < seconds
