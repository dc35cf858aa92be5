"""The HTML report of a run: one self-contained file, and its charts as PNG files beside it.

Takes a run folder, gives the name of the page that it wrote there. `SECTIONS` is the table of its
sections: a new one is one function and one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from foldrace.core.errors import RunFolderError
from foldrace.reporting.content import Part, Warnings
from foldrace.reporting.context import ReportContext
from foldrace.reporting.page import Block, page
from foldrace.reporting.sections import (
    blend,
    calibration,
    candidates,
    classes,
    overview,
    race,
    reproduce,
)
from foldrace.run_folder.store import RunStore


@dataclass(frozen=True)
class Section:
    """One part of the page."""

    id: str
    title: str
    build: Callable[[ReportContext], Sequence[Part]]
    """Gives its parts; none when there is nothing to show."""


SECTIONS = (
    Section("summary", "Summary", overview.summary),
    Section("leaderboard", "Leaderboard", candidates.leaderboard),
    Section("race", "Race", race.race),
    Section("curves", "Learning curves", candidates.learning_curves),
    Section("accuracy", "Accuracy", candidates.accuracy),
    Section("blend", "Blend", blend.blend),
    Section("correlation", "Correlation", calibration.correlation),
    Section("calibration", "Calibration", calibration.calibration),
    Section("classes", "Classes", classes.classes),
    Section("reproduce", "How to reproduce", reproduce.reproduce),
)

PAGE = "report/index.html"


def write_report(store: RunStore) -> str:
    """Write `report/index.html` and `report/<chart>.png`; charts of an earlier report go."""
    ctx = ReportContext(store)
    blocks = [block for block in (_block(section, ctx) for section in SECTIONS) if block]
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    document = page(ctx.config.name, f"Foldrace report, written {written}", blocks)
    for name, png in ctx.charts.items():
        store.files.write(f"report/{name}", png)
    store.files.write(PAGE, document.encode(errors="replace"))
    for name in store.files.names("report"):
        if name.endswith(".png") and name not in ctx.charts:
            store.files.delete(f"report/{name}")
    return PAGE


def _block(section: Section, ctx: ReportContext) -> Block | None:
    """The section with its parts; a damaged file costs its section, never the report."""
    try:
        parts = section.build(ctx)
    except RunFolderError as error:
        parts = [Warnings(tuple(f"This section cannot be shown: {p}" for p in error.problems))]
    return Block(section.id, section.title, parts) if parts else None
