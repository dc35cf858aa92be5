"""The derived matrix: every member's checked, calibrated true-class probabilities, side by side.

Takes a run folder and the sources of its members; gives their `MemberRows`, memory-mapped. The file
behind them may be deleted at any time; members whose files have not changed are not read again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foldrace.core.errors import Problem, RunFolderError
from foldrace.core.files import LocalFiles
from foldrace.ensemble.pool import Member, MemberRows, cross_fit_parts
from foldrace.ensemble.selection.matrix_file import (
    Column,
    Entry,
    MatrixFile,
    MatrixWriter,
    read_matrix,
)
from foldrace.ensemble.selection.members import OofSource
from foldrace.ensemble.selection.validation import ScoredRows, violations
from foldrace.ensemble.temperature import part_temperatures, true_prob_at
from foldrace.run_folder.store import RunStore

_VERSION = 1
"""Of what is stored: to be raised when gate, calibration or columns change."""
_BLOCK = 64
"""Members whose columns are in memory at a time."""
_REQUESTS = 16
"""Members read at a time from an object store: it answers slowly, but many."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """The members that a blend may choose from."""

    rows: MemberRows
    """Each set of probabilities once, in the order of the members."""
    duplicates: tuple[tuple[Member, ...], ...]
    """Members with the same OOF probabilities: the first of each is in `rows`, the others not."""


@dataclass(frozen=True, eq=False)
class _Sides:
    """The rows of all members and how they are split."""

    scored: ScoredRows
    parts: NDArray[np.int64]  # (N,) 0..K-1
    calibrate: bool

    @property
    def count(self) -> int:
        """All rows and those outside each part."""
        return 2 + int(self.parts.max())

    @property
    def key(self) -> str:
        """Differs wherever a stored number could."""
        shape = (_VERSION, len(self.scored.rows), len(self.scored.classes), self.count)
        key = hashlib.blake2b(repr(shape).encode(), digest_size=16)
        key.update(self.scored.labels.tobytes())
        key.update(self.parts.tobytes())
        return key.hexdigest()


@dataclass(frozen=True, eq=False)
class _Read:
    """A source after the gate; a column only where nothing is wrong."""

    problems: tuple[Problem, ...] = ()
    digest: str = ""
    column: Column | None = None


def open_matrix(store: RunStore, sources: Sequence[OofSource], calibrate: bool = True) -> Matrix:
    """The matrix of these sources, at least one, on the scored rows of `store`.

    With `calibrate`, the temperatures are fitted; else they are 1. Raises RunFolderError with every
    violation of every source before anything is written.
    """
    ordered = sorted(sources, key=lambda source: source.member.rank)
    scored = ScoredRows.of(store)
    sides = _Sides(scored, _parts(store, scored), calibrate)
    path = store.blend.matrix_path()
    file = read_matrix(path, sides.key)
    if file is None or not _is_of(file, ordered, sides):
        try:
            file = _build(store, ordered, sides, file)
        except OSError as error:
            message = f"cannot be written: {error}; the folder needs room and write access"
            raise RunFolderError.single(str(path), message) from error
    return _matrix(file, ordered, sides)


def _parts(store: RunStore, scored: ScoredRows) -> NDArray[np.int64]:
    """RunFolderError where the rows cannot be split."""
    if len(scored.rows) < 2:
        raise RunFolderError.single(
            f"{store.root}/folds.csv",
            f"{len(scored.rows)} of {len(scored.table.fold)} rows are scored by a fold trial, a "
            "blend needs at least 2, to cross-fit it; start a run with more rows, or with a larger "
            "folds.valid_fraction where folds.k is 1",
        )
    return cross_fit_parts(scored.fold)


def _is_of(file: MatrixFile, sources: Sequence[OofSource], sides: _Sides) -> bool:
    held = [(entry.member, entry.fingerprint) for entry in file.entries]
    wanted = [(source.member, source.fingerprint) for source in sources]
    return held == wanted and _has_sides(file, sides)


def _has_sides(file: MatrixFile, sides: _Sides) -> bool:
    return len(file.calibrated) > 0 or not sides.calibrate


def _build(
    store: RunStore, sources: Sequence[OofSource], sides: _Sides, old: MatrixFile | None
) -> MatrixFile:
    """Every source through the gate into a new file, in order."""
    entries: list[Entry] = []
    problems: list[Problem] = []
    slots: dict[str, int] = {}
    to_come = [Entry(source.member, source.fingerprint, "", 0) for source in sources]
    n_sides = sides.count if sides.calibrate else 0
    with MatrixWriter(
        store.blend.matrix_path(), sides.key, to_come, len(sides.parts), n_sides
    ) as writer:
        for source, read in _all_read(store, sources, sides, old):
            problems += read.problems
            if problems or read.column is None:
                continue
            if read.digest not in slots:
                slots[read.digest] = writer.append(read.column)
            entries.append(
                Entry(source.member, source.fingerprint, read.digest, slots[read.digest])
            )
        if problems:  # variants share rows.npy
            raise RunFolderError(list(dict.fromkeys(problems)))
        return writer.finish(entries)


def _all_read(
    store: RunStore, sources: Sequence[OofSource], sides: _Sides, old: MatrixFile | None
) -> Iterator[tuple[OofSource, _Read]]:
    """In order; several at a time."""
    known = _known(old, sides)
    local = isinstance(store.files, LocalFiles)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if local else _REQUESTS) as threads:
        for start in range(0, len(sources), _BLOCK):
            block = sources[start : start + _BLOCK]
            yield from zip(block, threads.map(lambda s: _read(s, sides, known), block), strict=True)


def _known(old: MatrixFile | None, sides: _Sides) -> dict[tuple[Member, str], _Read]:
    """(member, fingerprint) -> what needs not be read again."""
    if old is None or not _has_sides(old, sides):
        return {}
    return {
        (e.member, e.fingerprint): _Read(digest=e.digest, column=old.column(e.slot))
        for e in old.entries
    }


def _read(source: OofSource, sides: _Sides, known: Mapping[tuple[Member, str], _Read]) -> _Read:
    found = known.get((source.member, source.fingerprint))
    if found is not None:
        return found
    unreadable: list[Problem] = []
    log_prob, true_prob = (_or_told(a, unreadable) for a in (source.log_prob, source.true_prob))
    if log_prob is None or true_prob is None:
        return _Read(tuple(unreadable))
    problems = violations(source, log_prob, true_prob, sides.scored)
    if problems:
        return _Read(tuple(problems))
    digest = hashlib.blake2b(np.ascontiguousarray(log_prob).data, digest_size=16).hexdigest()
    return _Read(digest=digest, column=_column(log_prob, true_prob, sides))


def _or_told(
    read: Callable[[], NDArray[np.float32]], problems: list[Problem]
) -> NDArray[np.float32] | None:
    """None where the array cannot be read: `problems` has why."""
    try:
        return read()
    except RunFolderError as error:
        problems += error.problems
        return None


def _column(log_prob: NDArray[np.float32], true_prob: NDArray[np.float32], sides: _Sides) -> Column:
    labels = sides.scored.labels
    if not sides.calibrate:
        return Column(true_prob, np.empty((0, len(labels)), np.float32), np.empty(0))
    temperatures = part_temperatures(log_prob, labels, sides.parts)
    calibrated = np.stack([true_prob_at(log_prob, labels, float(t)) for t in temperatures])
    return Column(true_prob, calibrated, temperatures)


def _matrix(file: MatrixFile, sources: Sequence[OofSource], sides: _Sides) -> Matrix:
    same: list[list[int]] = [[] for _ in file.raw]
    for i, entry in enumerate(file.entries):
        same[entry.slot].append(i)
    firsts = [sources[group[0]] for group in same]
    shape = (sides.count, *file.raw.shape)
    rows = MemberRows(
        members=tuple(source.member for source in firsts),
        labels=sides.scored.labels,
        parts=sides.parts,
        n_classes=len(sides.scored.classes),
        temperatures=file.temperatures if sides.calibrate else np.ones(shape[:2]),
        raw=file.raw,
        calibrated=file.calibrated if sides.calibrate else np.broadcast_to(file.raw, shape),
        read=lambda member: firsts[member].log_prob(),
    )
    groups = [tuple(sources[i].member for i in group) for group in same if len(group) > 1]
    return Matrix(rows, tuple(groups))
