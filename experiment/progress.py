"""How far a sweep is: what the scheduler knows and the terminal shows.

Plain frozen records, so that neither side imports the other.
"""

from __future__ import annotations

from dataclasses import dataclass

from experiment.records import CandidateSummary


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
class Progress:
    """The whole sweep at one moment."""

    trials_done: int
    trials_total: int
    """An upper bound: the race may end candidates before their last fold."""
    running: tuple[RunningTrial, ...]
    finished: tuple[CandidateSummary, ...]
    """Every candidate with at least one fold trial that ended, whatever its status."""
    failed: int
    """Fold trials that failed or diverged."""
    elapsed_s: float
    eta_s: float | None
    best_logloss: float | None
    """Pooled OOF log loss of the best complete candidate."""
    notes: tuple[str, ...] = ()
    """What fold trials of this session warned of, each text once, in the order they came."""
