"""`resume`: go on with a run, from its folder alone."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from foldrace.checks.config import config_problems
from foldrace.commands.finish import finish_again, nothing_to_train, sweep_and_finish
from foldrace.commands.machine import only_driver
from foldrace.commands.moved_data import moved, refuse_other_keys
from foldrace.commands.plugins import open_run
from foldrace.commands.warnings_shown import warnings_shown
from foldrace.config.load import ParsedConfig, parse_config, to_yaml
from foldrace.core.errors import UserError
from foldrace.core.files import to_bytes
from foldrace.dataset.test_set import read_test_set
from foldrace.run_folder.belonging import (
    EXTENDABLE,
    PLACES,
    require_own_trials,
    telling_where_data_lay,
    training_data,
)
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.ray.cluster import nodes_for_checks
from foldrace.search_spaces.space import build_space


def resume(
    root: str,
    overrides: Sequence[str],
    retry_failed: bool,
    address: str | None,
    console: Console,
    started: float | None = None,
    data_root: str | None = None,
) -> RunStore:
    """Go on with a run; finished fold trials are kept, and stopped candidates stay stopped.

    Overrides may extend budget and space, and say where the data lie now; `data_root` says it of
    all. `started` is when the command started, by `time.monotonic`; None: now. RunFolderError where
    fold trials that ended do not belong to the run's folds, settings or data.
    """
    started = time.monotonic() if started is None else started
    with only_driver(RunStore.open(root), "resume") as claim:
        store, parts = open_run(root, console)
        with warnings_shown(console):
            earlier = store.summaries(stored=require_own_trials(store))
            store.classes()
        parsed = _parse_stored(store, overrides, data_root)
        _refuse_other_changes(store, parsed)
        config = parsed.require()
        have_moved = config.data != store.config().data
        store.use_data(config.data)
        space, problems = build_space(
            config, f"{store.root}/sweep.yaml", len(store.folds().image_paths)
        )
        manifest = training_data(store)
        if have_moved:
            with telling_where_data_lay(store):
                read_test_set(config.data, store.own_classes())
        backbones = {s.candidate.candidate: s.candidate.backbone for s in earlier}
        over = nothing_to_train(earlier, config.search, retry_failed)
        with nodes_for_checks(config, address, sweep=not problems and not over) as nodes:
            problems += config_problems(config, space, nodes, backbones, parts)
            if problems:
                raise UserError(problems)
            store.mend()
            same = config == store.config()
            store.save_config(config)
            if over:
                finish_again(store, console, is_whole=same and not have_moved)
                return store
            if retry_failed:
                for (candidate, fold), trial in store.trials().items():
                    if trial.status == "failed":
                        store.forget_trial(candidate, fold)
            images = str(manifest.image_root)
            sweep_and_finish(store, space, images, address, console, started, claim)
    return store


def _parse_stored(
    store: RunStore, overrides: Sequence[str], data_root: str | None = None
) -> ParsedConfig:
    """All paths in it are absolute; those of overrides are relative to where the user types."""
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
