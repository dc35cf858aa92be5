"""How far a sweep is: what the scheduler knows and the terminal shows.

Plain frozen records, so that neither side imports the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from foldrace.run_folder.records import CandidateStatus, CandidateSummary, RaceDecision, TrialRecord

Event = TrialRecord | RaceDecision | CandidateSummary
"""A fold trial that ended, a decision, a candidate that is settled."""


@dataclass(frozen=True)
class RunningTrial:
    """A fold trial that is training now."""

    candidate: str
    backbone: str
    fold: int
    epoch: int
    """Epochs done; 0 before the first one has ended."""
    epochs: int
    val_logloss: float | None
    """Of the last epoch that ended."""


@dataclass(frozen=True)
class BudgetUse:
    """How much of one limit of the budget is used up."""

    used: float
    limit: float
    unit: str
    """`candidates`, `fold trials`, `GPU-hours`, or `s` for seconds."""


@dataclass(frozen=True)
class Progress:
    """The whole sweep at one moment."""

    trials_done: int
    trials_total: int
    """Expected, once candidates are settled; an upper bound before."""
    running: tuple[RunningTrial, ...]
    counts: Mapping[CandidateStatus, int]
    """Candidates that have started, by status."""
    leaders: tuple[CandidateSummary, ...]
    """The best complete candidates, and those with a finished fold that are not settled."""
    events: Sequence[Event]
    """Of this session, in order: the next record's begin with them."""
    failed: int
    """Fold trials that failed or diverged."""
    elapsed_s: float
    eta_s: float | None
    best_logloss: float | None
    """Pooled OOF log loss of the best complete candidate."""
    blend_logloss: float | None = None
    """Of the race's blend of the complete candidates, on all rows."""
    decisions: tuple[RaceDecision, ...] = ()
    """The last ones."""
    budget: tuple[BudgetUse, ...] = ()
    """Of every limit that is set."""
    notes: tuple[str, ...] = ()
    """What fold trials of this session warned of, each text once, in the order they came."""
