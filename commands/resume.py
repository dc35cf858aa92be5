"""`resume`: go on with a run, from its folder alone."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from foldrace.checks.config import config_problems
from foldrace.commands.finish import sweep_and_finish
from foldrace.commands.plugins import open_run
from foldrace.config.load import ParsedConfig, differing_keys, parse_config
from foldrace.config.schema import SweepConfig
from foldrace.core.errors import Problem, RunFolderError, UserError
from foldrace.dataset.manifest import Manifest, read_manifest
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.ray.cluster import nodes_for_checks
from foldrace.search_spaces.space import build_space

# What `resume --set` may change: everything else would make old and new trials incomparable.
_EXTENDABLE = (
    "search.candidates",
    "search.backbones",
    "search.space",
    "search.per_backbone",
    "search.sampler",
    "search.objective",
    "search.points",
    "search.warm_start",
    "search.min_share",
    "search.fold_trials",
    "search.storage",
    "race.",
    "resources.",
    "ensemble.",
    "notify.",
)


def resume(
    root: str,
    overrides: Sequence[str],
    retry_failed: bool,
    address: str | None,
    console: Console,
    started: float | None = None,
) -> RunStore:
    """Go on with a run; finished fold trials are kept, and stopped candidates stay stopped.

    Overrides may extend budget and space. `started` is when the command started, by
    `time.monotonic`; None: now.
    """
    started = time.monotonic() if started is None else started
    store, parts = open_run(root, console)
    parsed = _parse_stored(store, overrides)
    _refuse_other_changes(store, parsed)
    config = parsed.require()
    space, problems = build_space(
        config, f"{store.root}/sweep.yaml", len(store.folds().image_paths)
    )
    manifest = _same_data(store, config)
    earlier = {s.candidate.candidate: s.candidate.backbone for s in store.summaries()}
    with nodes_for_checks(config, address, sweep=not problems) as nodes:
        problems += config_problems(config, space, nodes, earlier, parts)
        if problems:
            raise UserError(problems)
        store.save_config(config)
        if retry_failed:
            for (candidate, fold), trial in store.trials().items():
                if trial.status == "failed":
                    store.forget_trial(candidate, fold)
        sweep_and_finish(store, space, str(manifest.image_root), address, console, started)
    return store


def _parse_stored(store: RunStore, overrides: Sequence[str]) -> ParsedConfig:
    """All paths in it are absolute; those of overrides are relative to where the user types."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "sweep.yaml"
        copy.write_bytes(store.files.read("sweep.yaml"))
        parsed = parse_config(copy, overrides, base=Path.cwd())
    return replace(parsed, source=f"{store.root}/sweep.yaml")


def _refuse_other_changes(store: RunStore, parsed: ParsedConfig) -> None:
    if parsed.config is None:
        return
    keys = differing_keys(store.config(), parsed.config)
    refused = [key for key in keys if not key.startswith(_EXTENDABLE)]
    if refused:
        allowed = ", ".join(f"{prefix}*" for prefix in _EXTENDABLE)
        raise RunFolderError(
            [
                Problem(f"--set {key}", f"cannot change in a run that exists; allowed: {allowed}")
                for key in refused
            ]
        )


def _same_data(store: RunStore, config: SweepConfig) -> Manifest:
    """The data as it was; fold numbers belong to the rows of folds.csv."""
    manifest = read_manifest(config.data, config.folds.column)
    if manifest.image_paths != store.folds().image_paths:
        raise RunFolderError.single(
            f"{store.root}/folds.csv",
            f"lists {len(store.folds().image_paths)} images, but {config.data.train} now gives "
            f"{len(manifest)}, or different ones; restore the data, or start a new run",
        )
    return manifest
