"""Data that lie elsewhere now, or another test set: `--data-root`, `--set data.*` and `--test`.

Takes what was typed and a run folder; the run then reads its data there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from foldrace.config.load import differing_keys, parse_mapping
from foldrace.config.schema import DataConfig, SweepConfig
from foldrace.core.errors import ConfigError, Problem, RunFolderError
from foldrace.dataset.places import with_root
from foldrace.run_folder.belonging import PLACES
from foldrace.run_folder.store import RunStore


@dataclass(frozen=True)
class DataOptions:
    """Options that say where data lie; None or empty: as sweep.yaml says."""

    root: str | None = None
    """Folder that the data now have in place of their common one."""
    overrides: Sequence[str] = ()
    """`data.train=PATH` and so on."""
    test: str | None = None
    """Another test set."""
    test_images: str | None = None
    sample_submission: str | None = None


AS_STORED = DataOptions()
"""As sweep.yaml says."""


def use_data(store: RunStore, options: DataOptions) -> None:
    """Let a run read its data where the options say; sweep.yaml stays as it is.

    Relative paths are relative to where the user types. ConfigError for wrong overrides,
    RunFolderError for those that are about anything else than places.
    """
    before = store.config()
    data = moved(before.data, options.root)
    raw = before.model_copy(update={"data": data}).model_dump(mode="json")
    config = parse_mapping(raw, "--set", Path.cwd(), options.overrides).require()
    refuse_other_keys(before, config, PLACES)
    store.use_data(_with_test_set(config.data, options))


def moved(data: DataConfig, root: str | None) -> DataConfig:
    """The data below the folder of `--data-root`; ConfigError where there is none."""
    if root is None:
        return data
    if not os.path.isdir(os.path.expanduser(root)):
        raise ConfigError.single(f"--data-root {root}", "is no folder")
    return with_root(data, _absolute(root))


def refuse_other_keys(before: SweepConfig, config: SweepConfig, allowed: Sequence[str]) -> None:
    """RunFolderError with each key that differs and does not begin as one of `allowed`."""
    keys = differing_keys(before, config)
    refused = [key for key in keys if not key.startswith(tuple(allowed))]
    if refused:
        names = ", ".join(f"{prefix}*" for prefix in allowed)
        raise RunFolderError(
            [
                Problem(f"--set {key}", f"cannot change in a run that exists; allowed: {names}")
                for key in refused
            ]
        )


def _with_test_set(data: DataConfig, options: DataOptions) -> DataConfig:
    """The data with another test set; images and sample of the old one do not go with it."""
    given = {
        "test": options.test,
        "test_images": options.test_images,
        "sample_submission": options.sample_submission,
    }
    update = {key: None if path is None else _absolute(path) for key, path in given.items()}
    if options.test is None:
        update = {key: path for key, path in update.items() if path is not None}
    return data.model_copy(update=update)


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))
