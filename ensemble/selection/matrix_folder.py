"""The folder of the derived matrix: what is known of all members, side by side, memory-mapped.

`raw.npy` float32 (M, N), `calibrated.npy` float32 (S, M, N) and `temperatures.npy` float64 (S, M),
with S = 1 + K sides of the cross-fitting or 0 without calibration; `index.json` says whose columns
these are. Renamed into place whole, so that a blend that has an older one open keeps that.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foldrace.ensemble.pool import Member

_INDEX = "index.json"
_TYPES = {"raw": np.float32, "calibrated": np.float32, "temperatures": np.float64}
Shape = tuple[int, int, int]
"""(S, M, N) of the calibrated columns."""


@dataclass(frozen=True)
class IndexRow:
    """One source: which files its numbers are of, and where they are."""

    member: Member
    fingerprint: str
    digest: str
    """Digest of its log-probabilities: sources with the same share a slot."""
    slot: int


@dataclass(frozen=True, eq=False)
class Column:
    """The numbers of one member."""

    raw: NDArray[np.float32]  # (N,)
    calibrated: NDArray[np.float32]  # (S, N)
    temperatures: NDArray[np.float64]  # (S,)


@dataclass(frozen=True, eq=False)
class StoredMatrix:
    """Read-only views of the distinct members' numbers."""

    index: tuple[IndexRow, ...]
    """One row per source, in their order."""
    raw: NDArray[np.float32]  # (M, N)
    calibrated: NDArray[np.float32]  # (S, M, N)
    temperatures: NDArray[np.float64]  # (S, M)

    def column(self, slot: int) -> Column:
        """The numbers in a slot."""
        temperatures = np.array(self.temperatures[:, slot])
        return Column(self.raw[slot], self.calibrated[:, slot], temperatures)


def read_matrix(folder: Path, key: str) -> StoredMatrix | None:
    """The matrix of that key; None where there is none, or anything else."""
    try:
        return read_folder(folder, key)
    except Exception:  # damaged files have many ways to fail, and all that is here can be made anew
        return None


def read_folder(folder: Path, key: str) -> StoredMatrix:
    """The matrix of that key; raises one of many errors on any other folder."""
    text = (folder / _INDEX).read_bytes()
    stored = json.loads(text)
    index = tuple(_index_row(*row) for row in stored["rows"])
    n_sides, room, n_rows = stored["shape"]
    slots = {row.slot for row in index}
    used = len(slots)
    if stored["key"] != key or (min(slots), max(slots)) != (0, used - 1) or used > room:
        raise ValueError("of other rows, of another version, or damaged")
    arrays = {
        name: _mapped(folder / f"{name}.npy", np.dtype(_TYPES[name]), size)
        for name, size in _sizes((n_sides, room, n_rows)).items()
    }
    if (folder / _INDEX).read_bytes() != text:
        raise ValueError("another matrix took its place meanwhile")
    return StoredMatrix(
        index,
        raw=arrays["raw"][:used],
        calibrated=arrays["calibrated"][:, :used],
        temperatures=arrays["temperatures"][:, :used],
    )


class MatrixWriter(ExitStack):
    """Writes a matrix into an empty folder, member by member: they never lie in memory together.

    Slots that no member took stay at the end of each part: holes of the files.
    """

    def __init__(self, folder: Path, shape: Shape) -> None:
        super().__init__()
        self._folder, self._shape, self._used = folder, shape, 0
        self._files = {}
        for name, size in _sizes(shape).items():
            path = folder / f"{name}.npy"
            start = np.lib.format.open_memmap(path, "w+", _TYPES[name], size).offset
            # By writes from here on: on a full disk a mapped file would end the process.
            self._files[name] = (self.enter_context(path.open("r+b")), start)

    def append(self, column: Column) -> int:
        """Write a member's numbers; the slot that they got: 0, 1, ..."""
        slot, room = self._used, self._shape[1]
        self._write("raw", slot, column.raw)
        for side in range(self._shape[0]):  # a column may know more
            self._write("calibrated", side * room + slot, column.calibrated[side])
            self._write("temperatures", side * room + slot, column.temperatures[side : side + 1])
        self._used += 1
        return slot

    def finish(self, key: str, index: Sequence[IndexRow]) -> None:
        """Write the index, whose rows are all sources in their order, and all to the disk."""
        rows = [[*astuple(r.member), r.fingerprint, r.digest, r.slot] for r in index]
        stamp = {"key": key, "shape": self._shape, "written": uuid.uuid4().hex, "rows": rows}
        file = self.enter_context((self._folder / _INDEX).open("wb"))
        file.write(json.dumps(stamp).encode())
        for opened in (file, *(array for array, _ in self._files.values())):
            opened.flush()
            os.fsync(opened.fileno())

    def _write(self, name: str, row: int, values: NDArray[Any]) -> None:
        file, start = self._files[name]
        numbers = np.ascontiguousarray(values, dtype=_TYPES[name])
        file.seek(start + row * numbers.nbytes)
        file.write(numbers.data)


def _sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    return {"raw": shape[1:], "calibrated": shape, "temperatures": shape[:2]}


def _mapped(path: Path, dtype: np.dtype[Any], size: tuple[int, ...]) -> NDArray[Any]:
    array = np.lib.format.open_memmap(path, mode="r")
    whole = array.offset + array.nbytes == path.stat().st_size
    if (array.dtype, array.shape) != (dtype, size) or not (whole and array.flags.c_contiguous):
        raise ValueError("torn, or of another form")
    return array.view(np.ndarray)


def _index_row(*row: object) -> IndexRow:
    *member, fingerprint, digest, slot = row
    if not isinstance(slot, int) or not all(isinstance(value, str) for value in row[:-1]):
        raise ValueError("no row of an index")
    return IndexRow(Member(*map(str, member)), str(fingerprint), str(digest), slot)
