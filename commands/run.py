"""`run`: from a config to a finished run folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from foldrace.checks.preflight import preflight
from foldrace.commands.check import already_exists, print_plan
from foldrace.commands.finish import cluster_for_checks, sweep_and_finish
from foldrace.commands.machine import cores
from foldrace.commands.plugins import parse_with_plugins
from foldrace.core.plugins import loaded
from foldrace.dataset.duplicates import save_near_duplicates
from foldrace.dataset.folds import folds_csv
from foldrace.run_folder.store import RunStore


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
    parsed = parse_with_plugins(config, overrides, smoke)
    name = parsed.config.name if parsed.config else config.stem
    store = RunStore(out or f"runs/{name}")
    if store.exists:
        raise already_exists(store, parsed)
    with cluster_for_checks(parsed, address, dry_run) as nodes:
        plan = preflight(parsed, _mounted(store), nodes, cores())
        print_plan(plan, console)
        if not dry_run:
            text = folds_csv(plan.manifest, plan.fold)
            store.create(plan.config, text, plan.manifest.classes, loaded())
            save_near_duplicates(store.files, plan.near_duplicates)
            images = str(plan.manifest.image_root)
            sweep_and_finish(store, plan.space, images, address, console, started)
            if smoke:
                console.print("smoke run, tiny and barely trained: not for submission")
    return store


def _mounted(store: RunStore) -> Path | None:
    return None if "://" in store.root else Path(store.root)
