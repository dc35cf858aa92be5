"""Where the data of a config lie, also after they have moved; what names of files tell of them."""

from __future__ import annotations

import os.path
import re
from pathlib import Path, PurePath

from foldrace.config.schema import DataConfig
from foldrace.dataset.tables import OWN_TABLES

_TRUTH = ("label", "truth", "solution", "answer", "hidden")
"""Words in the name of a table that holds the test images' true classes."""
_SPLITS = ("train", "test", "val")

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


def split_of(name: str) -> str | None:
    """The split that a file or folder is named after, or None."""
    words = re.split("[^a-z]+", name.casefold())
    found = (s for s in _SPLITS if any(w == s or (len(w) > 4 and w.startswith(s)) for w in words))
    return next(found, None)


def title(path: Path) -> str:
    """The name that says what a table is about: of a folder's own table the folder's."""
    return path.parent.name if path.name in OWN_TABLES else path.stem


def is_sample(path: Path) -> bool:
    """True for the name of a sample submission."""
    return any(word in path.stem.casefold() for word in ("sample", "submission"))


def of_test(path: Path) -> bool:
    """True for the name of a table of test images."""
    return split_of(title(path)) == "test"


def is_truth(path: Path) -> bool:
    """True for the name of a table that holds true classes."""
    return any(word in path.stem.casefold() for word in _TRUTH)
