"""The teachers of a run: soft labels of each fold's training rows, and the proof of who made them.

Takes and gives a `TeacherRecord` and arrays, in `teachers/<digest>/`. A student of fold k may learn
from fold k's array alone, and whether that has seen labels of fold k is told by the record, whose
digest every student's own record has: another fold's or teacher's array is refused by name.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from foldrace.core.errors import Problem, RunFolderError
from foldrace.core.files import Files, read_record, record_json, to_bytes
from foldrace.dataset.folds import FoldTable
from foldrace.run_folder.blend_records import Temperature, Weight
from foldrace.run_folder.oof import array_of, npy
from foldrace.run_folder.records import (
    CandidateId,
    Count,
    Fold,
    PlainName,
    StoredRecord,
    TeacherKind,
    TeacherRef,
)

FOLDER = "teachers"
_RECORD, _IMAGES = "teacher.json", "unlabelled.csv"
_COLUMN = "image_path"
_AGAIN = "`foldrace distill DIR` makes a teacher anew, for further students"


class TeacherModel(StoredRecord):
    """One fold model that took part in a fold's soft labels."""

    candidate: CandidateId
    variant: PlainName
    run: Annotated[str, Field(max_length=4096)] = ""
    """Run folder that holds it; empty for this one."""
    fold: Fold
    """The fold whose labels it was trained without."""
    weight: Weight
    temperature: Temperature
    weights_digest: str
    """SHA-256 of the weights file that was run."""


class FoldTeacher(StoredRecord):
    """The teacher of one fold's students."""

    fold: Fold
    models: Annotated[tuple[TeacherModel, ...], Field(min_length=1)]
    method: str
    """How the models are combined, or why there is nothing to combine."""
    blend_temperature: Temperature
    chosen_on: Count
    """Scored rows by which members, weights and temperatures were chosen: none of the fold's. 0:
    nothing was chosen by labels."""
    rows_digest: str
    """SHA-256 of the numbers of its rows: the fold's training rows, then the unlabelled images."""
    array_digest: str
    """SHA-256 of the file fold<k>.npy."""


class TeacherRecord(StoredRecord):
    """A teacher as a whole, as in `teacher.json`."""

    kind: TeacherKind
    folds_hash: str
    folds: Annotated[tuple[FoldTeacher, ...], Field(min_length=1)]
    unlabelled: Count = 0
    unlabelled_digest: str = ""
    """SHA-256 of unlabelled.csv; empty where there is none."""
    of_test_set: bool = False

    @property
    def digest(self) -> str:
        """Name of the teacher: 31 digits of the SHA-256 of its record, after a `t`.

        Digits alone may be a number to YAML.
        """
        return f"t{hashlib.sha256(record_json(self)).hexdigest()[:31]}"

    @property
    def reference(self) -> TeacherRef:
        """What a student's record says of it."""
        return TeacherRef(
            digest=self.digest,
            kind=self.kind,
            unlabelled=self.unlabelled,
            of_test_set=self.of_test_set,
        )

    @property
    def without_arrays(self) -> TeacherRecord:
        """How it was made: the record without what came out."""
        folds = tuple(f.model_copy(update={"array_digest": ""}) for f in self.folds)
        return self.model_copy(update={"folds": folds})

    def leaks(self) -> Iterator[str]:
        """Say of each fold whose labels its teacher has seen; nothing of an optimistic kind."""
        if self.kind == "best-fold":
            return
        for of_fold in self.folds:
            seen = sorted({model.fold for model in of_fold.models} - {of_fold.fold})
            if seen:
                yield (
                    f"the teacher of fold {of_fold.fold} has models of fold {seen[0]}, which were "
                    f"trained on labels of fold {of_fold.fold}: its students' OOF would leak"
                )


class TeacherFiles:
    """The teachers in one run folder."""

    def __init__(self, files: Files) -> None:
        self._files = files

    def save(
        self,
        record: TeacherRecord,
        arrays: Mapping[int, NDArray[np.float16]],
        images: Sequence[str] = (),
    ) -> TeacherRef:
        """Write a teacher, its record last.

        `arrays`: fold -> (m + u, C) natural-log probabilities of its m training rows and the u
        `images`, which are paths. RunFolderError where the record says that a fold's labels leak.
        """
        digests = {fold: _digest(npy(array)) for fold, array in arrays.items()}
        listed = _images_csv(images) if images else b""
        folds = [f.model_copy(update={"array_digest": digests[f.fold]}) for f in record.folds]
        written = record.model_copy(
            update={"folds": tuple(folds), "unlabelled_digest": _digest(listed) if images else ""}
        )
        folder = f"{FOLDER}/{written.digest}"
        self._require_honest(written, folder)
        for fold, array in arrays.items():
            self._files.write(f"{folder}/{_array_name(fold)}", npy(array))
        if images:
            self._files.write(f"{folder}/{_IMAGES}", listed)
        self._files.write(f"{folder}/{_RECORD}", record_json(written))
        return written.reference

    def find(self, record: TeacherRecord, images: Sequence[str] = ()) -> TeacherRef | None:
        """The teacher that is there and was made alike, whatever its arrays hold; or None."""
        listed = _digest(_images_csv(images)) if images else ""
        wanted = record.model_copy(update={"unlabelled_digest": listed}).without_arrays
        for name in sorted(self._files.names(FOLDER)):
            try:
                found = self.record(name)
            except RunFolderError:  # named where a student needs it
                continue
            if found.without_arrays == wanted:
                return found.reference
        return None

    def record(self, digest: str) -> TeacherRecord:
        """A teacher's record; RunFolderError where it is gone, changed, or leaks."""
        folder = f"{FOLDER}/{digest}"
        where = f"{self._files.root}/{folder}/{_RECORD}"
        if not self._files.exists(f"{folder}/{_RECORD}"):
            message = f"is gone: put a copy back, or leave its students out; {_AGAIN}"
            raise RunFolderError.single(where, message)
        record = read_record(self._files, f"{folder}/{_RECORD}", TeacherRecord)
        if record.digest != digest:
            message = f"has changed since its students' records were written; {_AGAIN}"
            raise RunFolderError.single(where, message)
        self._require_honest(record, folder)
        return record

    def problems(self, digest: str, folds: FoldTable) -> list[Problem]:
        """Everything of a teacher that is not as its record says, or not of these folds."""
        found: list[Problem] = []
        try:
            record = self.record(digest)
        except RunFolderError as error:
            return [*error.problems]
        for fold in range(folds.count):
            try:
                self._bytes(record, fold, folds)
            except RunFolderError as error:
                found += error.problems
        try:
            self.images(digest)
        except RunFolderError as error:
            found += error.problems
        return list(dict.fromkeys(found))

    def log_prob(self, digest: str, fold: int, folds: FoldTable) -> NDArray[np.float16]:
        """(m + u, C) natural-log probabilities of a fold's training rows and unlabelled images.

        RunFolderError where they are not this teacher's, of this fold and of these folds.
        """
        where = f"{self._files.root}/{FOLDER}/{digest}/{_array_name(fold)}"
        record = self.record(digest)
        try:
            array = array_of(self._bytes(record, fold, folds))
        except ValueError as error:
            raise RunFolderError.single(where, f"cannot be read: {error}; {_AGAIN}") from error
        rows = len(folds.training_rows(fold)) + record.unlabelled
        if array.ndim != 2 or len(array) != rows:
            message = f"has the shape {array.shape}, should have {rows} rows; {_AGAIN}"
            raise RunFolderError.single(where, message)
        return array.astype(np.float16)

    def images(self, digest: str) -> tuple[str, ...]:
        """Paths of the unlabelled images; RunFolderError where the list is not the teacher's."""
        record, name = self.record(digest), f"{FOLDER}/{digest}/{_IMAGES}"
        if not record.unlabelled_digest:
            return ()
        data = self._read(name)
        if _digest(data) != record.unlabelled_digest:
            message = f"is not the list that the teacher was made with; {_AGAIN}"
            raise RunFolderError.single(f"{self._files.root}/{name}", message)
        rows = csv.DictReader(io.StringIO(data.decode(errors="surrogateescape")))
        return tuple(row[_COLUMN] for row in rows)

    def _bytes(self, record: TeacherRecord, fold: int, folds: FoldTable) -> bytes:
        folder = f"{self._files.root}/{FOLDER}/{record.digest}"
        if record.folds_hash != folds.hash:
            message = "is of another folds.csv: whose labels it has seen is not known here"
            raise RunFolderError.single(f"{folder}/{_RECORD}", f"{message}; {_AGAIN}")
        own = next((f for f in record.folds if f.fold == fold), None)
        if own is None or own.rows_digest != rows_digest(folds, fold, record.unlabelled):
            message = f"has no soft labels of the training rows of fold {fold}; {_AGAIN}"
            raise RunFolderError.single(f"{folder}/{_RECORD}", message)
        name = f"{FOLDER}/{record.digest}/{_array_name(fold)}"
        data = self._read(name)
        found = _digest(data)
        if found != own.array_digest:
            other = next((f.fold for f in record.folds if f.array_digest == found), None)
            message = (
                "is damaged, or of another teacher"
                if other is None
                else f"is the array of fold {other}, whose teacher has seen labels of fold {fold}"
            )
            where = f"{self._files.root}/{name}"
            raise RunFolderError.single(where, f"{message}; put a copy back, or {_AGAIN}")
        return data

    def _read(self, name: str) -> bytes:
        try:
            return self._files.read(name)
        except OSError as error:
            message = f"cannot be read: {error}; put a copy back, or {_AGAIN}"
            raise RunFolderError.single(f"{self._files.root}/{name}", message) from error

    def _require_honest(self, record: TeacherRecord, folder: str) -> None:
        leaks = [Problem(f"{self._files.root}/{folder}/{_RECORD}", text) for text in record.leaks()]
        if leaks:
            raise RunFolderError(leaks)


def rows_digest(folds: FoldTable, fold: int, unlabelled: int) -> str:
    """SHA-256 of the row numbers that a fold's array has, unlabelled images after all others."""
    extra = len(folds.fold) + np.arange(unlabelled, dtype=np.int64)
    rows = np.concatenate([folds.training_rows(fold), extra]).astype("<i8")
    return _digest(rows.tobytes())


def _array_name(fold: int) -> str:
    return f"fold{fold}.npy"


def _images_csv(images: Sequence[str]) -> bytes:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([_COLUMN])
    writer.writerows([path] for path in images)
    return to_bytes(buffer.getvalue())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
