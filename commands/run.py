"""`run`: from a config to a finished run folder.

Reads the config first and imports the rest while Ray starts: torch alone takes seconds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from foldrace.config.load import parse_config
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.ray.cluster import nodes_for_checks

if TYPE_CHECKING:
    from foldrace.checks.preflight import Plan


def run(
    config: Path,
    out: str | None,
    overrides: Sequence[str],
    address: str | None,
    dry_run: bool,
    smoke: bool,
    console: Console,
    started: float | None = None,
) -> RunStore:
    """Check the config, make a run folder, and sweep into it.

    `started` is when the command started, by `time.monotonic`, for the time budget; None: now.
    Raises UserError before anything is written, Interrupted on Ctrl-C.
    """
    started = time.monotonic() if started is None else started
    parsed = parse_config(config, overrides, smoke)
    name = parsed.config.name if parsed.config else config.stem
    store = RunStore(out or f"runs/{name}")
    if store.exists:
        from foldrace.commands.check import already_exists

        raise already_exists(store, parsed)
    sweep = not (dry_run or parsed.problems)
    with nodes_for_checks(parsed.config, address, sweep) as nodes:
        from foldrace.checks.preflight import preflight
        from foldrace.commands.check import print_plan
        from foldrace.commands.machine import cores
        from foldrace.commands.plugins import with_plugins

        parsed, parts = with_plugins(parsed)
        plan = preflight(parsed, _mounted(store), nodes, cores(), parts)
        print_plan(plan, console)
        if not dry_run:
            _sweep(store, plan, address, console, started)
            if smoke:
                console.print("smoke run, tiny and barely trained: not for submission")
    return store


def _sweep(
    store: RunStore, plan: Plan, address: str | None, console: Console, started: float
) -> None:
    """Make the run folder of a checked config and finish it."""
    from foldrace.commands.finish import sweep_and_finish
    from foldrace.dataset.duplicates import save_near_duplicates
    from foldrace.dataset.folds import folds_csv

    text = folds_csv(plan.manifest, plan.fold)
    store.create(plan.config, text, plan.manifest.classes, plan.parts.files)
    save_near_duplicates(store.files, plan.near_duplicates)
    images = str(plan.manifest.image_root)
    sweep_and_finish(store, plan.space, images, address, console, started)


def _mounted(store: RunStore) -> Path | None:
    return None if "://" in store.root else Path(store.root)
