"""The sweep as Ray Tune sees it: a searcher that gives fold trials, a scheduler that ends them.

Both translate Tune's calls for `Sweep` and decide nothing themselves.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from foldrace.run_folder.store import RunStore
from foldrace.scheduling.ray.fold_trial import CANDIDATE, FOLD, JUDGED, PLACE, RUNG, WRITTEN
from foldrace.scheduling.ray.lost_workers import count_as_deaths
from foldrace.scheduling.ray.trial_names import NAME, trial_name
from foldrace.scheduling.room import Place
from foldrace.scheduling.sweep import FINISHED, Sweep
from foldrace.scheduling.updates import UPDATE
from foldrace.trainables.spec import Pace

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial

_ENDED = frozenset({"TERMINATED", "ERROR"})


class TuneTrial(Protocol):
    """The attributes of a Tune trial that the searcher reads."""

    trial_id: str
    status: str

    @property
    def error_file(self) -> str | None:
        """Path of the text of its errors, or None."""


class SweepSearcher(Searcher):
    """Suggests fold trials to Tune until the sweep has no more."""

    def __init__(self, sweep: Sweep, store: RunStore) -> None:
        super().__init__()  # no metric: Tune would end the sweep over a trial that reports none
        self._sweep, self._store = sweep, store
        self._tune_trials: dict[str, TuneTrial] = {}
        self._seen = 0
        self.import_error: str | None = None
        """Python's words for what a worker could not import, which ends the sweep; or None."""

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        """Nothing for Tune's state file: `resume` rebuilds everything from the run folder."""
        return object, ()

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """The next fold trial; None while the slots are full or nothing can start yet."""
        self._reconcile()
        task = self._sweep.suggest(trial_id)
        if task is None:
            return None
        if task == FINISHED:
            return Searcher.FINISHED
        if task == UPDATE:
            assert self._sweep.update_place is not None
            return {UPDATE: True} | _reserved(self._sweep.update_place)
        assert not isinstance(task, str)
        candidate, fold = task.candidate.candidate, task.fold
        running = self._sweep.running[trial_id]
        name = trial_name(candidate, fold, task.candidate.backbone)
        suggestion = {CANDIDATE: candidate, FOLD: fold, JUDGED: running.judged, NAME: name}
        return suggestion | _reserved(running.place)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Note the epoch that a trial reports, or how an update of the result went."""
        if WRITTEN in result and self._sweep.updates is not None:
            self._sweep.updates.tell(trial_id, str(result[WRITTEN]))
        if "epoch" in result:
            loss = float(result["val_calibrated_logloss"])
            self._sweep.epoch_ended(trial_id, int(result["epoch"]) + 1, loss, _pace(result))

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Book the outcome of a trial that has ended."""
        self._end(trial_id, silent=False)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: `resume` rebuilds everything from the run folder."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, likewise."""

    def get_state(self) -> dict[str, Any]:
        """Nothing, likewise."""
        return {}

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default", **_: Any) -> None:
        """Nothing, likewise."""

    def watch(self, trials: Sequence[TuneTrial]) -> None:
        """Book trials that ended without a call of `on_trial_complete`, by Tune's own list.

        A trial whose worker could not be reset ends so, and would be waited for for ever. Tune's
        list only grows.
        """
        for trial in trials[self._seen :]:
            self._tune_trials[trial.trial_id] = trial
        self._seen = len(trials)
        self._reconcile()

    def _reconcile(self) -> None:
        updating = self._sweep.updating
        for trial_id in (*self._sweep.running, *([] if updating is None else [updating])):
            trial = self._tune_trials.get(trial_id)
            if trial is not None and trial.status in _ENDED:
                self._end(trial_id, silent=True)

    def _end(self, trial_id: str, silent: bool) -> None:
        trial, running = self._tune_trials.pop(trial_id, None), self._sweep.running.get(trial_id)
        text = "" if running is None else _error_text(trial)
        if running is not None and not self._sweep.stopped:
            key = running.task.candidate.candidate, running.task.fold
            self.import_error = _import_error(text) if self._store.trial(*key) is None else None
            self._sweep.stopped = self.import_error is not None  # every other would meet the same
        self._sweep.trial_over(trial_id, silent, text)


class RungScheduler(FIFOScheduler):
    """Tune scheduler that ends a trial where the race parks it at a rung."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sweep = sweep

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        """Nothing for Tune's state file: `resume` rebuilds everything from the run folder."""
        return object, ()

    def on_trial_add(self, tune_controller: TuneController, trial: Trial | TuneTrial) -> None:
        """Before a trial's worker starts: whatever kills it is not to end the sweep."""
        count_as_deaths(tune_controller._actor_manager)

    def on_trial_result(
        self, tune_controller: TuneController, trial: Trial | TuneTrial, result: dict[str, Any]
    ) -> str:
        """STOP where the trial is to leave, else CONTINUE."""
        # A trial's end brings its last report once more, with `done`.
        if not result.get(RUNG) or result.get("done"):
            return TrialScheduler.CONTINUE
        leaves = self._sweep.rung_reached(trial.trial_id, int(result["epoch"]) + 1)
        return TrialScheduler.STOP if leaves else TrialScheduler.CONTINUE


def _reserved(place: Place) -> dict[str, Any]:
    return {PLACE: {"gpus": place.gpus, "kind": place.kind, "devices": place.devices}}


def _pace(result: dict[str, Any]) -> Pace | None:
    """The pace in a report; the first one of a trial that goes on has none."""
    values = [float(result[key.name]) for key in fields(Pace) if key.name in result]
    return Pace(*values) if values else None


def _error_text(trial: TuneTrial | None) -> str:
    """Tune's notes of a trial's failure; empty where there are none."""
    if trial is None or trial.error_file is None:
        return ""
    try:
        return Path(trial.error_file).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _import_error(text: str) -> str | None:
    """The last import error in it, or None."""
    found = re.findall(r"(?:ModuleNotFound|Import)Error: (.+)", text)
    return found[-1].strip() if found else None
