"""`run`: from a config to a finished run folder."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from commands.check import already_exists, print_plan
from commands.finish import finish
from commands.machine import cores
from commands.plugins import parse_with_plugins
from commands.terminal import log_folder, logging_to, only_driver, only_our_output
from experiment.config import ResourcesConfig
from experiment.config_file import ParsedConfig
from experiment.errors import EnvironmentProblem, Interrupted
from experiment.folds import folds_csv
from experiment.near_duplicates import save_near_duplicates
from experiment.plugins import loaded
from experiment.store import RunStore
from reporting.live import LiveView, print_leaderboard
from scheduling.cluster import Node, alive_nodes, connect, this_machine, unreachable
from scheduling.preflight import preflight
from scheduling.tuner import SweepOutcome, run_sweep
from search_spaces.sampling import SearchSpace

_log = logging.getLogger("foldrace")


def run(
    config: Path,
    out: str | None,
    overrides: Sequence[str],
    address: str | None,
    dry_run: bool,
    smoke: bool,
    console: Console,
) -> RunStore:
    """The main job. Raises UserError before anything is written, Interrupted on Ctrl-C."""
    parsed = parse_with_plugins(config, overrides, smoke)
    name = parsed.config.name if parsed.config else config.stem
    store = RunStore(out or f"runs/{name}")
    if store.exists:
        raise already_exists(store, parsed)
    with cluster_for_checks(parsed, address) as nodes:
        plan = preflight(parsed, _mounted(store), nodes, cores())
        print_plan(plan, console)
        if not dry_run:
            text = folds_csv(plan.manifest, plan.fold)
            store.create(plan.config, text, plan.manifest.classes, loaded())
            save_near_duplicates(store.files, plan.near_duplicates)
            sweep_and_finish(store, plan.space, str(plan.manifest.image_root), address, console)
    return store


@contextlib.contextmanager
def cluster_for_checks(parsed: ParsedConfig, address: str | None) -> Iterator[list[Node]]:
    """What the run will have. A cluster that runs must be asked, and stays connected; this
    machine is known without starting Ray, so that a typo costs no start."""
    if address is None:
        yield this_machine()
        return
    resources = parsed.config.resources if parsed.config else ResourcesConfig()
    with connect(address, resources):
        yield alive_nodes()


def sweep_and_finish(
    store: RunStore, space: SearchSpace, image_root: str, address: str | None, console: Console
) -> None:
    config = store.config()
    folder = log_folder(store)
    with (
        only_driver(store, folder),
        logging_to(folder),
        only_our_output(folder / "ray.log", console) as screen,
    ):
        _log.info("Ray: starting")
        with connect(address, config.resources) as cluster:
            problems = unreachable(_local_folders(store, image_root))
            if problems:
                raise EnvironmentProblem(problems)
            screen.print(
                f"{cluster.slots()} fold trials at a time; Ray dashboard: {cluster.dashboard}"
            )
            _log.info("sweep: begins, %d fold trials at a time", cluster.slots())
            with LiveView(screen) as view:
                outcome = run_sweep(store, config, space, image_root, cluster, view.update)
            _log.info("sweep: ended after %.1f s", outcome.seconds)
        _log.info("Ray: stopped")
        if outcome.interrupted:
            raise Interrupted(f"interrupted; go on with: foldrace resume {store.root}")
        print_leaderboard(screen, outcome.summaries, limit=10)
        _print_trouble(outcome, screen)
        finished = finish(store, screen)
        screen.print(f"Report: {store.root}/{finished.report}")
        _log.info("run: blend and report written")


def _print_trouble(outcome: SweepOutcome, console: Console) -> None:
    """One line for each candidate that will not be in the blend."""
    if outcome.out_of_time:
        console.print("[yellow]warning[/yellow] the time budget ended the sweep")
    for summary in outcome.summaries:
        if summary.status == "complete":
            continue
        errors = [t.error for t in summary.trials if t.error]
        reason = errors[0].strip().splitlines()[-1] if errors else "not all folds were trained"
        console.print(
            f"[yellow]warning[/yellow] {summary.candidate.candidate} {summary.status}: {reason}",
            highlight=False,
        )


def _local_folders(store: RunStore, image_root: str) -> list[str]:
    return [path for path in (store.root, image_root) if "://" not in path]


def _mounted(store: RunStore) -> Path | None:
    return None if "://" in store.root else Path(store.root)
