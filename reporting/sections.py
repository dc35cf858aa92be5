"""The table of the report's sections, in the order of the page.

A new section is one function and one row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from reporting import (
    blend,
    calibration,
    candidates,
    classes,
    correlation,
    leaderboard,
    overview,
    race,
    reproduce,
)
from reporting.context import ReportContext
from reporting.markup import Html


@dataclass(frozen=True)
class Section:
    """One part of the page."""

    id: str
    title: str
    build: Callable[[ReportContext], Html | None]
    """None when there is nothing to show."""


SECTIONS = (
    Section("summary", "Summary", overview.summary),
    Section("leaderboard", "Leaderboard", leaderboard.leaderboard),
    Section("race", "Race", race.race),
    Section("curves", "Learning curves", candidates.learning_curves),
    Section("accuracy", "Accuracy", candidates.accuracy),
    Section("blend", "Blend", blend.blend),
    Section("correlation", "Correlation", correlation.correlation),
    Section("calibration", "Calibration", calibration.calibration),
    Section("classes", "Classes", classes.classes),
    Section("reproduce", "How to reproduce", reproduce.reproduce),
)
