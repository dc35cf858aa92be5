"""Where the data of a config lie, and where they lie after they have moved as a whole."""

from __future__ import annotations

import os.path
from pathlib import PurePath

from foldrace.config.schema import DataConfig

_LISTS = ("exclude", "fixes")


def common_root(data: DataConfig) -> str:
    """The folder that all data of a config lie in; of a single folder, itself."""
    paths = [path for key, path in data.places.items() if key not in _LISTS]
    root = os.path.commonpath(paths)
    # A table or a zip: what it is cannot be asked, since it may be gone.
    return os.path.dirname(root) if root in paths and PurePath(root).suffix else root


def with_root(data: DataConfig, root: str) -> DataConfig:
    """The same data below another folder, in place of their `common_root`.

    Lists of the user's own that lie elsewhere stay where they are.
    """
    old = common_root(data)
    moved = {
        key: os.path.normpath(os.path.join(root, os.path.relpath(path, old)))
        for key, path in data.places.items()
        if key not in _LISTS or PurePath(path).is_relative_to(old)
    }
    return data.model_copy(update=moved)
