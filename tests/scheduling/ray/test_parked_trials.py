"""First folds that are parked at a rung and go on later: real training, race, searcher and
scheduler. Tune's part is played in this process."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from foldrace.config.schema import SweepConfig
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.ray import fold_trial, tuner
from foldrace.scheduling.ray.cluster import connect
from foldrace.scheduling.ray.device_group import _GroupMonitor
from foldrace.scheduling.ray.fold_trial import RUNG
from foldrace.scheduling.ray.tune_adapter import RungScheduler
from foldrace.search_spaces.space import build_space
from foldrace.trainables.resume_state import from_bytes
from foldrace.trainables.spec import RungMonitor, TrialSpec
from tests.pretend_tune import pretend_ray
from tests.scheduling.ray.parked_runs import (
    EPOCHS,
    FIRST,
    LAST,
    PARKED,
    RUNG_EPOCHS,
    UNSAVED,
    assert_same_first_fold,
    new_store,
    read_log,
    record_of,
    sweep_config,
    train_alone,
)

pytestmark = pytest.mark.slow


@dataclass
class AtRung:
    """The files of a trial at the moment in which it reports a rung."""

    candidate: str
    fold: int
    answer: str
    report: dict[str, Any]
    saved_epochs: int
    log: list[dict[str, str]]
    columns: dict[str, np.ndarray]


@dataclass
class Swept:
    """A finished sweep, and what happened in it."""

    store: RunStore
    rungs: list[AtRung] = field(default_factory=list)
    epochs: list[tuple[str, int, int]] = field(default_factory=list)
    """Candidate, fold and epoch of every report, in their order."""

    def folder(self, candidate: str, fold: int) -> Path:
        return Path(self.store.root) / self.store.trial_folder(candidate, fold)


@pytest.fixture(scope="module")
def raced(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    root = tmp_path_factory.mktemp("raced")
    config = SweepConfig.model_validate_json(json.dumps(sweep_config(tiny_images)))
    swept = Swept(new_store(root / "run", config))
    space, problems = build_space(config, "")
    assert not problems
    decide = RungScheduler.on_trial_result

    def seen(self: Any, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        key = trial.config["candidate"], trial.config["fold"]
        answer = None
        if not result.get("done"):
            swept.epochs.append((*key, result["epoch"]))
            if result.get(RUNG):
                before = files_at_rung(swept.folder(*key), result["epoch"] + 1)
                answer = decide(self, controller, trial, result)
                swept.rungs.append(AtRung(*key, answer, result, *before))
        return answer or decide(self, controller, trial, result)

    with pytest.MonkeyPatch.context() as patch, pretend_ray():
        patch.setenv("FOLDRACE_CACHE", str(root / "cache"))
        patch.setattr(RungScheduler, "on_trial_result", seen)
        with connect(None, config.resources) as cluster:
            outcome = tuner.run_sweep(
                swept.store, config, space, str(tiny_images), cluster, lambda _: None
            )
    assert outcome.limit is None and not outcome.interrupted
    return swept


def files_at_rung(
    folder: Path, epochs: int
) -> tuple[int, list[dict[str, str]], dict[str, np.ndarray]]:
    """Epochs of the saved state, lines of the log, columns."""
    state = from_bytes((folder / "resume.pt").read_bytes())
    log = list(csv.DictReader(io.StringIO((folder / "train_log.csv").read_text())))
    return (
        len(state["history"]["log"]),
        log,
        load((folder / f"rung{epochs}.safetensors").read_bytes()),
    )


def test_a_parked_trial_goes_on_from_exactly_its_rung(raced: Swept) -> None:
    """No epoch is trained twice; the last one that it had is reported once more."""
    own = [i for i, (name, fold, _) in enumerate(raced.epochs) if (name, fold) == (PARKED, 0)]
    epochs = [raced.epochs[i][2] for i in own]
    assert epochs == [*range(RUNG_EPOCHS), *range(RUNG_EPOCHS - 1, EPOCHS)]
    assert record_of(raced.store, PARKED).status == "finished"
    meanwhile = raced.epochs[own[RUNG_EPOCHS - 1] + 1 : own[RUNG_EPOCHS]]
    assert {name for name, *_ in meanwhile} == {UNSAVED, LAST}


def test_parked_and_gone_on_it_comes_to_the_bits_of_an_undisturbed_trial(
    raced: Swept, tmp_path: Path
) -> None:
    alone = train_alone(tmp_path / "run", raced.store.config(), raced.store.candidate(PARKED))
    assert_same_first_fold(raced.store, alone, PARKED)


def test_all_that_a_trial_has_is_on_disk_before_it_reports_a_rung(raced: Swept) -> None:
    rows = int((raced.store.folds().fold == 0).sum())
    assert [(rung.candidate, rung.fold) for rung in raced.rungs] == [(PARKED, 0), (LAST, 0)]
    losses = {"raw": "val_calibrated_logloss", "ema": "ema_val_calibrated_logloss"}
    for rung in raced.rungs:
        assert rung.report["epoch"] + 1 == rung.saved_epochs == RUNG_EPOCHS
        assert [int(line["epoch"]) for line in rung.log] == list(range(RUNG_EPOCHS))
        for variant, loss in losses.items():
            column = rung.columns[variant]
            assert column.shape == (rows,)
            mean = -np.log(column.astype(np.float64)).mean()
            assert mean == pytest.approx(float(rung.log[-1][loss]), abs=1e-3)


def test_who_is_parked_is_behind_at_its_rung_and_adds_nothing(raced: Swept) -> None:
    assert [rung.answer for rung in raced.rungs] == ["STOP", "STOP"]
    best = min(_losses(read_log(raced.folder(FIRST, 0))[:RUNG_EPOCHS]))
    assert all(min(_losses(rung.log)) > best for rung in raced.rungs)
    (last,) = raced.store.decisions()[LAST]
    assert (last.epoch, last.action) == (RUNG_EPOCHS, "stop")
    assert last.gain is not None and last.gain <= 0


def _losses(log: list[dict[str, str]]) -> list[float]:
    columns = ("val_calibrated_logloss", "ema_val_calibrated_logloss")
    return [float(line[column]) for line in log for column in columns]


def test_who_never_comes_back_is_stopped_for_good(raced: Swept) -> None:
    record, folder = record_of(raced.store, LAST), raced.folder(LAST, 0)
    assert (record.status, record.epochs_trained, record.variants) == ("stopped", RUNG_EPOCHS, {})
    seconds = [float(line["seconds"]) for line in read_log(folder)]
    assert record.seconds == pytest.approx(sum(seconds))
    left = {path.name for path in folder.iterdir()}
    rung = f"rung{RUNG_EPOCHS}.safetensors"
    assert left == {"trial.json", "decision.json", "train_log.csv", rung}
    assert not list(Path(raced.store.root).glob("trials/**/resume.pt"))


def test_a_trial_whose_state_cannot_be_saved_is_never_parked(raced: Swept) -> None:
    """It could not go on. Hopeless as it is, it has all its epochs."""
    record = record_of(raced.store, UNSAVED)
    assert (record.status, record.epochs_trained) == ("finished", EPOCHS)
    assert any("its state is not saved" in note for note in record.notes)
    assert not list(raced.folder(UNSAVED, 0).glob("rung*"))


def test_trials_on_several_devices_are_never_judged(raced: Swept, tmp_path: Path) -> None:
    """Their group goes on training while the decision about its last epoch is made."""
    config, record = raced.store.config(), raced.store.candidate(PARKED)
    store = new_store(tmp_path / "run", config)
    store.save_candidate(record)
    spec = TrialSpec(run=store.root, image_root="", candidate=PARKED, fold=0)
    assert fold_trial._rung_epochs(store, spec) == {RUNG_EPOCHS}
    several = config.resources.model_copy(update={"devices_per_trial": 2})
    no_rungs = config.race.model_copy(update={"epoch_stopping": False})
    for changed in ({"resources": several}, {"race": no_rungs}):
        store.save_config(config.model_copy(update=changed))
        assert fold_trial._rung_epochs(store, spec) == set()
    assert not isinstance(_GroupMonitor(), RungMonitor)
