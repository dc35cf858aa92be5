"""Progress of a sweep, as the scheduler gives it and the terminal shows it.

Frozen records, so that neither side imports the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from foldrace.run_folder.blend_records import SubmissionNote
from foldrace.run_folder.records import (
    CandidateId,
    CandidateStatus,
    CandidateSummary,
    Count,
    Fold,
    RaceDecision,
    Seconds,
    StoredRecord,
    TrialRecord,
)

Event = TrialRecord | RaceDecision | CandidateSummary
"""A fold trial that ended, a decision, or a candidate that is settled."""


@dataclass(frozen=True)
class RunningTrial:
    """A fold trial that is training now."""

    candidate: CandidateId
    backbone: str
    fold: Fold
    epoch: Count
    """Number of epochs done; 0 before the first one has ended."""
    epochs: Count
    val_logloss: float | None
    """Validation log loss of the last epoch that ended."""
    images_per_second: float | None = None
    """Of its last epoch's training; None where it is not known."""
    waiting: float | None = None
    """Fraction of that time for which it waited for data."""
    silent_s: Seconds = 0.0
    """Seconds since it began or its last epoch ended."""


class RunningNow(StoredRecord):
    """What a sweep has running, as it writes it down for `status`."""

    at: Seconds
    """Unix seconds."""
    trials: tuple[RunningTrial, ...]
    waiting: str | None = None
    """Why nothing can start, for people."""


@dataclass(frozen=True)
class BudgetUse:
    """Use of one limit of the budget."""

    used: float
    limit: float
    unit: str
    """`candidates`, `fold trials`, `GPU-hours`, or `s` for seconds."""


@dataclass(frozen=True)
class Progress:
    """The whole sweep at one moment."""

    trials_done: int
    trials_total: int
    """Expected number, once candidates are settled; an upper bound before."""
    running: tuple[RunningTrial, ...]
    counts: Mapping[CandidateStatus, int]
    """Number of candidates that have started, by status."""
    leaders: tuple[CandidateSummary, ...]
    """The best complete candidates, and those with a finished fold that are not settled."""
    events: Sequence[Event]
    """Events of this session, in order; those of the next record begin with them."""
    failed: int
    """Number of fold trials that failed or diverged."""
    elapsed_s: float
    eta_s: float | None
    best_logloss: float | None
    """Pooled OOF log loss of the best complete candidate."""
    blend_logloss: float | None = None
    """Log loss of the race's blend of the complete candidates, on all rows."""
    decisions: tuple[RaceDecision, ...] = ()
    """The latest decisions."""
    budget: tuple[BudgetUse, ...] = ()
    """Use of every limit that is set."""
    submission: SubmissionNote | None = None
    """The submission that lies in the run folder."""
    trial_counts: Mapping[str, int] = field(default_factory=dict)
    """Number of fold trials by status; those that run now as `running`."""
    device_seconds: float = 0.0
    """Seconds of all fold trials × devices of each, in all sessions."""
    saved_device_seconds: float = 0.0
    """The same for the epochs that stopped and parked candidates have not trained."""
    notes: tuple[str, ...] = ()
    """Lines of this session that people want to see: warnings, attempts that failed, lost nodes."""
    waiting: str | None = None
    """Why nothing can start, for people."""
