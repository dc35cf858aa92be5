"""The derived matrix: every member's checked, calibrated true-class probabilities, side by side.

Takes a run folder and the sources of its members; gives their `MemberRows`, memory-mapped from the
folder `ensemble/matrix`. That may be deleted at any time; members whose files have not changed are
not read again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foldrace.core.errors import Problem, RunFolderError
from foldrace.core.files import LocalFiles, atomic_folder, remove_abandoned
from foldrace.core.temperature import part_temperatures, true_prob_at
from foldrace.ensemble.pool import Member, MemberRows, cross_fit_parts
from foldrace.ensemble.selection.matrix_folder import (
    Column,
    IndexRow,
    MatrixWriter,
    StoredMatrix,
    read_folder,
    read_matrix,
)
from foldrace.ensemble.selection.members import OofSource
from foldrace.ensemble.selection.validation import ScoredRows, violations
from foldrace.run_folder.oof import mean_log_prob
from foldrace.run_folder.store import RunStore

_VERSION = 2
"""Version of what is stored: to be raised when validation, calibration or columns change."""
_BLOCK = 64
"""Members whose columns are in memory at a time."""
_REQUESTS = 16
"""Members read at a time from an object store: it answers slowly, but many."""


@dataclass(frozen=True, eq=False)
class _RowSplit:
    """The rows of all members and how they are split."""

    scored: ScoredRows
    parts: NDArray[np.int64]  # (N,) 0..K-1
    calibrate: bool

    @property
    def sides(self) -> int:
        """Number of sides: all rows and those outside each part."""
        return 2 + int(self.parts.max())

    @property
    def key(self) -> str:
        """Digest that differs wherever a stored number could."""
        shape = (_VERSION, len(self.scored.rows), len(self.scored.classes), self.sides)
        key = hashlib.blake2b(repr(shape).encode(), digest_size=16)
        key.update(self.scored.labels.tobytes())
        key.update(self.parts.tobytes())
        return key.hexdigest()


@dataclass(frozen=True, eq=False)
class _CheckedSource:
    """A source after validation; a column only where nothing is wrong."""

    problems: tuple[Problem, ...] = ()
    digest: str = ""
    column: Column | None = None


def open_matrix(
    store: RunStore, sources: Sequence[OofSource], calibrate: bool = True
) -> MemberRows:
    """The rows of these sources, at least one, on the scored rows of `store`.

    With `calibrate`, the temperatures are fitted; else they are 1. Raises RunFolderError with every
    violation of every source before anything is written.
    """
    ordered = sorted(sources, key=lambda source: source.member.rank)
    scored = ScoredRows.of(store)
    split = _RowSplit(scored, _parts(store, scored), calibrate)
    path = store.blend.matrix_path()
    matrix = read_matrix(path, split.key)
    if matrix is None or not _is_of(matrix, ordered, split):
        try:
            matrix = _build(store, ordered, split, matrix)
        except OSError as error:
            message = f"cannot be written: {error}; the folder needs room and write access"
            raise RunFolderError.single(str(path), message) from error
    return _member_rows(matrix, ordered, split)


def _parts(store: RunStore, scored: ScoredRows) -> NDArray[np.int64]:
    """(N,) the part of each row; RunFolderError where the rows cannot be split."""
    if len(scored.rows) < 2:
        raise RunFolderError.single(
            f"{store.root}/folds.csv",
            f"{len(scored.rows)} of {len(scored.table.fold)} rows are scored by a fold trial, a "
            "blend needs at least 2, to cross-fit it; start a run with more rows, or with a larger "
            "folds.valid_fraction where folds.k is 1",
        )
    return cross_fit_parts(scored.fold, scored.groups)


def _is_of(matrix: StoredMatrix, sources: Sequence[OofSource], split: _RowSplit) -> bool:
    stored = [(row.member, row.fingerprint) for row in matrix.index]
    wanted = [(source.member, source.fingerprint) for source in sources]
    return stored == wanted and _has_sides(matrix, split)


def _has_sides(matrix: StoredMatrix, split: _RowSplit) -> bool:
    return len(matrix.calibrated) > 0 or not split.calibrate


def _member_rows(
    matrix: StoredMatrix, sources: Sequence[OofSource], split: _RowSplit
) -> MemberRows:
    same: list[list[int]] = [[] for _ in matrix.raw]
    for i, row in enumerate(matrix.index):
        same[row.slot].append(i)
    firsts = [sources[group[0]] for group in same]
    shape = (split.sides, *matrix.raw.shape)
    return MemberRows(
        members=tuple(source.member for source in firsts),
        labels=split.scored.labels,
        parts=split.parts,
        n_classes=len(split.scored.classes),
        temperatures=matrix.temperatures if split.calibrate else np.ones(shape[:2]),
        raw=matrix.raw,
        calibrated=matrix.calibrated if split.calibrate else np.broadcast_to(matrix.raw, shape),
        read=lambda member: firsts[member].log_prob(),
        groups=split.scored.groups,
        duplicates=tuple(
            tuple(sources[i].member for i in group) for group in same if len(group) > 1
        ),
    )


def _build(
    store: RunStore, sources: Sequence[OofSource], split: _RowSplit, old: StoredMatrix | None
) -> StoredMatrix:
    """Validate every source and write the matrix; RunFolderError with all that is wrong."""
    index: list[IndexRow] = []
    problems: list[Problem] = []
    slots: dict[str, int] = {}
    shape = (split.sides if split.calibrate else 0, len(sources), len(split.parts))
    path = store.blend.matrix_path()
    remove_abandoned(path.parent, path.name)
    with atomic_folder(path) as folder:
        with MatrixWriter(folder, shape) as writer:
            for source, found in _all_checked(store, sources, split, old):
                problems += found.problems
                if problems or found.column is None:
                    continue
                if found.digest not in slots:
                    slots[found.digest] = writer.append(found.column)
                slot = slots[found.digest]
                index.append(IndexRow(source.member, source.fingerprint, found.digest, slot))
            if problems:  # variants share rows.npy
                raise RunFolderError(list(dict.fromkeys(problems)))
            writer.finish(split.key, index)
        matrix = read_folder(folder, split.key)
        shutil.rmtree(path, ignore_errors=True)  # makes room; where it is open, it stays readable
    return matrix


def _all_checked(
    store: RunStore, sources: Sequence[OofSource], split: _RowSplit, old: StoredMatrix | None
) -> Iterator[tuple[OofSource, _CheckedSource]]:
    """Each source with what its check gave, in order; several at a time."""
    known = _known(old, split)
    local = isinstance(store.files, LocalFiles)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if local else _REQUESTS) as threads:
        for start in range(0, len(sources), _BLOCK):
            block = sources[start : start + _BLOCK]
            checked = threads.map(lambda source: _checked(source, split, known), block)
            yield from zip(block, checked, strict=True)


def _known(old: StoredMatrix | None, split: _RowSplit) -> dict[tuple[Member, str], _CheckedSource]:
    """(member, fingerprint) -> what needs not be read again."""
    if old is None or not _has_sides(old, split):
        return {}
    return {
        (r.member, r.fingerprint): _CheckedSource(digest=r.digest, column=old.column(r.slot))
        for r in old.index
    }


def _checked(
    source: OofSource, split: _RowSplit, known: Mapping[tuple[Member, str], _CheckedSource]
) -> _CheckedSource:
    found = known.get((source.member, source.fingerprint))
    if found is not None:
        return found
    problems: list[Problem] = []
    repeats = [_arrays(part, split.scored, problems) for part in source.by_repeat or (source,)]
    sound = [pair for pair in repeats if pair is not None]
    if problems or len(sound) < len(repeats):
        return _CheckedSource(tuple(problems))
    log_prob = mean_log_prob([pair[0] for pair in sound])
    true_prob = sound[0][1] if len(sound) == 1 else np.mean([pair[1] for pair in sound], axis=0)
    digest = hashlib.blake2b(np.ascontiguousarray(log_prob).data, digest_size=16).hexdigest()
    return _CheckedSource(digest=digest, column=_calibrated(log_prob, true_prob, split))


def _arrays(
    source: OofSource, scored: ScoredRows, problems: list[Problem]
) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """Log-probabilities (N, C) and true_prob (N,); None with what is wrong in `problems`."""
    log_prob, true_prob = (_array(a, problems) for a in (source.log_prob, source.true_prob))
    if log_prob is None or true_prob is None:
        return None
    found = violations(source, log_prob, true_prob, scored)
    problems += found
    return None if found else (log_prob, true_prob)


def _array(
    read: Callable[[], NDArray[np.float32]], problems: list[Problem]
) -> NDArray[np.float32] | None:
    """The array, or None where it cannot be read: `problems` has why."""
    try:
        return read()
    except RunFolderError as error:
        problems += error.problems
        return None


def _calibrated(
    log_prob: NDArray[np.float32], true_prob: NDArray[np.float32], split: _RowSplit
) -> Column:
    labels = split.scored.labels
    if not split.calibrate:
        return Column(true_prob, np.empty((0, len(labels)), np.float32), np.empty(0))
    temperatures = part_temperatures(log_prob, labels, split.parts)
    calibrated = np.stack([true_prob_at(log_prob, labels, float(t)) for t in temperatures])
    return Column(true_prob, calibrated, temperatures)
