"""Candidates are parked in mid-training, and one goes on: real Ray, from the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from foldrace.run_folder.store import RunStore
from foldrace.scheduling.ray.tune_adapter import RungScheduler
from foldrace.sweep import app
from tests.scheduling.ray.parked_runs import (
    EPOCHS,
    FIRST,
    LAST,
    PARKED,
    RUNG_EPOCHS,
    UNSAVED,
    assert_same_first_fold,
    read_log,
    record_of,
    sweep_config,
    train_alone,
)

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.usefixtures("real_ray")]


RESULT = "the result so far"  # in place of a candidate


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def processes() -> list[tuple[str, int, int]]:
    """Candidate, fold and process of each Tune trial, in the order of their ends."""
    return []


@pytest.fixture(scope="module")
def run(
    real_ray: Path,
    tiny_images: Path,
    tmp_path_factory: pytest.TempPathFactory,
    processes: list[tuple[str, int, int]],
) -> Path:
    """One trial after another."""
    root = tmp_path_factory.mktemp("epochs")
    (root / "epochs.json").write_text(json.dumps(sweep_config(tiny_images)), encoding="utf-8")
    complete = RungScheduler.on_trial_complete

    def seen(self: RungScheduler, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        key = trial.config.get("candidate", RESULT), trial.config.get("fold", 0)
        processes.append((*key, trial.last_result["pid"]))
        complete(self, controller, trial, result)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RungScheduler, "on_trial_complete", seen)
        result = cli("run", root / "epochs.json", "--out", root / "run")
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return root / "run"


def test_who_is_parked_goes_on_where_it_was(run: Path) -> None:
    """To the bits of its fold trained in this process, which nobody has disturbed."""
    store = RunStore.open(run)
    log = (run / "logs" / "application.log").read_text(encoding="utf-8")
    assert f"{PARKED} parked after epoch {RUNG_EPOCHS} of fold 0: " in log
    assert f"{PARKED} fold0 goes on from epoch {RUNG_EPOCHS}" in log
    assert log.count("goes on from epoch") == 1
    record = record_of(store, PARKED)
    assert (record.status, record.epochs_trained) == ("finished", EPOCHS)
    alone = train_alone(run.parent / "alone", store.config(), store.candidate(PARKED))
    assert_same_first_fold(store, alone, PARKED)


def test_the_hopeless_are_parked_at_their_rung_and_stopped_at_the_end(run: Path) -> None:
    store = RunStore.open(run)
    statuses = {s.candidate.candidate: s.status for s in store.summaries()}
    assert statuses[FIRST] == "complete" and statuses[LAST] == "stopped"
    trial = record_of(store, LAST)
    assert (trial.status, trial.epochs_trained, trial.variants) == ("stopped", RUNG_EPOCHS, {})
    (decision,) = store.decisions()[LAST]
    assert (decision.rule, decision.action, decision.epoch) == ("epoch", "stop", RUNG_EPOCHS)
    assert (decision.complete, decision.rows, decision.folds_done) == (1, 30, 0)
    assert decision.gain is not None and decision.gain <= 0
    assert decision.blend_logloss is not None
    log = (run / "logs" / "application.log").read_text(encoding="utf-8")
    assert f"{LAST} parked after epoch {RUNG_EPOCHS} of fold 0: gain " in log
    assert decision.line in log
    with (run / "decisions.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["rule"] == "epoch"]
    assert LAST in {row["candidate"] for row in rows}


def test_its_losses_and_columns_stay_and_nothing_else(run: Path) -> None:
    folder = run / "trials" / LAST
    assert [path.name for path in folder.glob("fold*")] == ["fold0"]
    left = {path.name for path in (folder / "fold0").iterdir()}
    rung = f"rung{RUNG_EPOCHS}.safetensors"
    assert left == {"trial.json", "decision.json", "train_log.csv", rung}
    assert len(read_log(folder / "fold0")) == RUNG_EPOCHS
    record = json.loads((run / "ensemble" / "ensemble.json").read_text())
    assert LAST not in {member["candidate"] for member in record["members"]}


def test_who_cannot_be_saved_has_all_its_epochs(run: Path) -> None:
    trial = record_of(RunStore.open(run), UNSAVED)
    assert (trial.status, trial.epochs_trained) == ("finished", EPOCHS)


def test_the_next_trial_takes_the_process_over(
    run: Path, processes: list[tuple[str, int, int]]
) -> None:
    """Tune fails it where the parked one does not leave in time; a result is written between."""
    trials = RunStore.open(run).trials()
    trained = [key[:2] for key in processes if key[0] != RESULT]
    assert set(trained) == set(trials)
    assert len(trained) == len(trials) + 1  # the parked one that went on ended twice
    assert RESULT in {name for name, *_ in processes}
    assert len({pid for *_, pid in processes}) == 1
    errors = run / "logs" / "error.log"
    assert not errors.exists() or "tried again" not in errors.read_text(encoding="utf-8")


def test_a_resumed_sweep_leaves_it_stopped(run: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.glob("trials/*/*/*")}
    result = cli("resume", run)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    assert {p: p.stat().st_mtime_ns for p in run.glob("trials/*/*/*")} == before
