"""The folder `ensemble/` of a run: the blend, its OOF rows and what its combiner knows.

Takes and gives records and arrays; ensemble.json comes last, so that what it speaks of is there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from experiment.archive import cache_dir
from experiment.errors import RunFolderError
from experiment.files import Files, LocalFiles
from experiment.oof import npy, read_array
from experiment.record_files import read_record, read_text, record_json, to_bytes
from experiment.records import EnsembleRecord

FOLDER = "ensemble"
_RECORD, _TRAJECTORY = f"{FOLDER}/ensemble.json", f"{FOLDER}/trajectory.csv"
_OOF, _COMBINER = f"{FOLDER}/oof.npy", f"{FOLDER}/combiner.safetensors"
_MATRIX = "matrix.safetensors"
_NO_ARRAYS: Mapping[str, NDArray[np.float64]] = MappingProxyType({})


class EnsembleFolder:
    """The blend of one run folder."""

    def __init__(self, files: Files) -> None:
        self._files = files

    def save(
        self,
        record: EnsembleRecord,
        trajectory: str,
        oof: NDArray[np.float16],
        arrays: Mapping[str, NDArray[np.float64]] = _NO_ARRAYS,
    ) -> None:
        """`trajectory` is the text of trajectory.csv, `oof` (N, C) log-probabilities, `arrays` what
        the combiner knows beyond the weights."""
        self._files.write(_TRAJECTORY, to_bytes(trajectory))
        self._files.write(_OOF, npy(oof))
        self.save_combiner(arrays)
        self.update(record)

    def update(self, record: EnsembleRecord) -> None:
        """Write ensemble.json alone."""
        self._files.write(_RECORD, record_json(record))

    def save_combiner(self, arrays: Mapping[str, NDArray[np.float64]]) -> None:
        """No arrays: no file, not even that of an earlier blend."""
        if not arrays:
            self._files.delete(_COMBINER)
            return
        # safetensors writes the memory as it lies, whatever the strides say.
        wide = {name: np.array(a, dtype=np.float64, order="C") for name, a in arrays.items()}
        self._files.write(_COMBINER, save(wide))

    def record(self) -> EnsembleRecord | None:
        """ensemble.json, or None where there is no blend."""
        if not self._files.exists(_RECORD):
            return None
        return read_record(self._files, _RECORD, EnsembleRecord)

    def oof(self) -> NDArray[np.float32]:
        """(N, C) probabilities of the blend on the scored rows."""
        return np.exp(read_array(self._files, _OOF).astype(np.float32))

    def trajectory(self) -> str:
        """The text of trajectory.csv."""
        return read_text(self._files, _TRAJECTORY)

    def matrix_path(self) -> Path:
        """Where the members' derived matrix is: it is memory-mapped, so that the one of a run in an
        object store lies in the user's cache."""
        if isinstance(self._files, LocalFiles):
            return self._files.path / FOLDER / _MATRIX
        name = hashlib.sha256(self._files.root.encode()).hexdigest()[:16]
        return cache_dir() / "matrices" / name / _MATRIX

    def combiner_arrays(self) -> dict[str, NDArray[np.float64]]:
        """What `save_combiner` wrote; RunFolderError where the file is damaged."""
        if not self._files.exists(_COMBINER):
            return {}
        try:
            return load(self._files.read(_COMBINER))
        except (OSError, SafetensorError) as error:
            raise RunFolderError.single(
                f"{self._files.root}/{_COMBINER}",
                f"cannot be read: {error}; `ensemble {self._files.root}` blends again",
            ) from error
