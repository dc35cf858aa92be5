"""`resume`: go on with a run, from its folder alone.

A run in which nothing is left to do is told so without Ray and torch, which take seconds to import.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from foldrace.commands.moved_data import moved, refuse_other_keys
from foldrace.config.load import ParsedConfig, parse_config, to_yaml
from foldrace.config.schema import SearchConfig, SweepConfig
from foldrace.console.machine import only_driver
from foldrace.console.warnings import warnings_shown
from foldrace.core.consent import allow_command, allowed_command
from foldrace.core.errors import RunFolderError, UserError
from foldrace.core.files import to_bytes
from foldrace.dataset.test_set import read_test_set
from foldrace.reporting.live import print_leaderboard
from foldrace.run_folder.allowed import open_allowed
from foldrace.run_folder.belonging import (
    EXTENDABLE,
    PLACES,
    require_own_trials,
    telling_where_data_lay,
    training_data,
)
from foldrace.run_folder.claims import HeldClaim
from foldrace.run_folder.records import CandidateSummary
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.notify import notifying


def resume(
    root: str,
    overrides: Sequence[str],
    retry_failed: bool,
    address: str | None,
    console: Console,
    started: float | None = None,
    data_root: str | None = None,
    trust_plugins: bool = False,
) -> RunStore:
    """Go on with a run; finished fold trials are kept, and stopped candidates stay stopped.

    Overrides may extend budget and space, and say where the data lie now; `data_root` says it of
    all. `started` is when the command started, by `time.monotonic`; None: now. `trust_plugins`: see
    `open_allowed`. RunFolderError where fold trials that ended do not belong to the run's folds,
    settings or data.
    """
    started = time.monotonic() if started is None else started
    store = open_allowed(root, trust_plugins)
    with only_driver(store, "resume") as claim:
        with warnings_shown(console):
            earlier = store.summaries(stored=require_own_trials(store))
            store.classes()
        parsed = parse_stored(store, overrides, data_root)
        _refuse_other_changes(store, parsed)
        config = parsed.require()
        _require_teachers(store, config, earlier)
        _allow_command(store, config, trust_plugins)
        have_moved = config.data != store.config().data
        store.use_data(config.data)
        manifest = training_data(store)
        if have_moved:
            with telling_where_data_lay(store):
                read_test_set(config.data, store.own_classes())
        over = nothing_to_train(earlier, config.search, retry_failed)
        if over and config == store.config() and _is_whole(store):
            store.mend()
            print_leaderboard(console, earlier, limit=10)
            with notifying(store):
                console.print(f"Nothing is left to do. Report: {store.root}/report/index.html")
            return store
        images = str(manifest.image_root)
        going_on = _GoingOn(store, config, earlier, images, over, retry_failed)
        _go_on(going_on, address, console, started, claim)
    return store


def _require_teachers(
    store: RunStore, config: SweepConfig, earlier: Sequence[CandidateSummary]
) -> None:
    """RunFolderError where students are still to train whose teacher's files do not fit."""
    waiting = (s.candidate.teacher for s in earlier if not s.settled)
    needed = {teacher.digest for teacher in waiting if teacher is not None}
    if config.search.teacher is not None and len(earlier) < config.search.most_candidates:
        needed.add(config.search.teacher)
    found = (store.teachers.problems(digest, store.folds()) for digest in sorted(needed))
    problems = [problem for each in found for problem in each]
    if problems:
        raise RunFolderError(problems)


def _allow_command(store: RunStore, config: SweepConfig, trust: bool) -> None:
    """RunFolderError where the sweep would run a shell command that the user has not allowed."""
    command = config.notify.command
    if trust or command != store.config().notify.command:  # of this command's own --set
        allow_command(command)
    allowed_command(command, f"{store.root}/sweep.yaml")


@dataclass(frozen=True)
class _GoingOn:
    """A run with the config that it goes on with."""

    store: RunStore
    config: SweepConfig
    earlier: Sequence[CandidateSummary]
    image_root: str
    over: bool
    """True where nothing is left to train."""
    retry_failed: bool


def _go_on(
    run: _GoingOn, address: str | None, console: Console, started: float, claim: HeldClaim
) -> None:
    from foldrace.checks.config import config_problems
    from foldrace.commands.finish import finish_again, sweep_and_finish
    from foldrace.commands.plugins import open_run
    from foldrace.scheduling.ray.cluster import nodes_for_checks
    from foldrace.search_spaces.space import build_space

    store, config = run.store, run.config
    _, parts = open_run(store.root, console)
    rows = len(store.folds().image_paths)
    space, problems = build_space(config, f"{store.root}/sweep.yaml", rows)
    backbones = {s.candidate.candidate: s.candidate.backbone for s in run.earlier}
    sweeps = not problems and not run.over
    with nodes_for_checks(config, address, sweep=sweeps) as nodes:
        problems += config_problems(config, space, nodes, backbones, parts)
        if problems:
            raise UserError(problems)
        store.mend()
        store.save_config(config)
        if run.over:
            finish_again(store, console)
            return
        if run.retry_failed:
            for (candidate, fold), trial in store.trials().items():
                if trial.status == "failed":
                    store.forget_trial(candidate, fold)
        sweep_and_finish(store, space, run.image_root, address, console, started, claim)


def nothing_to_train(
    summaries: Sequence[CandidateSummary], search: SearchConfig, retry_failed: bool
) -> bool:
    """True where a sweep would start no fold trial: every candidate has come to its end."""
    if len(summaries) < search.most_candidates or not all(s.settled for s in summaries):
        return False
    return not (retry_failed and any(s.status == "failed" for s in summaries))


def _is_whole(store: RunStore) -> bool:
    """True where blend, submission and report are there."""
    has_result = store.config().data.test is None or store.submission() is not None
    has_report = store.files.exists("report/index.html")
    return has_result and has_report and store.blend.record() is not None


def parse_stored(
    store: RunStore, overrides: Sequence[str], data_root: str | None = None
) -> ParsedConfig:
    """The run's config with overrides; what else may change is not asked here.

    All paths in it are absolute; those of overrides are relative to where the user types.
    """
    stored = store.config()
    stored = stored.model_copy(update={"data": moved(stored.data, data_root)})
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "sweep.yaml"
        copy.write_bytes(to_bytes(to_yaml(stored)))
        parsed = parse_config(copy, overrides, base=Path.cwd())
    return replace(parsed, source=f"{store.root}/sweep.yaml")


def _refuse_other_changes(store: RunStore, parsed: ParsedConfig) -> None:
    if parsed.config is None:
        return
    refuse_other_keys(store.config(), parsed.config, (*EXTENDABLE, *PLACES))
