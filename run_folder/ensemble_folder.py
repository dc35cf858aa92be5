"""The folder `ensemble/` of a run: the blend, its OOF rows and its combiner's numbers.

Takes and gives records and arrays. ensemble.json alone decides what the blend is: it is written
after the files that belong to it and holds their digests, so that no reader mixes two blends.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from foldrace.core.errors import Problem, RunFolderError
from foldrace.core.files import Files, LocalFiles, read_record, record_json, to_bytes
from foldrace.dataset.archive import cache_folder
from foldrace.dataset.unpacked import remove_oldest
from foldrace.run_folder.blend_records import EnsembleRecord
from foldrace.run_folder.claims import Claims
from foldrace.run_folder.oof import array_of, npy

FOLDER = "ensemble"
_RECORD, _TRAJECTORY, _OOF = "ensemble.json", "trajectory.csv", "oof.npy"
_COMBINER = "combiner"
_ADDED = "added/"
_MATRIX = "matrix"
_CLAIMS = "logs/blend"
_PATIENCE = 60.0
"""Seconds that a writer waits for another one, which takes one or two."""
_NO_ARRAYS: Mapping[str, NDArray[np.float64]] = MappingProxyType({})


class EnsembleFolder:
    """The files of the blend of one run folder."""

    def __init__(self, files: Files) -> None:
        self._files = files

    @contextmanager
    def only_writer(self) -> Iterator[None]:
        """Be the only process that writes the blend.

        RunFolderError where another one does not end.
        """
        with Claims(self._files, _CLAIMS).hold("ensemble", patience=_PATIENCE):
            yield

    def save(
        self,
        record: EnsembleRecord,
        trajectory: str,
        oof: NDArray[np.float16],
        arrays: Mapping[str, NDArray[np.float64]] = _NO_ARRAYS,
        added: Collection[str] = (),
    ) -> EnsembleRecord:
        """Write a blend; gives the record as written, with the digests of its files.

        `trajectory` is the text of trajectory.csv, `oof` (N, C) log-probabilities, `arrays` what
        the combiner knows beyond the weights, `added` the folders in `added/` that the blend
        needs. Until the record is written, the old blend predicts as before.
        """
        contents = {_TRAJECTORY: to_bytes(trajectory), _OOF: npy(oof)}
        combiner = ""
        if arrays:
            # safetensors writes the memory as it lies, whatever the strides say.
            wide = {name: np.array(a, dtype=np.float64, order="C") for name, a in arrays.items()}
            data = save(wide)
            combiner = f"{_COMBINER}-{_digest(data)}.safetensors"
            contents = {combiner: data} | contents
        digests = {name: _digest(data) for name, data in contents.items()}
        for name in sorted(added):
            file = f"{_ADDED}{name}/added.json"
            digests[file] = _digest(self._files.read(f"{FOLDER}/{file}"))
        for name, data in contents.items():
            self._files.write(f"{FOLDER}/{name}", data)
        written = record.model_copy(update={"combiner": combiner, "digests": digests})
        self._write(written)
        self._remove_other_combiners(combiner)
        return written

    def update(self, record: EnsembleRecord) -> None:
        """Write ensemble.json alone, with more about the blend that is there.

        RunFolderError where another blend has taken its place.
        """
        with self.only_writer():
            there = self.record()
            if there is not None and there.digests != record.digests:
                raise RunFolderError.single(
                    f"{self._files.root}/{FOLDER}/{_RECORD}",
                    "has meanwhile been replaced by another blend: two processes were blending at "
                    "once; "
                    f"`ensemble {self._files.root}` blends again",
                )
            self._write(record)

    def record(self) -> EnsembleRecord | None:
        """The record in ensemble.json, or None where there is no blend."""
        name = f"{FOLDER}/{_RECORD}"
        if not self._files.exists(name):
            return None
        return read_record(self._files, name, EnsembleRecord)

    def oof(self) -> NDArray[np.float32]:
        """Probabilities (N, C) of the blend on the scored rows.

        RunFolderError where the file is damaged, or of another blend.
        """
        try:
            return np.exp(array_of(self._read_checked(_OOF, self.record())).astype(np.float32))
        except ValueError as error:
            raise self._unreadable(_OOF, error) from error

    def trajectory(self) -> str:
        """The text of trajectory.csv; raises as `oof` does."""
        return self._read_checked(_TRAJECTORY, self.record()).decode(errors="surrogateescape")

    def matrix_path(self) -> Path:
        """Path of the members' derived matrix.

        It is memory-mapped, so that the one of a run in an object store lies in the user's cache.
        """
        if isinstance(self._files, LocalFiles):
            return self._files.place(f"{FOLDER}/{_MATRIX}")
        root, key = cache_folder("matrices"), hashlib.sha256(to_bytes(self._files.root)).hexdigest()
        remove_oldest(root, keep=key)
        return root / key / _MATRIX

    def combiner_arrays(self, record: EnsembleRecord) -> dict[str, NDArray[np.float64]]:
        """The combiner's numbers beyond the weights, by name; raises as `oof` does."""
        name = record.combiner
        known = name in record.digests
        if not name or not (known or self._files.exists(f"{FOLDER}/{name}")):
            return {}
        try:
            return load(self._read_checked(name, record))
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise self._unreadable(name, error) from error

    def check_added(self, record: EnsembleRecord) -> None:
        """Raise RunFolderError unless the predictions made elsewhere are those of this blend."""
        problems: list[Problem] = []
        for name in (name for name in record.digests if name.startswith(_ADDED)):
            try:
                self._read_checked(name, record)
            except RunFolderError as error:
                problems += error.problems
        if problems:
            raise RunFolderError(problems)

    def _write(self, record: EnsembleRecord) -> None:
        self._files.write(f"{FOLDER}/{_RECORD}", record_json(record))

    def _remove_other_combiners(self, kept: str) -> None:
        """Remove the combiners of other blends."""
        for name in self._files.names(FOLDER):
            if name.startswith(_COMBINER) and name != kept:
                self._files.delete(f"{FOLDER}/{name}")

    def _read_checked(self, name: str, record: EnsembleRecord | None) -> bytes:
        """The bytes of a file in the folder; RunFolderError where the record has other ones."""
        try:
            data = self._files.read(f"{FOLDER}/{name}")
        except OSError as error:
            raise self._unreadable(name, error) from error
        expected = record.digests.get(name) if record is not None else None
        if expected is not None and _digest(data) != expected:
            raise RunFolderError.single(
                f"{self._files.root}/{FOLDER}/{name}",
                f"does not belong to the blend in {_RECORD}: it is damaged, or a later blend was "
                f"cut off; {self._remedy(name)}",
            )
        return data

    def _unreadable(self, name: str, error: Exception) -> RunFolderError:
        return RunFolderError.single(
            f"{self._files.root}/{FOLDER}/{name}",
            f"cannot be read: {error}; {self._remedy(name)}",
        )

    def _remedy(self, name: str) -> str:
        added = ", with the --add of this member" if name.startswith(_ADDED) else ""
        return f"`ensemble {self._files.root}` blends again{added}"


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
