"""`run`: from a config, or from data alone, to a finished run folder.

Reads the config first and imports the rest while Ray starts: torch alone takes seconds.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from foldrace.config.load import ParsedConfig, parse_config
from foldrace.config.schema import SMOKE
from foldrace.console.machine import cores, only_driver
from foldrace.core.errors import Problem, UserError
from foldrace.dataset.guess import is_data
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.ray.cluster import nodes_for_checks

if TYPE_CHECKING:
    from foldrace.checks.preflight import Plan
    from foldrace.run_folder.claims import HeldClaim


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
    """Check the config, or what is chosen for a folder, zip or table; sweep into a run folder.

    `started` is when the command started, by `time.monotonic`, for the time budget; None: now.
    Raises UserError before anything is written, Interrupted on Ctrl-C.
    """
    started = time.monotonic() if started is None else started
    parsed, store = _named(config, out, overrides, smoke)
    with contextlib.nullcontext() if dry_run else only_driver(store, "run") as claim:
        _refuse_existing(store, parsed)
        if parsed is None:
            parsed = _guessed(config, overrides, address, smoke, console, started)
        with nodes_for_checks(
            parsed.config, address, claim is not None and not parsed.problems
        ) as nodes:
            from foldrace.checks.preflight import preflight
            from foldrace.commands.check import print_plan
            from foldrace.commands.plugins import with_plugins

            parsed, parts = with_plugins(parsed)
            plan = preflight(parsed, _mounted(store), nodes, cores(), parts)
            print_plan(plan, console)
            if claim is not None:
                console.print(f"config: {store.root}/sweep.yaml")
                _sweep(store, plan, address, console, started, claim)
                if smoke:
                    console.print("smoke run, tiny and barely trained: not for submission")
    return store


def _named(
    config: Path, out: str | None, overrides: Sequence[str], smoke: bool
) -> tuple[ParsedConfig | None, RunStore]:
    """The config, None of data without one; and the run folder to be, which must not exist yet."""
    if not is_data(config):
        parsed = parse_config(config, overrides, smoke)
        name = parsed.config.name if parsed.config else config.stem
        store = RunStore(out or _folder_of(name, parsed.problems))
        _refuse_existing(store, parsed)
        return parsed, store
    from foldrace.commands.no_config.guess import run_name

    name = run_name(config, overrides) + (SMOKE if smoke else "")
    store = RunStore(out or _folder_of(name))
    _refuse_existing(store, None)
    return None, store


def _folder_of(name: str, others: Sequence[Problem] = ()) -> str:
    """The run folder of a sweep of that name.

    UserError, with the other problems, where it would lie anywhere but in `runs/`.
    """
    if "/" in name or name in (".", "..") or not name.strip():
        message = f"got {name!r}, which is no name for a folder in runs/; change it, or give --out"
        raise UserError([*others, Problem("name", message)])
    return f"runs/{name}"


def _guessed(
    data: Path,
    overrides: Sequence[str],
    address: str | None,
    smoke: bool,
    console: Console,
    started: float,
) -> ParsedConfig:
    """The config that is chosen for data."""
    from foldrace.commands.no_config.guess import parse_source

    with nodes_for_checks(None, address, sweep=False) as nodes:
        return parse_source(data, overrides, console, smoke, nodes, started)


def _refuse_existing(store: RunStore, parsed: ParsedConfig | None) -> None:
    if store.exists:
        from foldrace.commands.check import already_exists

        raise already_exists(store, parsed)


def _sweep(
    store: RunStore,
    plan: Plan,
    address: str | None,
    console: Console,
    started: float,
    claim: HeldClaim,
) -> None:
    """Make the run folder of a checked config and finish it."""
    from foldrace.commands.finish import sweep_and_finish
    from foldrace.core.consent import allow_command, allow_plugins
    from foldrace.dataset import curation, left_out
    from foldrace.dataset.duplicates import save_near_duplicates
    from foldrace.dataset.folds import folds_csv
    from foldrace.run_folder.belonging import save_image_sizes

    text = folds_csv(plan.manifest, plan.fold)
    others = {left_out.NAME: left_out.left_out_csv(plan.left_out)}
    if plan.manifest.merged:
        others[curation.MERGED] = curation.merged_json(plan.manifest.merged)
    allow_plugins(plan.parts.files)  # the user's own config has them
    allow_command(plan.config.notify.command)
    store.create(plan.config, text, plan.manifest.classes, plan.parts.files, others)
    save_near_duplicates(store.files, plan.near_duplicates)
    save_image_sizes(store, plan.manifest)
    images = str(plan.manifest.image_root)
    sweep_and_finish(store, plan.space, images, address, console, started, claim)


def _mounted(store: RunStore) -> Path | None:
    return None if "://" in store.root else Path(store.root)
