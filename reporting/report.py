"""The HTML report of a run: one self-contained file, and its charts as PNG files beside it.

Takes a run folder, gives the name of the page that it wrote there.
"""

from __future__ import annotations

from datetime import UTC, datetime

from experiment.errors import RunFolderError
from experiment.store import RunStore
from reporting.context import ReportContext
from reporting.markup import Html, warning_list
from reporting.page import Block, page
from reporting.sections import SECTIONS, Section

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
    """A damaged file costs its section, never the report."""
    try:
        body: Html | None = section.build(ctx)
    except RunFolderError as error:
        body = warning_list(f"This section cannot be shown: {p}" for p in error.problems)
    return Block(section.id, section.title, body) if body else None
