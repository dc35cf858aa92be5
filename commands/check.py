"""`check` and `split`: look at config and data, train nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from foldrace.checks.preflight import Plan, preflight
from foldrace.commands.plugins import parse_with_plugins
from foldrace.commands.terminal import cores
from foldrace.config.load import ParsedConfig, parse_config
from foldrace.config.schema import SweepConfig
from foldrace.core.errors import Problem, RunFolderError
from foldrace.dataset.folds import folds_csv, make_folds
from foldrace.dataset.manifest import read_manifest
from foldrace.reporting.markup import counted
from foldrace.run_folder.store import RunStore, differing_keys
from foldrace.scheduling.ray.cluster import this_machine


def check(config: Path, overrides: Sequence[str], console: Console) -> None:
    """Every problem of config and data, or what a run would do."""
    plan = preflight(parse_with_plugins(config, overrides), Path(), this_machine(), cores())
    print_plan(plan, console)


def split(config: Path, overrides: Sequence[str], out: Path | None, console: Console) -> Path:
    """Write folds.csv alone; `out` None: beside the config."""
    parsed = parse_config(config, overrides).require()
    manifest = read_manifest(parsed.data, parsed.folds.column)
    target = out or config.resolve().parent / "folds.csv"
    if target.exists():
        raise RunFolderError.single(str(target), "exists; remove it or give another --out")
    text = folds_csv(manifest, make_folds(manifest, parsed.folds))
    RunStore(target.parent).files.write(target.name, text.encode())
    console.print(f"{target}: {len(manifest)} rows in {parsed.folds.k} folds")
    return target


def print_plan(plan: Plan, console: Console) -> None:
    config = plan.config
    for warning in plan.warnings:
        console.print(f"[yellow]warning[/yellow] {escape(str(warning))}", highlight=False)
    test = f", {len(plan.test)} test images" if plan.test else ""
    console.print(
        f"{config.name}: {len(plan.manifest)} images, {len(plan.manifest.classes)} classes{test}; "
        f"{trials_line(config)} of {counted(len(config.search.backbones), 'backbone')}; "
        f"at most {plan.disk_bytes / 1e9:.2f} GB"
    )


def trials_line(config: SweepConfig) -> str:
    """How many fold trials there are; with a race or another limit at most."""
    candidates, folds = config.search.most_candidates, config.folds.k
    started = f"{counted(candidates, 'candidate')} × {counted(folds, 'fold')}"
    trials = candidates * folds
    most = min(trials, config.search.fold_trials or trials)
    limited = config.race.rule != "none" or config.resources.gpu_hours or most < trials
    if not limited and config.resources.time_budget is None:
        return f"{started} = {counted(trials, 'fold trial')}"
    return f"{started}, up to {counted(most, 'fold trial')}"


def already_exists(store: RunStore, parsed: ParsedConfig) -> RunFolderError:
    """Same sweep: `resume` goes on with it. Another: name the keys that differ."""
    keys = differing_keys(store.config(), parsed.config) if parsed.config else []
    message = f"exists already; go on with `foldrace resume {store.root}`, or give --out"
    if keys:
        listed = ", ".join(keys[:8]) + (", …" if len(keys) > 8 else "")
        message = (
            f"is the run folder of another config (it differs in {listed}); give another --out, "
            f"or go on with that run: `foldrace resume {store.root}`"
        )
    return RunFolderError([*parsed.problems, Problem(store.root, message)])
