"""A config and its plugins, loaded together so that all their problems are one message."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from foldrace.config.load import ParsedConfig, parse_config
from foldrace.inference.plugins import check_plugins, use_run_plugins
from foldrace.run_folder.store import RunStore


def parse_with_plugins(config: Path, overrides: Sequence[str], smoke: bool = False) -> ParsedConfig:
    """Parse a config and put its plugins' rows into the tables; problems of both are collected."""
    return with_plugins(parse_config(config, overrides, smoke))


def with_plugins(parsed: ParsedConfig) -> ParsedConfig:
    """Put a config's plugins' rows into the tables, and their problems with the config's own."""
    found = check_plugins(parsed.config.plugins if parsed.config else ())
    return replace(parsed, problems=(*parsed.problems, *found))


def open_run(root: str, console: Console) -> RunStore:
    """Open a run with its own copies of its plugins in the tables.

    Warns of each plugin whose original file has changed since the run was made.
    """
    store = RunStore.open(root)
    use_run_plugins(store)
    given = {Path(path).stem: Path(path) for path in store.config().plugins}
    for plugin in store.plugins():
        path = given.get(plugin.module)
        if path is not None and _has_changed(path, plugin.source):
            console.print(
                f"[yellow]warning[/yellow] {path} has changed since the run was made; the run goes "
                f"on with its own copy, {plugin.path}",
                highlight=False,
            )
    return store


def _has_changed(original: Path, copied: bytes) -> bool:
    try:
        return original.read_bytes() != copied
    except OSError:  # moved, deleted or unreadable: the run does not need it
        return False
