"""The members of the blend for the report, from this run, another one, or a file made elsewhere.

Takes the blend's record and the store, gives `BlendMember`s and their true-class probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foldrace.core.errors import RunFolderError
from foldrace.core.metrics import log_loss_of_true
from foldrace.reporting.charts.style import short
from foldrace.run_folder.allowed import member_run
from foldrace.run_folder.blend_records import EnsembleRecord, MemberRecord
from foldrace.run_folder.oof import read_array
from foldrace.run_folder.records import CandidateSummary
from foldrace.run_folder.store import RunStore

ELSEWHERE = "made elsewhere"
UNKNOWN_BACKBONE = "?"
_NO_GAIN = 1e-9  # nats


@dataclass(frozen=True)
class BlendMember:
    """One member of the blend: its record, and what the report adds to it."""

    record: MemberRecord
    backbone: str
    """Name of its backbone; `made elsewhere` for added predictions, `?` without its run folder."""
    own_logloss: float | None
    """OOF log loss of it alone and uncalibrated, when it was blended; None where unknown."""

    @property
    def id(self) -> str:
        """Short name: `c0007 ema`, with the run's name where it is another; an added one's name."""
        if self.record.added:
            return short(self.record.candidate, 24)
        where = f" ({short(_last_part(self.record.run), 16)})" if self.record.run else ""
        return f"{self.record.candidate} {self.record.variant}{where}"

    @property
    def label(self) -> str:
        """Backbone and id, for an axis."""
        return f"{short(self.backbone, 28)}  {self.id}"

    @property
    def gain(self) -> float | None:
        """Rise of the OOF log loss without it; 0 where that is the optimiser's noise."""
        known = self.record.gain
        return 0.0 if known is not None and abs(known) < _NO_GAIN else known

    @property
    def run_name(self) -> str:
        """Origin in a few letters."""
        known = self.record.run and not self.record.added
        return short(_last_part(self.record.run), 16) if known else self.origin

    @property
    def origin(self) -> str:
        """Source of its predictions: `added`, `this run`, or a run folder."""
        return "added" if self.record.added else self.record.run or "this run"


def blend_members(
    store: RunStore, summaries: Sequence[CandidateSummary], blend: EnsembleRecord
) -> tuple[BlendMember, ...]:
    """Members of a blend, heaviest first; `summaries` are of the store's own candidates."""
    others = sorted({m.run for m in blend.members if m.run and not m.added})
    runs = {"": _by_candidate(summaries)} | {run: _other_run(store, run) for run in others}
    ordered = sorted(blend.members, key=lambda m: (-m.weight, m.candidate, m.variant, m.run))
    return tuple(
        _added(store, m) if m.added else _trained(m, runs[m.run].get(m.candidate)) for m in ordered
    )


def true_prob(store: RunStore, member: MemberRecord) -> NDArray[np.float32]:
    """Uncalibrated probability of the true class on the scored rows, (N,).

    RunFolderError where it cannot be read, or is of other rows than this run's by now.
    """
    home = member_run(store, member.run)
    added = f"ensemble/added/{member.candidate}/true_prob.npy"
    column = (
        read_array(store.files, added)
        if member.added
        else home.true_prob(member.candidate, member.variant)
    )
    expected = store.scored_rows().shape
    if column.shape != expected:
        raise RunFolderError.single(
            f"{home.root}, {member.candidate} {member.variant}",
            f"has probabilities of shape {column.shape}, should have {expected}; blend again with "
            f"`ensemble {store.root}`",
        )
    return column


def _added(store: RunStore, member: MemberRecord) -> BlendMember:
    if member.oof_logloss is not None:
        return BlendMember(member, ELSEWHERE, member.oof_logloss)
    try:
        loss = log_loss_of_true(true_prob(store, member))
    except RunFolderError:
        loss = None
    return BlendMember(member, ELSEWHERE, loss)


def _trained(member: MemberRecord, summary: CandidateSummary | None) -> BlendMember:
    if summary is None:
        return BlendMember(member, UNKNOWN_BACKBONE, member.oof_logloss)
    if member.oof_logloss is not None:
        return BlendMember(member, summary.candidate.backbone, member.oof_logloss)
    known = member.variant in summary.variants
    loss = summary.pooled_logloss(member.variant) if known else None
    return BlendMember(member, summary.candidate.backbone, loss)


def _other_run(store: RunStore, run: str) -> dict[str, CandidateSummary]:
    """Candidates of another run; none where it is gone or was not named by the user.

    The blend can still be shown.
    """
    try:
        return _by_candidate(member_run(store, run).summaries())
    except (RunFolderError, OSError):
        return {}


def _by_candidate(summaries: Sequence[CandidateSummary]) -> dict[str, CandidateSummary]:
    return {s.candidate.candidate: s for s in summaries}


def _last_part(root: str) -> str:
    return root.rstrip("/").rpartition("/")[2]
