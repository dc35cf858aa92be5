"""The file of the derived matrix: what is known of all members, side by side, memory-mapped.

One safetensors file: `temperatures` float64 (S, M), `raw` float32 (M, N), `calibrated` float32
(S, M, N), with S = 1 + K sides of the cross-fitting or 0 without calibration, and in its metadata
whose columns these are. One file, so that its parts always fit each other; renamed into place
whole, so that whoever has an older one open keeps that.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from foldrace.core.files import ASIDE, aside
from foldrace.ensemble.pool import Member

_ALIGN = 4096
"""The data begin at a multiple of it, in bytes."""
_ABANDONED = 24 * 3600.0
"""Seconds after which an unfinished file is of a killed process."""
_DIGEST_LENGTH = 32
_BYTES = {"F64": 8, "F32": 4}
Number = TypeVar("Number", np.float32, np.float64)


@dataclass(frozen=True)
class Entry:
    """One source: which files its numbers are of, and where they are."""

    member: Member
    fingerprint: str
    digest: str
    """Of its log-probabilities: 32 hex digits; sources with the same share a slot."""
    slot: int


@dataclass(frozen=True, eq=False)
class Column:
    """The numbers of one member."""

    raw: NDArray[np.float32]  # (N,)
    calibrated: NDArray[np.float32]  # (S, N)
    temperatures: NDArray[np.float64]  # (S,)


@dataclass(frozen=True, eq=False)
class MatrixFile:
    """Read-only views of the distinct members' numbers."""

    entries: tuple[Entry, ...]
    """Of all sources, in their order."""
    raw: NDArray[np.float32]  # (M, N)
    calibrated: NDArray[np.float32]  # (S, M, N)
    temperatures: NDArray[np.float64]  # (S, M)

    def column(self, slot: int) -> Column:
        return Column(
            self.raw[slot], self.calibrated[:, slot], np.array(self.temperatures[:, slot])
        )


def read_matrix(path: Path, key: str) -> MatrixFile | None:
    """The matrix of that key; None where there is none, or anything else."""
    try:
        with path.open("rb") as file:
            return _mapped(file, key)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


class MatrixWriter:
    """Writes a matrix aside, member by member, and puts it in its place at the end.

    `sources`: the entries to come, with any slot and digest; their numbers never lie in memory
    together. As a context manager it removes what was not finished.
    """

    def __init__(
        self, path: Path, key: str, sources: Sequence[Entry], n_rows: int, n_sides: int
    ) -> None:
        self._path, self._key = path, key
        self._room, self._n_rows, self._n_sides = len(sources), n_rows, n_sides
        widest = [
            Entry(s.member, s.fingerprint, "0" * _DIGEST_LENGTH, len(sources)) for s in sources
        ]
        header = _header(key, widest, self._room, n_rows, n_sides)
        self._start = -(-(8 + len(header)) // _ALIGN) * _ALIGN
        self._used = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        self._aside = aside(path)
        self._file = self._aside.open("w+b")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):  # a full disk, again, on the last buffer
            self._file.close()
        self._aside.unlink(missing_ok=True)

    def append(self, column: Column) -> int:
        """The slot that it got: 0, 1, ..."""
        slot = self._used
        layout = _layout(self._room, self._n_rows, self._n_sides)
        for side in range(self._n_sides):
            self._write(layout["temperatures"], side, slot, column.temperatures[side])
            self._write(layout["calibrated"], side, slot, column.calibrated[side])
        self._write(layout["raw"], 0, slot, column.raw)
        self._used += 1
        return slot

    def finish(self, entries: Sequence[Entry]) -> MatrixFile:
        """Put the file in its place and map it; `entries` of all sources, in their order."""
        header = _header(self._key, entries, self._room, self._n_rows, self._n_sides)
        length = self._start - 8
        self._file.seek(0)
        self._file.write(length.to_bytes(8, "little") + header.ljust(length))
        self._file.flush()
        size = _size(self._room, self._n_rows, self._n_sides)
        os.truncate(self._file.fileno(), self._start + size)
        os.fsync(self._file.fileno())
        found = _mapped(self._file, self._key)
        os.replace(self._aside, self._path)
        return found

    def _write(self, tensor: _Tensor, side: int, slot: int, values: NDArray[np.floating]) -> None:
        numbers = np.ascontiguousarray(values, dtype=f"<f{_BYTES[tensor.dtype]}")
        place = (side * self._room + slot) * numbers.nbytes
        self._file.seek(self._start + tensor.begin + place)
        self._file.write(numbers.tobytes())


@dataclass(frozen=True)
class _Tensor:
    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def end(self) -> int:
        return self.begin + _BYTES[self.dtype] * math.prod(self.shape)


def _layout(room: int, n_rows: int, n_sides: int) -> dict[str, _Tensor]:
    """Slots that no member took stay at the end of each part: holes of the file."""
    temperatures = _Tensor("F64", (n_sides, room), 0)
    raw = _Tensor("F32", (room, n_rows), temperatures.end)
    calibrated = _Tensor("F32", (n_sides, room, n_rows), raw.end)
    return {"temperatures": temperatures, "raw": raw, "calibrated": calibrated}


def _size(room: int, n_rows: int, n_sides: int) -> int:
    return _layout(room, n_rows, n_sides)["calibrated"].end


def _header(key: str, entries: Sequence[Entry], room: int, n_rows: int, n_sides: int) -> bytes:
    listed = [[*astuple(e.member), e.fingerprint, e.digest, e.slot] for e in entries]
    index = {"key": key, "entries": json.dumps(listed)}
    return json.dumps({"__metadata__": index} | _tensors(room, n_rows, n_sides)).encode()


def _tensors(room: int, n_rows: int, n_sides: int) -> dict[str, object]:
    return {
        name: {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [t.begin, t.end]}
        for name, t in _layout(room, n_rows, n_sides).items()
    }


def _mapped(file: BinaryIO, key: str) -> MatrixFile:
    """Raises one of many errors on any other file."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    total = os.fstat(file.fileno()).st_size
    if not 0 < length <= total - 8:
        raise ValueError("no header")
    header = json.loads(file.read(length))
    n_sides, room, n_rows = header["calibrated"]["shape"]
    index = header.pop("__metadata__")
    if index["key"] != key or header != _tensors(room, n_rows, n_sides):
        raise ValueError("of other rows, or of another version")
    entries = tuple(_entry(row) for row in json.loads(index["entries"]))
    if total != 8 + length + _size(room, n_rows, n_sides) or not _slots_fit(entries, room):
        raise ValueError("torn")
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    layout, start = _layout(room, n_rows, n_sides), 8 + length
    used = 1 + max(entry.slot for entry in entries)
    return MatrixFile(
        entries=entries,
        raw=_view(data, np.float32, layout["raw"], start)[:used],
        calibrated=_view(data, np.float32, layout["calibrated"], start)[:, :used],
        temperatures=_view(data, np.float64, layout["temperatures"], start)[:, :used],
    )


def _view(data: mmap.mmap, kind: type[Number], tensor: _Tensor, start: int) -> NDArray[Number]:
    count = math.prod(tensor.shape)
    return np.frombuffer(data, kind, count, start + tensor.begin).reshape(tensor.shape)


def _entry(row: list[object]) -> Entry:
    *member, fingerprint, digest, slot = row
    if not isinstance(slot, int) or not all(isinstance(v, str) for v in row[:-1]):
        raise ValueError("no entry")
    return Entry(Member(*map(str, member)), str(fingerprint), str(digest), slot)


def _slots_fit(entries: Sequence[Entry], room: int) -> bool:
    """Each slot from 0 on is somebody's."""
    slots = {entry.slot for entry in entries}
    return bool(entries) and len(entries) == room and slots == set(range(len(slots)))


def _remove_abandoned(path: Path) -> None:
    for part in path.parent.glob(f"{ASIDE}*-{path.name}"):
        with suppress(OSError):  # another process removes it too
            if time.time() - part.stat().st_mtime > _ABANDONED:
                part.unlink()
