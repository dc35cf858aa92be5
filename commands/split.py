"""`split`: write folds.csv alone.

Takes a config and its data, gives the file with a fold number for each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from foldrace.config.load import parse_config
from foldrace.console.machine import cores
from foldrace.core.errors import RunFolderError
from foldrace.dataset.audit import kept_rows
from foldrace.dataset.folds import folds_csv, make_folds
from foldrace.dataset.manifest import read_manifest
from foldrace.run_folder.store import RunStore


def split(config: Path, overrides: Sequence[str], out: Path | None, console: Console) -> Path:
    """Write folds.csv to `out`, or beside the config; RunFolderError where it exists already."""
    parsed = parse_config(config, overrides).require()
    manifest = read_manifest(parsed.data, parsed.folds.column)
    manifest = kept_rows(manifest, parsed.data, cores())
    target = out or config.resolve().parent / "folds.csv"
    if target.exists():
        raise RunFolderError.single(str(target), "exists; remove it or give another --out")
    text = folds_csv(manifest, make_folds(manifest, parsed.folds))
    RunStore(target.parent).files.write(target.name, text.encode())
    repeats = f" × {parsed.folds.repeats} repeats" if parsed.folds.repeats > 1 else ""
    console.print(f"{target}: {len(manifest)} rows in {parsed.folds.k} folds{repeats}")
    return target
