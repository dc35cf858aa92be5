"""The race: it decides which candidates get their next folds, by what they add to the blend.

Takes candidates with their finished folds, reads their OOF rows from the store, gives
`RaceDecision`s. When a candidate is stopped says a rule, one row of the table `RULES`.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foldrace.config.schema import RaceConfig
from foldrace.core.errors import RunFolderError
from foldrace.ensemble.running_blend import Gain, RunningBlend, bounded_gain, mean_gains
from foldrace.run_folder.records import CandidateSummary, RaceDecision, TrialRecord
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.race_columns import CandidateColumns, ColumnCache


@dataclass(frozen=True)
class Evidence:
    """Evidence about a candidate after some of its folds, by which a rule decides."""

    gain: Gain | None
    """Gain over the blend of the complete candidates; None while that has no members, or where the
    candidate's rows cannot be read."""
    z: float
    """Standard errors that the gain may lie below zero."""
    mean_loss: float | None
    """Mean log loss of the better variant over its finished folds; None where they have no variant
    in common."""
    worst_loss: float | None
    """Highest fold loss of the best complete candidate; None while there is none."""

    @property
    def gain_text(self) -> str:
        """The gain with its standard error, for people."""
        return f"gain {self.gain.mean:+.4f} ± {self.gain.se:.4f}" if self.gain else "gain unknown"


@dataclass(frozen=True)
class Rule:
    """One row of the table of rules."""

    name: str
    stops: Callable[[Evidence], bool]
    explain: Callable[[Evidence], str]
    compares_losses: bool = False
    """True where it goes by `mean_loss` and `worst_loss`."""
    never_stops: bool = False


def _adds_nothing(evidence: Evidence) -> bool:
    """True where the gain is not above zero even with `z` standard errors added."""
    gain = evidence.gain
    return gain is not None and gain.mean + evidence.z * gain.se <= 0.0


def _worse_than_the_worst_fold(evidence: Evidence) -> bool:
    """The forgiving rule of Bergman, Purucker and Hutter.

    Don't Waste Your Time: Early Stopping Cross-Validation, 2024, arXiv 2405.03389.
    """
    mean, worst = evidence.mean_loss, evidence.worst_loss
    return mean is not None and worst is not None and mean > worst


def _losses_text(evidence: Evidence) -> str:
    if evidence.mean_loss is None or evidence.worst_loss is None:
        return "no log loss to compare"
    return (
        f"mean log loss {evidence.mean_loss:.4f}, worst fold of the best complete candidate "
        f"{evidence.worst_loss:.4f}"
    )


_ROWS = (
    Rule("gain", _adds_nothing, lambda evidence: evidence.gain_text),
    Rule("forgiving", _worse_than_the_worst_fold, _losses_text, compares_losses=True),
    Rule("none", lambda _: False, lambda _: "every candidate gets all folds", never_stops=True),
)
RULES = {rule.name: rule for rule in _ROWS}


_MOST_MEMBERS = 1000
"""Columns that the race's blend keeps (132 MB at 33,000 rows)."""
_log = logging.getLogger("foldrace")


class Race:
    """The blend of the complete candidates, and every candidate's gain over it."""

    def __init__(self, store: RunStore, config: RaceConfig) -> None:
        self._config, self._rule = config, RULES[config.rule]
        self._columns = ColumnCache(store)
        self._blend = RunningBlend(len(store.scored_rows()), len(store.classes()), _MOST_MEMBERS)
        self._complete = 0
        self._members = 0
        self._best: tuple[float, float] | None = None  # OOF loss and worst fold loss
        self._decided = 0
        self._epochs = 0
        self._gains: dict[str, float] = {}
        self._gains_version: int | None = self._blend.version
        self._judged_at: dict[str, tuple[int, int] | None] = {}

    def replay(self, summaries: Sequence[CandidateSummary]) -> None:
        """Take in what an earlier session left: complete candidates and decisions.

        A candidate with a finished fold without a decision (see `is_decided`) is judged later.
        """
        numbers = [d.number for s in summaries for d in s.decisions]
        self._decided = max(numbers, default=-1) + 1
        self._epochs = sum(t.epochs_trained for s in summaries for t in s.trials)
        self._gains = {s.candidate.candidate: s.gain for s in summaries if s.gain is not None}
        for summary in summaries:
            if summary.finished and summary.status == "running":
                self._judged_at[summary.candidate.candidate] = None
        complete = [s for s in summaries if s.status == "complete" and is_decided(s)]
        for summary in complete:
            self._count_complete(summary)
        self._join(self._best_columns(complete))
        self._gains_version = None

    def trial_ended(self, record: TrialRecord) -> None:
        """Count the epochs of a fold trial, however it ended, for the decisions' records."""
        self._epochs += record.epochs_trained

    def judge(self, summary: CandidateSummary, running: int = 0) -> RaceDecision:
        """The decision after a finished fold: `continue`, `stop`, or `complete` after the last one.

        A complete candidate joins the blend: its gain is over the blend without it, the blend's
        loss is with it. `running`: number of the candidate's other folds that run; they are paid
        for, so that it is not stopped before the last of them has ended.
        """
        name = summary.candidate.candidate
        own = self._read(summary)
        better = None if own is None or not self._members else self._better(own)
        complete = len(summary.finished) == summary.folds
        evidence = self._evidence(summary, better[1] if better else None)
        action, reason = self._complete_text(evidence) if complete else ("continue", "")
        if not complete:
            action, reason = self._verdict(evidence, running)
        self._judged_at.pop(name, None)
        if action == "continue":
            self._judged_at[name] = None if running else self._state
        if complete:
            self._count_complete(summary)
            self._join({} if own is None else _members(name, own))
        return self._decision(summary, better, evidence, action, reason)

    def numbered(self, decision: RaceDecision) -> RaceDecision:
        """The decision, made elsewhere or in mid-training, as the next one of the sweep."""
        if decision.gain is not None:
            self._gains[decision.candidate] = decision.gain
        self._decided += 1
        return decision.model_copy(
            update={
                "number": self._decided - 1,
                "complete": self._complete,
                "blend_logloss": self._blend_loss,
                "epochs_trained": self._epochs,
            }
        )

    def is_stale(self, candidate: str) -> bool:
        """True where a candidate is to be judged again before its next fold.

        The blend has changed since, or it was not stopped because other folds of it were running.
        """
        judged = candidate in self._judged_at
        return self.open and judged and self._judged_at[candidate] != self._state

    def gain_of(
        self, fold: int, columns: Mapping[str, NDArray[np.floating]]
    ) -> tuple[str, Gain] | None:
        """The better variant of a trial in mid-training, and its gain.

        `columns`: variant -> (n,) calibrated true-class probabilities on the fold's rows,
        ascending. None before `min_complete` candidates are complete.
        """
        if not self.open or not self._members or not columns:
            return None
        mixed = self._blend.mixed[self._columns.rows((fold,))]
        return _better(columns, mixed)

    def gains(self) -> dict[str, float]:
        """Candidate -> its gain over the blend as it is now.

        Those without a finished fold (stopped in mid-training) keep the gain that they had, as do,
        beyond some thousand candidates, the older ones.
        """
        if self._members and self._gains_version != self._blend.version:
            self._gains_version = self._blend.version
            self._gains |= self._gains_now()
        return dict(self._gains)

    @property
    def open(self) -> bool:
        """True once candidates may be stopped: `min_complete` of them are complete."""
        return not self._rule.never_stops and self._complete >= self._config.min_complete

    @property
    def _state(self) -> tuple[int, int]:
        """Version of all that a decision depends on beyond the candidate itself."""
        return self._blend.version, self._complete if self._rule.compares_losses else 0

    @property
    def _blend_loss(self) -> float | None:
        return self._blend.loss if self._members else None

    def _read(self, summary: CandidateSummary) -> CandidateColumns | None:
        """The candidate's columns; None, and a warning, where its rows cannot be read."""
        try:
            own = self._columns.read(summary)
        except RunFolderError as error:
            for problem in error.problems:
                _log.warning("%s: %s", problem.where, problem.message)
            return None
        return own if own.columns else None

    def _gains_now(self) -> dict[str, float]:
        """Gains of the better variants of all cached candidates, those of equal folds together."""
        of_folds: defaultdict[tuple[int, ...], list[tuple[str, NDArray[np.float32]]]]
        of_folds = defaultdict(list)
        for name, own in self._columns.cached.items():
            of_folds[own.folds] += ((name, column) for column in own.columns.values())
        found: dict[str, float] = {}
        for folds, members in of_folds.items():
            mixed = self._blend.mixed[self._columns.rows(folds)]
            means = mean_gains([column for _, column in members], mixed)
            for (name, _), mean in zip(members, means.tolist(), strict=True):
                found[name] = max(mean, found.get(name, mean))
        return found

    def _better(self, own: CandidateColumns) -> tuple[str, Gain]:
        return _better(own.columns, self._blend.mixed[own.rows])

    def _evidence(self, summary: CandidateSummary, gain: Gain | None) -> Evidence:
        losses = _fold_losses(summary)
        mean = sum(losses) / len(losses) if losses else None
        return Evidence(gain, self._config.z, mean, self._best[1] if self._best else None)

    def _verdict(self, evidence: Evidence, running: int) -> tuple[str, str]:
        """Action and reason before the last fold."""
        needed = self._config.min_complete
        if not self.open and not self._rule.never_stops:
            text = f"{self._complete} of {needed} candidates complete: nobody is stopped yet"
            return "continue", text
        reason = self._rule.explain(evidence)
        if not self._rule.stops(evidence):
            return "continue", reason
        if running:
            return "continue", f"{reason}; not stopped while another of its folds is running"
        return "stop", reason

    def _complete_text(self, evidence: Evidence) -> tuple[str, str]:
        return "complete", evidence.gain_text if self._members else "the first of the blend"

    def _decision(
        self,
        summary: CandidateSummary,
        better: tuple[str, Gain] | None,
        evidence: Evidence,
        action: str,
        reason: str,
    ) -> RaceDecision:
        gain, losses = evidence.gain, self._rule.compares_losses
        made = RaceDecision.model_validate(
            {
                "number": 0,
                "candidate": summary.candidate.candidate,
                "fold": _judged_fold(summary),
                "rule": self._rule.name,
                "action": action,
                "variant": better[0] if better else summary.best,
                "folds_done": len(summary.finished),
                "rows": _rows(summary),
                "gain": gain.mean if gain else None,
                "gain_se": gain.se if gain else None,
                "z": self._config.z if self._rule.name == "gain" else None,
                "score": evidence.mean_loss if losses else None,
                "limit": evidence.worst_loss if losses else None,
                "complete": 0,
                "epochs_trained": 0,
                "reason": reason,
            }
        )
        return self.numbered(made)

    def _count_complete(self, summary: CandidateSummary) -> None:
        self._complete += 1
        if summary.best is None:
            return
        loss = summary.pooled_logloss(summary.best)
        if self._best is None or loss < self._best[0]:
            self._best = loss, max(_fold_losses(summary))

    def _join(self, columns: Mapping[str, NDArray[np.floating]]) -> None:
        self._blend.add(columns)
        self._members += len(columns)

    def _best_columns(self, complete: Sequence[CandidateSummary]) -> dict[str, NDArray[np.float32]]:
        """Columns of as many complete candidates as the blend has room for, the best first."""
        columns: dict[str, NDArray[np.float32]] = {}
        known = [(s.pooled_logloss(s.best), s) for s in complete if s.best]
        for _, summary in sorted(known, key=lambda pair: pair[0]):
            own = self._read(summary)
            if own is not None:
                columns |= _members(summary.candidate.candidate, own)
            if len(columns) >= _MOST_MEMBERS:
                break
        return columns


def is_decided(summary: CandidateSummary) -> bool:
    """True where the race has judged all of the candidate's finished folds.

    Not so after a kill between a trial's record and the decision, or where that is torn.
    """
    judged = max((d.folds_done for d in summary.decisions), default=0)
    return judged >= len(summary.finished)


def _better(
    columns: Mapping[str, NDArray[np.floating]], mixed: NDArray[np.float64]
) -> tuple[str, Gain]:
    """The variant with the higher gain, the first one on a tie."""
    gains = {variant: bounded_gain(column, mixed) for variant, column in columns.items()}
    variant = max(gains, key=lambda name: gains[name].mean)
    return variant, gains[variant]


def _members(candidate: str, own: CandidateColumns) -> dict[str, NDArray[np.float32]]:
    return {f"{candidate} {variant}": column for variant, column in own.columns.items()}


def _fold_losses(summary: CandidateSummary) -> list[float]:
    """Fold losses of the better variant; empty where the folds have no variant in common."""
    best = summary.best
    return [trial.variants[best].val_logloss for trial in summary.finished] if best else []


def _rows(summary: CandidateSummary) -> int:
    best = summary.best
    return sum(t.variants[best].rows for t in summary.finished) if best else 0


def _judged_fold(summary: CandidateSummary) -> int:
    """The finished fold without a decision; when judged again, the latest one that has one."""
    known = {decision.fold for decision in summary.decisions}
    new = [trial.fold for trial in summary.finished if trial.fold not in known]
    return new[-1] if new else summary.decisions[-1].fold
