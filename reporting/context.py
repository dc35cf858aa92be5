"""The run that a report describes, read from its folder once for all sections.

Takes a `RunStore`; gives records, tables and arrays, and collects the charts of the page.
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from foldrace.config.schema import SweepConfig
from foldrace.core.files import warn_ignored
from foldrace.reporting.charts.candidates import Curve
from foldrace.reporting.charts.style import Palette, palette
from foldrace.reporting.content import Chart
from foldrace.reporting.members import BlendMember, blend_members
from foldrace.run_folder.blend_records import EnsembleRecord
from foldrace.run_folder.records import CandidateSummary
from foldrace.run_folder.store import RunStore
from foldrace.run_folder.tables import leaderboard_csv, ranked


@dataclass(frozen=True)
class Step:
    """One round of choosing the blend."""

    round: int
    picked: str
    """Member that was picked, such as `c0007 ema`; empty after the best round."""
    oof_logloss: float


class ReportContext:
    """One run folder, with what several sections need from it."""

    def __init__(self, store: RunStore) -> None:
        self.store = store
        self.charts: dict[str, bytes] = {}
        """PNG files of all charts so far, by file name."""

    def chart(self, name: str, png: bytes, alt: str, caption: str) -> Chart:
        """A chart for the page, and for `report/<name>.png`."""
        self.charts[f"{name}.png"] = png
        return Chart(png, alt, caption)

    @cached_property
    def config(self) -> SweepConfig:
        """The resolved config."""
        return self.store.config()

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Class names, by class index."""
        return self.store.classes()

    @cached_property
    def summaries(self) -> list[CandidateSummary]:
        """All candidates, best first."""
        return ranked(self.store.summaries())

    @cached_property
    def complete(self) -> list[CandidateSummary]:
        """Candidates with OOF rows of every fold, best first."""
        return [s for s in self.summaries if s.status == "complete" and s.best is not None]

    @cached_property
    def ensemble(self) -> EnsembleRecord | None:
        """The blend; None where there is none, or it was chosen on other folds."""
        found = self.store.blend.record()
        return found if found and found.folds_hash == self.store.folds().hash else None

    @cached_property
    def members(self) -> tuple[BlendMember, ...]:
        """Members of the blend, heaviest first."""
        return blend_members(self.store, self.summaries, self.ensemble) if self.ensemble else ()

    @cached_property
    def weights(self) -> dict[str, float]:
        """Weight in the blend of each candidate of this run, over all its variants."""
        found: dict[str, float] = {}
        for member in self.ensemble.members if self.ensemble else ():
            if not member.run and not member.added:
                found[member.candidate] = found.get(member.candidate, 0.0) + member.weight
        return found

    @cached_property
    def palette(self) -> Palette:
        """Colour and marker of each backbone in every chart."""
        own = [s.candidate.backbone for s in self.summaries]
        return palette([*own, *(m.backbone for m in self.members)])

    @cached_property
    def scored_labels(self) -> NDArray[np.int64]:
        """Class index of each scored row, (N,)."""
        return self.store.labels()[self.store.scored_rows()]

    @cached_property
    def leaderboard(self) -> list[dict[str, str]]:
        """The rows of leaderboard.csv."""
        return _rows(leaderboard_csv(self.summaries))

    def trajectory(self) -> list[Step]:
        """Rounds in which the blend was chosen; empty for a method without rounds."""
        if not self.store.files.exists("ensemble/trajectory.csv"):
            return []
        try:
            rows = _rows(self.store.blend.trajectory())
            path = [_step(row) for row in rows if row["round"]]
        except (csv.Error, ValueError, KeyError, TypeError) as error:
            warn_ignored(f"{self.store.root}/ensemble/trajectory.csv", f"is damaged: {error!r}")
            return []
        return [step for step in path if math.isfinite(step.oof_logloss)]

    def curve(self, candidate: str, fold: int) -> Curve | None:
        """Losses by epoch from a fold trial's train_log.csv; None where there is none."""
        try:
            rows = _rows(self.store.train_log(candidate, fold) or "")
        except csv.Error:
            return None
        if not rows:
            return None
        columns = {
            name: np.array([_float(row.get(name)) for row in rows])
            for name in ("epoch", "val_calibrated_logloss", "train_loss")
        }
        return Curve(columns["epoch"], columns["val_calibrated_logloss"], columns["train_loss"])


def _rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def _step(row: dict[str, str]) -> Step:
    picked = f"{row['candidate']} {row['variant']}".strip()
    return Step(int(row["round"]), picked, _float(row["oof_logloss"]))


def _float(value: str | None) -> float:
    try:
        return float(value or "nan")
    except ValueError:
        return math.nan
