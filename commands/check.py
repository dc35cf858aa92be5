"""`check`: look at config and data, train nothing; and the plan of a sweep in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from foldrace.checks.preflight import Plan, preflight
from foldrace.commands.no_config.guess import parse_source
from foldrace.commands.plugins import with_plugins
from foldrace.config.load import ParsedConfig, differing_keys
from foldrace.config.schema import SweepConfig
from foldrace.console.machine import cores
from foldrace.core.errors import Problem, RunFolderError
from foldrace.reporting.formats import counted
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.nodes import this_machine


def check(config: Path, overrides: Sequence[str], console: Console) -> None:
    """Print what a run would do; UserError with every problem of config and data."""
    parsed, parts = with_plugins(parse_source(config, overrides, console))
    plan = preflight(parsed, Path(), this_machine(), cores(), parts)
    print_plan(plan, console)
    if plan.config.resources.gpus_per_trial == "auto":
        console.print(_auto_line(any(node.gpus for node in this_machine())))


def _auto_line(has_gpus: bool) -> str:
    """What `gpus_per_trial: auto` means on this machine."""
    if not has_gpus:
        return (
            "resources.gpus_per_trial auto: this machine has no GPU, and a run here trains on its "
            "cores; on GPUs each backbone is measured first, and gets the share that it needs"
        )
    return (
        "resources.gpus_per_trial auto: before the first trial each backbone is measured on the "
        "GPU, and gets the share that it needs"
    )


def print_plan(plan: Plan, console: Console) -> None:
    """Print the warnings, and the size of the sweep in one line."""
    config = plan.config
    for warning in plan.warnings:
        console.print(f"warning {warning}")
    for note in (*plan.manifest.readings, *(plan.test.readings if plan.test else ())):
        console.print(note)
    if plan.test:
        console.print(f"submission: {plan.test.form}")
    test = f", {len(plan.test)} test images" if plan.test else ""
    console.print(
        f"{config.name}: {len(plan.manifest)} images, {len(plan.manifest.classes)} classes{test}; "
        f"{trials_line(config)} of {counted(len(config.search.backbones), 'backbone')}; "
        f"at most {plan.disk_bytes / 1e9:.2f} GB"
    )


def trials_line(config: SweepConfig) -> str:
    """The number of fold trials in words; an upper limit with a race or a budget."""
    candidates, folds = config.search.most_candidates, config.folds
    started = f"{counted(candidates, 'candidate')} × {counted(folds.k, 'fold')}"
    started += f" × {folds.repeats} repeats" if folds.repeats > 1 else ""
    trials = candidates * folds.trials
    most = min(trials, config.search.fold_trials or trials)
    limited = config.race.rule != "none" or config.resources.gpu_hours or most < trials
    if not limited and config.resources.time_budget is None:
        return f"{started} = {counted(trials, 'fold trial')}"
    return f"{started}, up to {counted(most, 'fold trial')}"


def already_exists(store: RunStore, parsed: ParsedConfig | None) -> RunFolderError:
    """The error for a run folder that exists; it names the keys in which another sweep differs.

    `parsed` None: there is no config yet to compare.
    """
    problems = parsed.problems if parsed else ()
    keys = differing_keys(store.config(), parsed.config) if parsed and parsed.config else []
    message = f"exists already; go on with `foldrace resume {store.root}`, or give --out"
    if keys:
        listed = ", ".join(keys[:8]) + (", …" if len(keys) > 8 else "")
        message = (
            f"is the run folder of another config (it differs in {listed}); give another --out, "
            f"or go on with that run: `foldrace resume {store.root}`"
        )
    return RunFolderError([*problems, Problem(store.root, message)])
