"""Export of finished candidates for optuna-dashboard: `study.journal`, or a database by URL.

Listens to the sweep and writes one Optuna trial a candidate, through Optuna's own storage, in a
thread of its own: a slow database delays no suggestion. Everything in it is derived from the run
folder; nothing is read back into the sweep.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from foldrace.config.hyperparameters import KNOBS, TrialParams
from foldrace.config.ranges import Choice, Float, Int, Range, Value
from foldrace.config.schema import SweepConfig
from foldrace.core.redaction import without_secrets
from foldrace.run_folder.records import CandidateRecord, CandidateSummary, RaceDecision, TrialRecord
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.events import SweepListener
from foldrace.scheduling.search.export_storage import database, first_line, new_journal
from foldrace.scheduling.search.sampler_history import diverged_value, mid_training_score
from foldrace.search_spaces.space import SearchSpace, distribution

CANDIDATE = "candidate"
"""The attribute of an exported trial that says which candidate it is."""
BACKBONE = "backbone"
_CLOSE_SECONDS = 120.0  # that the end of a sweep waits for a database
_log = logging.getLogger("foldrace")


class StudyExporter(SweepListener):
    """Writes candidates when they are settled, and unfinished ones at the end.

    The study is deleted and written anew in each session, after each failure (which may have left
    half of a trial), and when a candidate lies outside the space so far: Optuna wants one list of
    choices a study.
    """

    def __init__(
        self,
        where: str,
        open_storage: Callable[[], BaseStorage],
        name: str,
        space: SearchSpace,
        classes: int,
        url: str | None = None,
    ) -> None:
        """`where`: the place, for messages; `url`: that of a database, whose password is hidden.

        `open_storage()` is called in the thread, again after each failure.
        """
        self._where, self._open_storage, self._name, self._url = where, open_storage, name, url
        self._space, self._classes = ExportSpace(space), classes
        self._told: list[CandidateSummary] = []  # that are to be written
        self._unsettled: dict[str, CandidateSummary] = {}
        self._study: optuna.Study | None = None
        self._written = 0  # of `_told`
        self._wake, self._closing, self._warned = threading.Event(), False, False
        self._thread = threading.Thread(target=self._work, name="study-export", daemon=True)

    def candidate_started(self, candidate: CandidateRecord) -> None:
        """Keep it, should it stay unfinished."""
        self._unsettled[candidate.candidate] = CandidateSummary(candidate, "running", (), 0)

    def trial_ended(self, record: TrialRecord, summary: CandidateSummary) -> None:
        """Keep what there is to show of the candidate."""
        self._unsettled[summary.candidate.candidate] = summary

    def decided(self, decision: RaceDecision, summary: CandidateSummary) -> None:
        """Keep likewise."""
        self._unsettled[summary.candidate.candidate] = summary

    def settled(self, summary: CandidateSummary) -> None:
        """Begin to write the candidate, and return."""
        self._unsettled.pop(summary.candidate.candidate, None)
        self._told.append(summary)
        self._start()

    def close(self) -> None:
        """Write what is missing and wait for it, at most two minutes."""
        left = self._unsettled.values()
        self._told += [replace(s, status="unfinished") for s in left if not s.settled]
        self._closing = True
        self._start()
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            _log.warning("%s: not all candidates are written yet", self._where)

    def _start(self) -> None:
        self._wake.set()
        if self._thread.ident is None:
            self._thread.start()

    def _work(self) -> None:
        closing = False
        while not closing:
            self._wake.wait()
            self._wake.clear()
            closing = self._closing
            try:
                self._write()
            except Exception as error:  # the sweep needs no export: none may end it
                self._study = None
                self._warn(error)

    def _write(self) -> None:
        told = self._told[self._written :]
        widened = [self._space.widen(summary.candidate) for summary in told]
        if self._study is None or any(widened):
            self._study, told = self._begin(), self._told[:]
            self._written = 0
        for summary in told:
            self._study.add_trial(exported_trial(summary, self._space, self._classes))
            self._written += 1

    def _begin(self) -> optuna.Study:
        storage = self._open_storage()
        if self._name in optuna.get_all_study_names(storage):
            optuna.delete_study(study_name=self._name, storage=storage)
        return optuna.create_study(storage=storage, study_name=self._name)

    def _warn(self, error: Exception) -> None:
        """Log the failure once, and at the end again."""
        if not self._warned or self._closing:
            _log.warning(
                "%s cannot be written, and the sweep goes on without it (`resume` writes it "
                "anew): %s",
                self._where,
                first_line(error, self._url),
            )
        self._warned = True


def open_exporter(store: RunStore, config: SweepConfig, space: SearchSpace) -> StudyExporter | None:
    """Exporter to the database of `search.storage`, else to the journal in the run folder.

    None where the run folder is in an object store, which cannot be appended to.
    """
    name, classes = study_name(config.name, store.root), len(store.classes())
    url, folder = config.search.storage, store.log_folder()
    if url is not None:
        where = f"search.storage {without_secrets(url)}"
        return StudyExporter(where, lambda: database(url), name, space, classes, url)
    if folder is None:
        return None
    path = folder.parent / "study.journal"
    return StudyExporter(str(path), lambda: new_journal(path), name, space, classes)


def study_name(run: str, root: str) -> str:
    """Name of the run and a hash of its folder: two runs never share one study."""
    return f"{run}-{hashlib.sha256(root.encode()).hexdigest()[:8]}"


class ExportSpace:
    """The search space, widened to hold candidates outside it.

    Those are points given by hand, and candidates from before a `resume --set search.space`.
    """

    def __init__(self, space: SearchSpace) -> None:
        self._space = space
        self._backbones = space.backbones
        self._ranges = {n: r for b in space.backbones for n, r in space.searched(b).items()}

    def widen(self, candidate: CandidateRecord) -> bool:
        """Make room for a configuration; True where it lay outside."""
        outside = candidate.backbone not in self._backbones
        if outside:
            self._backbones = (*self._backbones, candidate.backbone)
        for name, value in self.encode(candidate).items():
            if name != BACKBONE and not self._ranges[name].contains(value):
                self._ranges[name], outside = _widened(self._ranges[name], value), True
        return outside

    def encode(self, candidate: CandidateRecord) -> dict[str, Value]:
        """Optuna's names and values of a configuration, backbone first."""
        values = TrialParams.from_dict(candidate.params).as_dict()
        settings = self._space.settings.get(candidate.backbone, {}).items()
        searched = {s.name: values[knob] for knob, s in settings if s.range is not None}
        return {BACKBONE: candidate.backbone} | searched

    def distributions(self, names: dict[str, Value]) -> dict[str, BaseDistribution]:
        """Distributions of the names that `encode` gives."""
        found: dict[str, BaseDistribution] = {BACKBONE: CategoricalDistribution(self._backbones)}
        return found | {n: distribution(self._ranges[n]) for n in names if n != BACKBONE}


def exported_trial(summary: CandidateSummary, space: ExportSpace, classes: int) -> FrozenTrial:
    """A candidate as a finished Optuna trial, with the times at which its fold trials ran.

    PRUNED: stopped by the race, or unfinished with a score. A diverged one is COMPLETE with a loss
    worse than chance; FAIL: a failed one, or an unfinished one without a score.
    """
    encoded, steps = space.encode(summary.candidate), _steps(summary)
    state, value = TrialState.PRUNED, None
    if summary.status == "failed" or (summary.status == "unfinished" and not steps):
        state = TrialState.FAIL
    elif summary.status == "diverged":
        state, value = TrialState.COMPLETE, diverged_value(classes)
    elif summary.status == "complete":
        state, value = TrialState.COMPLETE, steps[len(summary.finished)]
    started, ended = _times(summary)
    return FrozenTrial(
        number=-1,  # the study gives it one
        trial_id=-1,
        state=state,
        value=value,
        datetime_start=started,
        datetime_complete=ended,
        params=encoded,
        distributions=space.distributions(encoded),
        user_attrs=_attributes(summary, encoded),
        system_attrs={},
        intermediate_values=steps,
    )


def _times(summary: CandidateSummary) -> tuple[datetime, datetime]:
    """Beginning of the first fold trial and end of the last; Optuna wants some, known or not."""
    ended = max((t.ended_at for t in summary.trials), default=0.0) or time.time()
    known = [t.started_at for t in summary.trials if t.started_at]
    started = min(known, default=ended - sum(t.seconds for t in summary.trials))
    return datetime.fromtimestamp(started), datetime.fromtimestamp(ended)


def _steps(summary: CandidateSummary) -> dict[int, float]:
    """Number of folds -> pooled log loss of the first folds, that many.

    0 -> the score of a first fold in mid-training.
    """
    best, score = summary.best, mid_training_score(summary)
    if best is None:
        return {} if score is None else {0: score}
    return {
        folds: replace(summary, trials=summary.finished[:folds]).pooled_calibrated(best)
        for folds in range(1, len(summary.finished) + 1)
    }


def _attributes(summary: CandidateSummary, encoded: dict[str, Value]) -> dict[str, Value]:
    """Attributes: status, gain, and hyperparameters neither searched nor at their default."""
    found: dict[str, Value] = {
        CANDIDATE: summary.candidate.candidate,
        "status": summary.status,
        "folds": len(summary.finished),
    }
    if summary.gain is not None:
        found["gain"] = summary.gain
    names = {name.split("[")[0] for name in encoded}  # without the backbone of one of its own
    given = summary.candidate.params.items()
    return found | {k: v for k, v in given if k not in names and v != KNOBS[k].default}


def _widened(chosen: Range, value: Value) -> Range:
    match chosen:
        case Choice(values):
            return Choice((*values, value))
        case Float(low, high, log):
            low, high = min(low, float(value)), max(high, float(value))
            return Float(low, high, log and low > 0)
        case Int(low, high, log):
            least, most = min(low, int(value)), max(high, int(value))
            return Int(least, most, log and least > 0)
