"""Arrays of a run folder: `.npy` files without pickle, and a candidate's folds put together.

Takes files and names, gives arrays; checks that each scored row is there once before anyone blends
them.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from experiment.errors import RunFolderError
from experiment.files import Files


def npy(array: NDArray[np.generic]) -> bytes:
    """The bytes of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def read_array(files: Files, name: str) -> NDArray[np.float32]:
    """RunFolderError where the file is missing or damaged."""
    try:
        data = io.BytesIO(files.read(name))
        array: NDArray[np.float32] = np.lib.format.read_array(data, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise RunFolderError.single(f"{files.root}/{name}", f"cannot be read: {error}") from error
    return array


def pooled(
    files: Files, folders: Sequence[str], name: str, expected: NDArray[np.int64]
) -> NDArray[np.float32]:
    """The arrays `name` of the fold trials' folders in the order of the `expected` rows;
    RunFolderError unless each of these is there once."""
    row_parts = [read_array(files, f"{folder}/rows.npy") for folder in folders]
    parts = [read_array(files, f"{folder}/{name}") for folder in folders]
    rows = np.concatenate(row_parts)
    order = np.argsort(rows, kind="stable")
    fits = all(len(r) == len(p) for r, p in zip(row_parts, parts, strict=True))
    if not fits or not np.array_equal(rows[order], expected):
        missing = np.setdiff1d(expected, rows)[:5].tolist()
        candidate = folders[0].rpartition("/")[0]
        raise RunFolderError.single(
            f"{files.root}/{candidate}/*/{name}",
            f"does not hold each scored row once ({sum(map(len, parts))} rows for "
            f"{len(expected)}, missing for example {missing}); delete the candidate's folder "
            "and resume",
        )
    return np.concatenate(parts)[order]
