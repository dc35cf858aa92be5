"""`report`: write the HTML report of a run folder, at any time."""

from __future__ import annotations

from rich.console import Console

from foldrace.reporting.report import write_report
from foldrace.run_folder.store import RunStore


def report(root: str, console: Console) -> None:
    """Write the report and print where it is."""
    store = RunStore.open(root)
    console.print(f"Report: {store.root}/{write_report(store)}")
