"""The race: whether a candidate gets its next folds, by what it adds to the blend.

Takes candidates with their finished folds, reads their OOF rows from the store, gives
`RaceDecision`s. The rules are rows of a table.

The rules of the race: when a candidate gets no further folds.

Takes the evidence about one candidate, says whether to stop it and why. `RULES` is the table.
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
from foldrace.scheduling.race_columns import CalibratedColumns, Held


@dataclass(frozen=True)
class Evidence:
    """What is known of a candidate after some of its folds."""

    gain: Gain | None
    """Over the blend of the complete candidates; None while that has no members, or where the
    candidate's rows cannot be read."""
    z: float
    mean_loss: float | None
    """Of its finished folds, each counting the same; the better variant. None where its folds have
    no variant in common."""
    worst_loss: float | None
    """The highest fold loss of the best complete candidate; None while there is none."""

    @property
    def gain_text(self) -> str:
        return f"gain {self.gain.mean:+.4f} ± {self.gain.se:.4f}" if self.gain else "gain unknown"


@dataclass(frozen=True)
class Rule:
    """One row of the table."""

    name: str
    stops: Callable[[Evidence], bool]
    explain: Callable[[Evidence], str]
    compares_losses: bool = False
    """Whether it goes by `mean_loss` and `worst_loss`."""
    stops_nobody: bool = False


def _adds_nothing(evidence: Evidence) -> bool:
    """Not even `z` standard errors above its mean gain."""
    gain = evidence.gain
    return gain is not None and gain.mean + evidence.z * gain.se <= 0.0


def _worse_than_the_worst_fold(evidence: Evidence) -> bool:
    """Bergman, Purucker and Hutter, Don't Waste Your Time: Early Stopping Cross-Validation, 2024
    (arXiv 2405.03389), the forgiving rule."""
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
    Rule("none", lambda _: False, lambda _: "every candidate gets all folds", stops_nobody=True),
)
RULES = {rule.name: rule for rule in _ROWS}


_MOST_MEMBERS = 1000
"""Columns that the race's blend keeps: at 33,000 rows 132 MB."""
_log = logging.getLogger("foldrace")


class Race:
    """The state of the race: the blend of the complete candidates, and everybody's gain over it."""

    def __init__(self, store: RunStore, config: RaceConfig) -> None:
        self._config, self._rule = config, RULES[config.rule]
        self._columns = CalibratedColumns(store)
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
        """What an earlier session left: complete candidates join the blend, decisions are known.
        Who has a finished fold without a decision (`is_decided`) is still to be judged."""
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
        """Of any fold trial, however it ended: decisions say how much was trained by then."""
        self._epochs += record.epochs_trained

    def judge(self, summary: CandidateSummary, in_flight: int = 0) -> RaceDecision:
        """After a finished fold: `continue`, `stop`, or `complete` after the last one, which joins
        the blend: its gain is that over the blend without it, the blend's loss is with it.

        `in_flight`: other folds of the candidate that are running. They are paid for, so that it is
        not stopped before the last of them has ended.
        """
        name = summary.candidate.candidate
        held = self._read(summary)
        better = None if held is None or not self._members else self._better(held)
        complete = len(summary.finished) == summary.folds
        evidence = self._evidence(summary, better[1] if better else None)
        action, reason = self._complete_text(evidence) if complete else ("continue", "")
        if not complete:
            action, reason = self._verdict(evidence, in_flight)
        self._judged_at.pop(name, None)
        if action == "continue":
            self._judged_at[name] = None if in_flight else self._state
        if complete:
            self._count_complete(summary)
            self._join({} if held is None else _members(name, held))
        return self._decision(summary, better, evidence, action, reason)

    def numbered(self, decision: RaceDecision) -> RaceDecision:
        """A decision made elsewhere, in mid-training, as the next one of the sweep."""
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
        """Whether a candidate with finished folds is to be judged again before its next fold: the
        blend has changed since, or it was spared because of folds in flight."""
        judged = candidate in self._judged_at
        return self.open and judged and self._judged_at[candidate] != self._state

    def gain_of(
        self, fold: int, columns: Mapping[str, NDArray[np.floating]]
    ) -> tuple[str, Gain] | None:
        """The better variant of a trial in mid-training: calibrated true-class columns (n,) on the
        fold's rows, ascending. None before `min_complete` candidates are complete."""
        if not self.open or not self._members or not columns:
            return None
        mixed = self._blend.mixed[self._columns.rows((fold,))]
        return _better(columns, mixed)

    def gains(self) -> dict[str, float]:
        """Candidate -> its gain over the blend as it is now, of those with a finished fold. Who was
        stopped in mid-training keeps the gain that it had, as do, beyond some thousand candidates,
        the older ones."""
        if self._members and self._gains_version != self._blend.version:
            self._gains_version = self._blend.version
            self._gains |= self._gains_now()
        return dict(self._gains)

    @property
    def open(self) -> bool:
        """Whether candidates may be stopped: `min_complete` of them are complete."""
        return not self._rule.stops_nobody and self._complete >= self._config.min_complete

    @property
    def _state(self) -> tuple[int, int]:
        """What a decision depends on beyond the candidate itself."""
        return self._blend.version, self._complete if self._rule.compares_losses else 0

    @property
    def _blend_loss(self) -> float | None:
        return self._blend.loss if self._members else None

    def _read(self, summary: CandidateSummary) -> Held | None:
        """None where the rows cannot be read: then nothing is known against the candidate."""
        try:
            held = self._columns.of(summary)
        except RunFolderError as error:
            for problem in error.problems:
                _log.warning("%s: %s", problem.where, problem.message)
            return None
        return held if held.columns else None

    def _gains_now(self) -> dict[str, float]:
        """Of all that are held, the better variant's: those of the same folds together."""
        alike: defaultdict[tuple[int, ...], list[tuple[str, NDArray[np.float32]]]]
        alike = defaultdict(list)
        for name, held in self._columns.held.items():
            alike[held.folds] += ((name, column) for column in held.columns.values())
        found: dict[str, float] = {}
        for folds, members in alike.items():
            mixed = self._blend.mixed[self._columns.rows(folds)]
            means = mean_gains([column for _, column in members], mixed)
            for (name, _), mean in zip(members, means.tolist(), strict=True):
                found[name] = max(mean, found.get(name, mean))
        return found

    def _better(self, held: Held) -> tuple[str, Gain]:
        return _better(held.columns, self._blend.mixed[held.rows])

    def _evidence(self, summary: CandidateSummary, gain: Gain | None) -> Evidence:
        losses = _fold_losses(summary)
        mean = sum(losses) / len(losses) if losses else None
        return Evidence(gain, self._config.z, mean, self._best[1] if self._best else None)

    def _verdict(self, evidence: Evidence, in_flight: int) -> tuple[str, str]:
        """Action and reason before the last fold."""
        needed = self._config.min_complete
        if not self.open and not self._rule.stops_nobody:
            text = f"{self._complete} of {needed} candidates complete: nobody is stopped yet"
            return "continue", text
        reason = self._rule.explain(evidence)
        if not self._rule.stops(evidence):
            return "continue", reason
        if in_flight:
            return "continue", f"{reason}; not stopped while a further fold is in flight"
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
        """Of as many candidates as the blend has room for, the best first."""
        columns: dict[str, NDArray[np.float32]] = {}
        known = [(s.pooled_logloss(s.best), s) for s in complete if s.best]
        for _, summary in sorted(known, key=lambda pair: pair[0]):
            held = self._read(summary)
            if held is not None:
                columns |= _members(summary.candidate.candidate, held)
            if len(columns) >= _MOST_MEMBERS:
                break
        return columns


def is_decided(summary: CandidateSummary) -> bool:
    """Whether the race has judged all of its finished folds; not so after a kill between a trial's
    record and the decision, or where that is torn."""
    judged = max((d.folds_done for d in summary.decisions), default=0)
    return judged >= len(summary.finished)


def _better(
    columns: Mapping[str, NDArray[np.floating]], mixed: NDArray[np.float64]
) -> tuple[str, Gain]:
    """The variant with the higher gain, the first one on a tie."""
    gains = {variant: bounded_gain(column, mixed) for variant, column in columns.items()}
    variant = max(gains, key=lambda name: gains[name].mean)
    return variant, gains[variant]


def _members(candidate: str, held: Held) -> dict[str, NDArray[np.float32]]:
    return {f"{candidate} {variant}": column for variant, column in held.columns.items()}


def _fold_losses(summary: CandidateSummary) -> list[float]:
    """Of the better variant; none where the folds have no variant in common."""
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
