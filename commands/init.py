"""`init`: write the config that a run of some data would have, to be changed by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from foldrace.commands.no_config.guess import guess_sweep
from foldrace.config.commented import commented_yaml
from foldrace.config.schema import SweepConfig
from foldrace.console.machine import write_out
from foldrace.core.errors import DataError, RunFolderError, UserError
from foldrace.dataset.guess import is_data


def init(source: Path, overrides: Sequence[str], out: Path, console: Console) -> Path:
    """Write the config of a folder, zip or table to `out`; RunFolderError where that exists."""
    if not is_data(source):
        kinds = "a folder of images, a zip or a table"
        raise UserError.single(str(source), f"is no data to write a config for; needed: {kinds}")
    if out.exists():
        raise RunFolderError.single(str(out), "exists; remove it or give another --out")
    guess = guess_sweep(source, overrides)
    config = guess.parsed.require()
    if guess.problems:
        raise DataError(guess.problems)
    for line in guess.lines:
        console.print(line)
    folder = out.resolve().parent
    keys = {name: _written(name, value, config, folder) for name, value in guess.keys.items()}
    head = [f"foldrace run {out}", "", *guess.lines]
    write_out(out, commented_yaml(keys, head).encode())
    console.print(f"{out}: change it, then: foldrace run {out}")
    return out


def _written(name: str, value: object, config: SweepConfig, folder: Path) -> object:
    """A key or section as the file has it: its paths relative to the file where they lie below."""
    resolved: Any = config.model_dump(mode="json", exclude_none=True).get(name, value)
    if not isinstance(value, Mapping):
        return resolved
    keys = {key: resolved.get(key, given) for key, given in value.items()}
    if "time_budget" in keys:
        keys["time_budget"] = value["time_budget"]  # 30m, not 1800.0
    if name == "data":
        keys |= {k: _below(keys[k], folder) for k in config.data.places if keys.get(k)}
    return keys


def _below(path: str, folder: Path) -> str:
    absolute = Path(path)
    return str(absolute.relative_to(folder)) if absolute.is_relative_to(folder) else path
