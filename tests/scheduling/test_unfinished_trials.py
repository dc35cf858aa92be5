"""Records of stopped and failed fold trials: what a finished trial would have recorded."""

from __future__ import annotations

from pathlib import Path

import pytest

from foldrace.run_folder.records import CandidateRecord, RaceDecision, TrialRecord
from foldrace.run_folder.trial_record import trial_record
from foldrace.scheduling.unfinished_trials import stopped_trial, with_stopped_trial
from foldrace.trainables.spec import TrialSpec, read_trial
from tests.scheduling.raced_runs import RacedRun

FOLD = 1


@pytest.fixture
def run(tmp_path: Path) -> RacedRun:
    run = RacedRun.make(tmp_path / "run", rows=60)
    config = run.store.config()
    search = config.search.model_copy(update={"seed": 7})
    run.store.save_config(config.model_copy(update={"search": search}))
    return run


def candidate(**params: float) -> CandidateRecord:
    return CandidateRecord(candidate="c0003", backbone="timm/x", params=params)


def seed_of_a_finished_one(run: RacedRun, record: CandidateRecord) -> int:
    run.store.save_candidate(record)
    spec = TrialSpec(run=run.store.root, image_root="", candidate=record.candidate, fold=FOLD)
    return read_trial(spec, run.store).seed


def stop(record: CandidateRecord) -> RaceDecision:
    return RaceDecision(
        number=0, candidate=record.candidate, fold=FOLD, epoch=2, rule="epoch", action="stop",
        folds_done=0, rows=10, complete=0, epochs_trained=0, reason="lags behind",
    )  # fmt: skip


@pytest.mark.parametrize("record", [candidate(), candidate(lr=0.01, epochs=3)])
def test_the_seed_is_that_of_a_finished_trial(run: RacedRun, record: CandidateRecord) -> None:
    stopped = stopped_trial(run.store, record, stop(record), seconds=1.5, ended_at=1000.0)
    failed = trial_record(run.store, record, FOLD, "failed", error="boom")
    assert stopped.seed == failed.seed == seed_of_a_finished_one(run, record) != 0
    assert (stopped.status, stopped.epochs_trained, stopped.seconds) == ("stopped", 2, 1.5)
    assert (stopped.started_at, stopped.ended_at) == (998.5, 1000.0)
    assert (failed.status, failed.error, failed.folds_hash) == (
        "failed", "boom", run.store.folds().hash,
    )  # fmt: skip


def test_a_stop_without_its_record_gets_it(run: RacedRun) -> None:
    """The seconds are those of the epochs in its log; a second look changes nothing."""
    record = candidate(lr=0.01)
    run.store.save_candidate(record)
    run.store.save_decision(stop(record))
    log = (
        "epoch,val_calibrated_logloss,ema_val_calibrated_logloss,seconds\n"
        "0,1.0,nan,1.5\n1,0.9,nan,2.0\n"
    )
    run.store.save_train_log(record.candidate, FOLD, log)
    whole = with_stopped_trial(run.store, run.summary(record.candidate))
    (trial,) = whole.trials
    assert isinstance(trial, TrialRecord) and (trial.status, trial.seconds) == ("stopped", 3.5)
    assert (trial.started_at, trial.ended_at) == (0.0, 0.0)  # nobody knows
    assert trial.seed == seed_of_a_finished_one(run, record)
    assert run.store.trial(record.candidate, FOLD) == trial
    assert with_stopped_trial(run.store, run.summary(record.candidate)).trials == (trial,)


@pytest.mark.parametrize(
    "change", [{"action": "park"}, {"action": "continue"}, {"epoch": None, "folds_done": 1}]
)
def test_nothing_is_made_up_of_another_decision(run: RacedRun, change: dict[str, object]) -> None:
    """Parked or back in training, it goes on; after whole folds there is no trial to stop."""
    run.store.save_candidate(candidate())
    run.store.save_decision(stop(candidate()).model_copy(update=change))
    summary = run.summary("c0003")
    assert with_stopped_trial(run.store, summary) == summary
    assert run.store.trial("c0003", FOLD) is None


def test_a_failed_attempt_of_a_stopped_trial_gives_way(run: RacedRun) -> None:
    """Its worker failed, the decision came before the next attempt, and then the kill."""
    run.store.save_candidate(candidate())
    run.store.save_trial(trial_record(run.store, candidate(), FOLD, "failed", error="boom"))
    run.store.save_decision(stop(candidate()))
    (trial,) = with_stopped_trial(run.store, run.summary("c0003")).trials
    assert (trial.status, trial.seconds) == ("stopped", 0.0)  # it has no log
    assert run.summary("c0003").status == "stopped"
