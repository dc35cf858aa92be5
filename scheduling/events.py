"""Events of a sweep, and who listens to them.

Progress, study, export and tables are listeners. A resumed sweep sends them the stored events, in
the order in which they happened, by the same calls.
"""

from __future__ import annotations

from foldrace.run_folder.records import CandidateRecord, CandidateSummary, RaceDecision, TrialRecord


class SweepListener:
    """Base of the listeners: each method is called after the event, and does nothing here.

    `summary` is the candidate as it is after the event.
    """

    def candidate_started(self, candidate: CandidateRecord) -> None:
        """A candidate has been suggested and saved."""

    def trial_ended(self, record: TrialRecord, summary: CandidateSummary) -> None:
        """A fold trial has ended and is not tried again."""

    def decided(self, decision: RaceDecision, summary: CandidateSummary) -> None:
        """The race has decided about a candidate, after a fold or in mid-training."""

    def settled(self, summary: CandidateSummary) -> None:
        """A candidate gets no further fold: complete, stopped, diverged or failed."""

    def noticed(self, line: str) -> None:
        """Something has happened that people want to hear of: an attempt failed, a node is lost."""

    def result_written(self) -> None:
        """Blend and submission of what is complete lie in the run folder."""

    def paused(self, reason: str) -> None:
        """Nothing new starts for the time being: no node is left, or every trial fails."""
