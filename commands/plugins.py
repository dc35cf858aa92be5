"""A config or a run folder with the parts of its plugins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from foldrace.config.load import ParsedConfig, parse_config
from foldrace.core.opening import UnfitFile, read_regular
from foldrace.core.plugins import Parts, check_plugins
from foldrace.inference.plugins import ALL_TABLES, run_parts
from foldrace.run_folder.store import RunStore


def parse_with_plugins(config: Path, overrides: Sequence[str]) -> tuple[ParsedConfig, Parts]:
    """Parse a config and load its plugins; the problems of both are collected."""
    return with_plugins(parse_config(config, overrides))


def with_plugins(parsed: ParsedConfig) -> tuple[ParsedConfig, Parts]:
    """Load a config's plugins; their problems stand with the config's own."""
    parts, found = check_plugins(parsed.config.plugins if parsed.config else (), ALL_TABLES)
    return replace(parsed, problems=(*parsed.problems, *found)), parts


def open_run(root: str, console: Console) -> tuple[RunStore, Parts]:
    """Open a run with its own copies of its plugins.

    Warns of each plugin whose original file has changed since the run was made.
    """
    store = RunStore.open(root)
    parts = run_parts(store)
    given = {Path(path).stem: Path(path) for path in store.config().plugins}
    for plugin in parts.files:
        path = given.get(plugin.module)
        if path is not None and _has_changed(path, plugin.source):
            console.print(
                f"warning {path} has changed since the run was made; the run goes "
                f"on with its own copy, {plugin.path}"
            )
    return store, parts


def _has_changed(original: Path, copied: bytes) -> bool:
    try:
        return read_regular(original, len(copied)) != copied
    except UnfitFile:  # longer by now, where it is a file
        return original.is_file()
    except OSError:  # moved, deleted or unreadable: the run does not need it
        return False
