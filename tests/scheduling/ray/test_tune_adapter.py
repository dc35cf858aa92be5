"""Searcher and scheduler as Tune calls them, before a real sweep whose trials are made up."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers import TrialScheduler

from foldrace.config.schema import PointConfig, SweepConfig
from foldrace.scheduling.ray.fold_trial import CANDIDATE, FOLD, JUDGED, PLACE, RUNG
from foldrace.scheduling.ray.trial_names import NAME
from foldrace.scheduling.ray.tune_adapter import RungScheduler, SweepSearcher
from tests.pretend_tune import Trial
from tests.scheduling.pretend_workers import K, Live, PretendWorkers, sweep_config

STOP, CONTINUE = TrialScheduler.STOP, TrialScheduler.CONTINUE
LOST = 10  # times a trial may vanish through no fault of its own


class Tune:
    """Tune's part: it asks for trials, keeps a list of them that only grows, and tells of some
    that they have ended."""

    def __init__(self, root: Path, config: SweepConfig, slots: int, **more: Any) -> None:
        self.workers = PretendWorkers(root, config, slots, **more)
        self.store = self.workers.store
        self.trials: list[Any] = []
        self.begin()

    def begin(self) -> None:
        """Searcher and scheduler of a new session."""
        self.searcher = SweepSearcher(self.workers.sweep, self.store)
        self.scheduler = RungScheduler(self.workers.sweep)
        self.trials = []

    def ask(self) -> Trial | str | None:
        """A trial that runs now, or what the searcher says in its place."""
        name = f"t{len(self.trials)}"
        found = self.searcher.suggest(name)
        if not isinstance(found, dict):
            return found
        self.trials.append(Trial(name, found))
        return self.trials[-1]

    def start(self) -> Trial:
        trial = self.ask()
        assert isinstance(trial, Trial)
        return trial

    def start_all(self) -> list[Trial]:
        """As many as there are slots for."""
        started = []
        while isinstance(trial := self.ask(), Trial):
            started.append(trial)
        return started

    def worker(self, trial: Trial) -> Live:
        """The worker of a trial, which has trained nothing yet in this attempt."""
        running = self.workers.sweep.running[trial.trial_id]
        saved = self.store.resume_state(*key(trial))
        epochs = 0 if saved is None else int(saved)
        self.workers.live = [
            *(live for live in self.workers.live if live.trial_id in self.workers.sweep.running),
            live := Live(trial.trial_id, running.task, running.judged, epochs, epochs),
        ]
        return live

    def end(self, trial: Trial, how: str) -> None:
        """The worker writes what it leaves; then Tune tells of the end."""
        self.workers.write(self.worker(trial), how)
        self.searcher.on_trial_complete(trial.trial_id, error=how in ("raise", "die"))
        trial.status = "ERROR" if how in ("raise", "die") else "TERMINATED"

    def at_rung(self, trial: Trial, epoch: int = 1) -> str:
        """The answer to a report at a rung; all that it has is in the run folder."""
        live = self.worker(trial)
        live.epochs = epoch
        column = {"raw": np.exp(self.workers.true_log_prob(live, epoch)).astype(np.float32)}
        self.store.save_rung(*live.key, epoch, self.workers.log(live), column)
        self.workers.save(live)
        return self.report(trial, {"epoch": epoch - 1, RUNG: True})

    def report(self, trial: Trial, result: dict[str, Any]) -> str:
        return self.scheduler.on_trial_result(None, trial, result)  # type: ignore[arg-type]


def key(trial: Trial) -> tuple[str, int]:
    return trial.config[CANDIDATE], trial.config[FOLD]


def skill(number: int) -> float:
    """The first candidate is good, the others are worse, each more than the one before."""
    return 2.0 if number == 0 else -0.2 * number


@pytest.fixture
def tune(tmp_path: Path) -> Callable[..., Tune]:
    def make(rule: str = "none", candidates: int = 1, slots: int = 1, **more: Any) -> Tune:
        config = sweep_config(rule, candidates, **more)
        return Tune(tmp_path / "run", config, slots, skill=skill)

    return make


def statuses(tune: Tune) -> list[str]:
    return [summary.status for summary in tune.store.summaries(running=True)]


# -- what is given out


def test_a_suggestion_is_a_candidate_a_fold_and_whether_it_is_judged(
    tune: Callable[..., Tune],
) -> None:
    """The first candidate gets all its folds; of the others the first fold may be parked."""
    session = tune("gain", candidates=2)
    given = []
    for _ in range(K + 1):
        trial = session.start()
        given.append(trial.config)
        session.end(trial, "finish")
    names = [config.pop(NAME) for config in given]
    assert [config.pop(PLACE) for config in given] == [
        {"gpus": 0.0, "kind": "", "devices": 1.0}
    ] * len(given)
    assert [name.split()[0] for name in names] == [*(f"c0000/f{k}" for k in range(K)), "c0001/f0"]
    first = [{CANDIDATE: "c0000", FOLD: fold, JUDGED: False} for fold in range(K)]
    assert given == [*first, {CANDIDATE: "c0001", FOLD: 0, JUDGED: True}]


def test_full_slots_get_nothing_until_there_is_room(tune: Callable[..., Tune]) -> None:
    session = tune(candidates=3, slots=2)
    one, _ = session.start_all()
    assert session.ask() is None
    session.workers.slots = 3  # a node has joined
    assert len(session.start_all()) == 1
    session.end(one, "finish")
    assert len(session.start_all()) == 1 and session.ask() is None
    session.workers.slots = 1  # two have left: what runs goes on
    assert session.ask() is None and len(session.workers.sweep.running) == 3


def test_the_sweep_is_finished_when_nothing_runs_or_waits(tune: Callable[..., Tune]) -> None:
    session = tune(candidates=1, slots=K + 1)
    trials = session.start_all()
    for trial in trials:
        assert session.ask() is None
        session.end(trial, "finish")
    assert session.ask() == "FINISHED"
    assert statuses(session) == ["complete"]


def test_no_candidate_begins_that_could_not_be_complete(tune: Callable[..., Tune]) -> None:
    session = tune(candidates=9, slots=2, fold_trials=2 * K + 1)
    started = []
    while trials := session.start_all():
        started += trials
        for trial in trials:
            session.end(trial, "finish")
    assert len(started) == 2 * K and session.ask() == "FINISHED"
    assert statuses(session) == ["complete"] * 2


def test_a_list_that_is_used_up_ends_the_sweep(tmp_path: Path) -> None:
    config = sweep_config("none", 5)
    backbone = config.search.backbones[0]
    points = tuple(PointConfig(backbone=backbone, params={"dropout": d}) for d in (0.1, 0.2))
    search = config.search.model_copy(update={"points": points, "sampler": "list"})
    session = Tune(tmp_path / "run", config.model_copy(update={"search": search}), slots=4)
    while trials := session.start_all():
        for trial in trials:
            session.end(trial, "finish")
    assert session.ask() == "FINISHED" and statuses(session) == ["complete"] * 2


def test_hours_are_committed_to_what_runs(tmp_path: Path) -> None:
    """However many slots there are: trials that have just started have spent next to nothing."""
    config, seconds = sweep_config("none", 9), 4.0  # of a made-up fold trial
    hours = 2 * K * seconds * 1.01 / 3600
    resources = config.resources.model_copy(update={"gpu_hours": hours})
    session = Tune(tmp_path / "run", config.model_copy(update={"resources": resources}), slots=1)
    session.end(session.start(), "finish")  # now it is known how long one takes
    session.workers.slots = 20
    started = [key(trial) for trial in session.start_all()]
    everything = [(f"c{number:04d}", fold) for number in range(2) for fold in range(K)]
    assert started == everything[1:]


# -- what a running trial reports


def test_an_epoch_is_noted_and_a_trial_that_goes_on_says_so(
    tune: Callable[..., Tune], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "foldrace")
    session = tune(slots=2)
    for trial, first in zip(session.start_all(), (4, 0), strict=True):
        for epoch in (first, first + 1):
            result = {"epoch": epoch, "val_calibrated_logloss": 1 / (epoch + 1)}
            session.searcher.on_trial_result(trial.trial_id, result)
        session.searcher.on_trial_result(trial.trial_id, {"done": True})  # no epoch of it
        running = session.workers.sweep.running[trial.trial_id]
        assert (running.epoch, running.val_logloss) == (first + 2, 1 / (first + 2))
    session.searcher.on_trial_result("gone", {"epoch": 1, "val_calibrated_logloss": 1.0})
    assert caplog.messages == ["c0000 fold0 goes on from epoch 5"]


def finish_first(session: Tune) -> None:
    """All folds of the first candidate, which nobody judges."""
    for _ in range(K):
        trial = session.start()
        assert session.at_rung(trial) == CONTINUE
        session.end(trial, "finish")


def test_a_parked_trial_is_ended_and_goes_on_in_another_one(tune: Callable[..., Tune]) -> None:
    """Each is worse than the one before: of four the second is among the best half."""
    session = tune("gain", candidates=4)
    finish_first(session)
    for number in range(1, 4):
        trial = session.start()
        assert key(trial) == (f"c{number:04d}", 0)
        assert session.report(trial, {"epoch": 0}) == CONTINUE  # no rung
        assert session.at_rung(trial) == STOP
        assert session.report(trial, {"epoch": 0, RUNG: True}) == CONTINUE  # it is leaving
        session.searcher.on_trial_complete(trial.trial_id)
        assert session.report(trial, {"epoch": 0, RUNG: True}) == CONTINUE  # it has left
    assert statuses(session) == ["complete", "parked", "parked", "parked"]
    for number in range(1, 4):
        name = f"c{number:04d}"
        (decision,) = session.store.decisions()[name]
        assert (decision.action, decision.epoch, decision.fold) == ("park", 1, 0)
        assert session.store.trial(name, 0) is None
        assert session.store.resume_state(name, 0) == b"1"
    again = session.start()
    assert (key(again), again.config[JUDGED]) == (("c0001", 0), True)
    assert again.trial_id not in {trial.trial_id for trial in session.trials[:-1]}
    assert session.worker(again).epochs == 1  # it goes on, and does not begin anew


def test_who_stays_parked_is_stopped_for_good_at_the_end(tune: Callable[..., Tune]) -> None:
    """Its reason, log and columns stay, its state goes; a resumed sweep leaves it so."""
    session = tune("gain", candidates=3)
    finish_first(session)
    trial = session.start()
    assert session.at_rung(trial) == STOP
    session.searcher.on_trial_complete(trial.trial_id)
    session.end(session.start(), "diverge")
    assert session.ask() == "FINISHED"
    assert statuses(session) == ["complete", "stopped", "diverged"]
    stopped = session.store.trial("c0001", 0)
    assert stopped is not None and (stopped.status, stopped.epochs_trained) == ("stopped", 1)
    (decision,) = session.store.decisions()["c0001"]
    assert (decision.action, decision.epoch) == ("stop", 1)
    left = set(session.store.files.names(session.store.trial_folder("c0001", 0)))
    assert left == {"trial.json", "decision.json", "train_log.csv", "rung1.safetensors"}
    session.workers.begin()
    session.begin()
    assert session.ask() == "FINISHED" and statuses(session)[1] == "stopped"
    assert session.workers.settled.names == ["c0000", "c0001", "c0002"]


@pytest.mark.parametrize(("how", "ended"), [("finish", "finished"), ("diverge", "diverged")])
def test_a_trial_that_ended_before_it_could_leave_has_ended(
    tune: Callable[..., Tune], how: str, ended: str
) -> None:
    session = tune("gain", candidates=3)
    finish_first(session)
    trial = session.start()
    assert session.at_rung(trial) == STOP
    session.end(trial, how)
    record = session.store.trial("c0001", 0)
    assert record is not None and record.status == ended
    assert all(d.epoch is None for d in session.store.decisions().get("c0001", []))


def test_no_fold_starts_beside_one_that_is_to_leave(tune: Callable[..., Tune]) -> None:
    session = tune("gain", candidates=3)
    finish_first(session)
    trial = session.start()
    session.workers.slots = 3
    assert session.at_rung(trial) == STOP
    assert [key(other) for other in session.start_all()] == [("c0002", 0)]


# -- trials that end badly


def test_a_failed_attempt_is_tried_again_as_often_as_the_config_says(
    tune: Callable[..., Tune],
) -> None:
    session = tune(max_failures=1)
    session.end(session.start(), "raise")
    assert session.store.trial("c0000", 0) is None
    session.end(session.start(), "die")
    assert statuses(session) == ["failed"]
    record = session.store.trial("c0000", 0)
    assert record is not None and "killed" in str(record.error)
    assert session.ask() == "FINISHED"


@pytest.mark.parametrize("status", ["TERMINATED", "ERROR"])
def test_a_trial_that_tune_ended_without_a_word_runs_again(
    tune: Callable[..., Tune], status: str
) -> None:
    """As where its process could not be reset: it is not to blame, whatever `max_failures` is,
    until it happens too often."""
    session = tune(max_failures=0)
    for _ in range(LOST):
        trial = session.start()
        session.searcher.watch(session.trials)
        assert session.ask() is None  # Tune lists it, and it runs
        trial.status = status
        session.searcher.watch(session.trials)
        assert session.workers.sweep.running == {} and statuses(session) == ["running"]
        session.searcher.on_trial_complete(trial.trial_id)  # too late: it is booked
    assert {key(trial) for trial in session.trials} == {("c0000", 0)}
    session.start().status = status
    session.searcher.watch(session.trials)
    assert statuses(session) == ["failed"]


def test_a_lost_trial_makes_room_at_the_next_question(tune: Callable[..., Tune]) -> None:
    """Tune asks for trials before it shows its list again."""
    session = tune()
    lost = session.start()
    session.searcher.watch(session.trials)
    lost.status = "ERROR"
    assert key(session.start()) == key(lost)


def test_what_a_trial_wrote_counts_though_tune_ended_it_without_a_word(
    tune: Callable[..., Tune],
) -> None:
    session = tune()
    trial = session.start()
    session.workers.write(session.worker(trial), "finish")
    trial.status = "ERROR"
    session.searcher.watch(session.trials)
    record = session.store.trial("c0000", 0)
    assert record is not None and record.status == "finished"
    assert key(session.start()) == ("c0000", 1)


def test_after_the_sweep_is_stopped_nothing_is_booked(tune: Callable[..., Tune]) -> None:
    """Ctrl-C, or the end of the time: the states stay, and a new session goes on with them."""
    session = tune(slots=2)
    interrupted = session.start_all()
    for trial in interrupted:
        session.workers.save(session.worker(trial))
    session.workers.sweep.stopped = True
    session.searcher.on_trial_complete(interrupted[0].trial_id)
    interrupted[1].status = "TERMINATED"
    session.searcher.watch(session.trials)
    assert session.ask() == "FINISHED"
    assert session.store.trials() == {}
    session.workers.begin()
    session.begin()
    for before, after in zip(interrupted, session.start_all(), strict=True):
        assert key(after) == key(before)
        assert session.store.resume_state(*key(after)) is not None


# -- workers that cannot import

TRACEBACK = """\
Traceback (most recent call last):
  File "/somewhere/worker.py", line 3, in <module>
    import {module}
{error}: {message}
"""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("ModuleNotFoundError", "No module named 'timm'"),
        ("ImportError", "libGL.so.1: cannot open shared object file"),
    ],
)
def test_a_worker_that_cannot_import_ends_the_sweep(
    tune: Callable[..., Tune], tmp_path: Path, error: str, message: str
) -> None:
    """Every other would meet the same; nothing is booked, so that `resume` runs it."""
    session = tune(slots=2)
    first, second = session.start_all()
    text = TRACEBACK.format(module="timm", error=error, message=message)
    (tmp_path / "error.txt").write_text(text, encoding="utf-8")
    first.error_file = str(tmp_path / "error.txt")
    session.searcher.watch(session.trials)
    session.searcher.on_trial_complete(first.trial_id, error=True)
    assert session.searcher.import_error == message
    second.status = "TERMINATED"  # Tune ends it, since the sweep is over
    session.searcher.watch(session.trials)
    assert session.searcher.import_error == message
    assert session.ask() == "FINISHED" and session.store.trials() == {}


def test_an_import_error_that_a_trial_has_recorded_is_its_own(
    tune: Callable[..., Tune], tmp_path: Path
) -> None:
    """It got as far as our code: the candidate's plugin or backbone is to blame."""
    session = tune()
    trial = session.start()
    text = TRACEBACK.format(module="x", error="ImportError", message="x")
    (tmp_path / "error.txt").write_text(text, encoding="utf-8")
    trial.error_file = str(tmp_path / "error.txt")
    session.searcher.watch(session.trials)
    session.end(trial, "raise")
    assert session.searcher.import_error is None and statuses(session) == ["failed"]


@pytest.mark.parametrize("text", [None, TRACEBACK.format(module="x", error="OSError", message="x")])
def test_other_errors_are_failures_of_the_trial(
    tune: Callable[..., Tune], tmp_path: Path, text: str | None
) -> None:
    """Also where Tune's file of it is gone."""
    session = tune()
    trial = session.start()
    trial.error_file = str(tmp_path / "error.txt")
    if text is not None:
        (tmp_path / "error.txt").write_text(text, encoding="utf-8")
    session.searcher.watch(session.trials)
    session.end(trial, "die")
    assert session.searcher.import_error is None and statuses(session) == ["failed"]


def test_tunes_state_file_holds_nothing_of_ours(tune: Callable[..., Tune], tmp_path: Path) -> None:
    session = tune()
    for part in (session.searcher, session.scheduler):
        assert type(pickle.loads(pickle.dumps(part))) is object
    session.searcher.save_to_dir(str(tmp_path / "tune"))
    session.searcher.save(str(tmp_path / "tune"))
    assert not (tmp_path / "tune").exists() and session.searcher.get_state() == {}
