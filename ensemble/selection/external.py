"""Predictions made elsewhere as members: `ensemble DIR --add NAME=oof.csv[:test.csv]`.

Takes the option's values and a run, gives the members' OOF sources; once a blend has them, keeps
what the files hold in `ensemble/added/NAME/`, and gives the test predictions when it predicts.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from foldrace.core.errors import ConfigError, DataError, Problem, RunFolderError
from foldrace.core.metrics import normalise
from foldrace.core.opening import open_regular
from foldrace.dataset.predictions_file import MOST_BYTES, SUFFIXES, ExpectedRows, read_predictions
from foldrace.dataset.tables import clean, twice
from foldrace.dataset.test_set import ImageSet
from foldrace.ensemble.pool import Member
from foldrace.ensemble.selection.members import OofSource
from foldrace.run_folder.oof import npy, read_array
from foldrace.run_folder.store import RunStore

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_CANDIDATE = re.compile(r"c\d+")
_FORM = f"NAME=oof.csv[:test.csv] or NAME=:test.csv, each file a {' or '.join(SUFFIXES)}"


@dataclass(frozen=True)
class AddSpec:
    """One `--add`; at least one of the two files is given."""

    name: str
    oof: Path | None
    test: Path | None


def parse_adds(texts: Sequence[str]) -> tuple[AddSpec, ...]:
    """The values of every `--add`; ConfigError with all that is wrong in them."""
    problems: list[Problem] = []
    specs = tuple(_parse(text, problems) for text in texts)
    for name in twice(spec.name for spec in specs):
        problems.append(Problem("--add", f"the name {name!r} is there twice; give each its own"))
    if problems:
        raise ConfigError(problems)
    return specs


def _parse(text: str, problems: list[Problem]) -> AddSpec:
    """One value, as far as it can be read; what is wrong with it joins `problems`."""
    name, equals, files = text.partition("=")
    oof, *further = files.split(":")
    test = further[0] if further else ""
    for message in _faults(name, oof, test, bool(equals), len(further)):
        problems.append(Problem(f"--add {text}", f"{message}; needed: {_FORM}"))
    return AddSpec(name, _path(oof), _path(test))


def _faults(name: str, oof: str, test: str, equals: bool, colons: int) -> list[str]:
    if not equals:
        return ["has no ="]
    found = []
    if not _NAME.fullmatch(name):
        found.append(
            f"the name {name!r} is not 1 to 64 of A-Z a-z 0-9 . _ - (first a letter or digit)"
        )
    if _CANDIDATE.fullmatch(name):
        found.append(f"the name {name!r} is that of a candidate of the run")
    if colons > 1:
        found.append(
            f"has {colons} colons: one separates the two files, and paths must not contain any"
        )
    if not oof and not test:
        found.append("names no file")
    kinds = [file for file in (oof, test) if file and Path(file).suffix.lower() not in SUFFIXES]
    return [*found, *(f"{file} is neither {' nor '.join(SUFFIXES)}" for file in kinds)]


def _path(text: str) -> Path | None:
    return Path(os.path.expanduser(text)) if text else None


VARIANT = "added"
"""The variant of every added member: no trial's variant has this name."""

_FOLDER = "ensemble/added"


class AddedRecord(BaseModel):
    """`added.json`: where a member's arrays come from.

    Written last, so that a folder with it is whole.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    unvalidated: bool
    folds_hash: str
    oof_file: str | None = None
    oof_sha256: str | None = None
    test_file: str | None = None
    test_sha256: str | None = None
    test_ids_hash: str | None = None


@dataclass(frozen=True, eq=False)
class AddedMember:
    """One `--add`, checked and in memory."""

    record: AddedRecord
    log_prob: NDArray[np.float32] | None
    """(N, C) natural-log OOF probabilities: float32, where a trial's are float16, for these are few
    and nobody has the softmax of them. None: test predictions alone."""
    true_prob: NDArray[np.float32] | None
    """(N,) OOF probability of the true class."""
    test: NDArray[np.float32] | None
    """(n_test, C) probabilities in the order of the test set."""


@dataclass(frozen=True, eq=False)
class AddedPredictions:
    """The predictions that all `--add` together brought in, in the order given."""

    members: tuple[AddedMember, ...]

    @property
    def sources(self) -> tuple[OofSource, ...]:
        """Sources of the members with OOF predictions."""
        return tuple(
            _source(one.record, one.log_prob, one.true_prob)
            for one in self.members
            if one.log_prob is not None and one.true_prob is not None
        )

    @property
    def unvalidated(self) -> tuple[str, ...]:
        """Names of the members with test predictions alone."""
        return tuple(one.record.name for one in self.members if one.record.unvalidated)


NOTHING_ADDED = AddedPredictions(())


def add_sources(
    store: RunStore, specs: Sequence[AddSpec], test: ImageSet | None
) -> AddedPredictions:
    """Read and check all files; the run folder stays as it is.

    Its blend may have a member of the same name. `test` is the run's test set, None where it has
    none. Raises DataError with every problem of every file.
    """
    problems: list[Problem] = []
    members = [_read(store, spec, test, problems) for spec in specs]
    if problems:
        raise DataError(problems)
    return AddedPredictions(tuple(members))


def save_added(store: RunStore, added: AddedPredictions, names: Collection[str]) -> None:
    """Write `ensemble/added/NAME/` of the members with these names.

    To be called right before the blend that has them is written.
    """
    for one in added.members:
        if one.record.name in names:
            _write(store, one)


def added_test(store: RunStore, name: str, test_ids: Sequence[str]) -> NDArray[np.float32]:
    """(n, C) probabilities of an added member for these test images, in their order.

    Raises RunFolderError where it has none, or has those of other images.
    """
    record = added_record(store, name)
    again = f"ensemble --add {name}=oof.csv:test.csv"
    if record.test_file is None:
        raise RunFolderError.single(
            store.root, f"{name} was added without test predictions: {again}"
        )
    if record.test_ids_hash != _ids_hash(test_ids):
        message = (
            f"the test predictions of {name} are of other images, or of another order, than the "
            f"test set now ({len(test_ids)} images): {again}"
        )
        raise RunFolderError.single(store.root, message)
    return read_array(store.files, f"{_FOLDER}/{name}/test.npy")


def added_oof(store: RunStore, name: str) -> NDArray[np.float32]:
    """(N, C) natural-log probabilities of an added member on `scored_rows`; errors as above."""
    added_record(store, name)
    return read_array(store.files, f"{_FOLDER}/{name}/oof.npy").astype(np.float32)


def added_record(store: RunStore, name: str) -> AddedRecord:
    """The origin of an added member; RunFolderError where it is not in the run folder."""
    file = f"{_FOLDER}/{name}/added.json"
    try:
        return AddedRecord.model_validate_json(store.files.read(file))
    except (OSError, ValidationError) as error:
        message = f"cannot be read: {error}; add the member again: ensemble --add {name}=..."
        raise RunFolderError.single(f"{store.root}/{file}", message) from error


def keep_only(store: RunStore, names: Collection[str]) -> None:
    """Remove the added members that a new blend has not: call it once that blend is written."""
    for name in store.files.names(_FOLDER):
        if name not in names:
            store.files.delete(f"{_FOLDER}/{name}")


def _read(
    store: RunStore, spec: AddSpec, test: ImageSet | None, problems: list[Problem]
) -> AddedMember:
    oof = tested = None
    if spec.oof is not None:
        oof = read_predictions(spec.oof, _scored(store), problems)
    if spec.test is not None and test is None:
        message = f"{spec.test} holds test predictions, but the run has no test set (data.test)"
        problems.append(Problem(f"--add {spec.name}", f"{message}; leave that file out"))
    if spec.test is not None and test is not None:
        tested = read_predictions(spec.test, _tested(store, test), problems)
    log_prob = true_prob = None
    if oof is not None:
        prob = normalise(oof)
        log_prob = np.log(prob).astype(np.float32)
        true_prob = prob[np.arange(len(prob)), store.labels()[store.scored_rows()]]
    return AddedMember(
        record=_record(store, spec, test),
        log_prob=log_prob,
        true_prob=None if true_prob is None else true_prob.astype(np.float32),
        test=None if tested is None else tested.astype(np.float32),
    )


def _scored(store: RunStore) -> ExpectedRows:
    paths = store.folds().image_paths
    return ExpectedRows(
        kind="scored row",
        ids=tuple(paths[row] for row in store.scored_rows()),
        id_columns=(store.config().data.image_column, "image_path", "id"),
        order="the rows of folds.csv whose fold is not negative",
        classes=store.classes(),
    )


def _tested(store: RunStore, test: ImageSet) -> ExpectedRows:
    data = store.config().data
    return ExpectedRows(
        kind="test image",
        ids=test.ids,
        id_columns=(test.id_column, "id", data.test_image_column or data.image_column),
        order="the submission's ids",
        classes=store.classes(),
    )


def _write(store: RunStore, member: AddedMember) -> None:
    """The old folder goes first: its record must not speak for new arrays."""
    folder = f"{_FOLDER}/{member.record.name}"
    store.files.delete(folder)
    arrays = {"oof": member.log_prob, "true_prob": member.true_prob, "test": member.test}
    for name, array in arrays.items():
        if array is not None:
            store.files.write(f"{folder}/{name}.npy", npy(array))
    store.files.write(f"{folder}/added.json", member.record.model_dump_json(indent=1).encode())


def _record(store: RunStore, spec: AddSpec, test: ImageSet | None) -> AddedRecord:
    return AddedRecord(
        name=spec.name,
        unvalidated=spec.oof is None,
        folds_hash=store.folds().hash,
        oof_file=None if spec.oof is None else str(spec.oof),
        oof_sha256=_sha256(spec.oof),
        test_file=None if spec.test is None else str(spec.test),
        test_sha256=_sha256(spec.test),
        test_ids_hash=None if spec.test is None or test is None else _ids_hash(test.ids),
    )


def _source(
    record: AddedRecord, log_prob: NDArray[np.float32], true_prob: NDArray[np.float32]
) -> OofSource:
    return OofSource(
        member=Member(record.name, VARIANT),
        where=str(record.oof_file),
        fingerprint=f"{record.oof_sha256} {record.folds_hash}",
        log_prob=lambda: log_prob,
        true_prob=lambda: true_prob,
    )


def _sha256(path: Path | None) -> str | None:
    """Digest of a file; None where there is none, which `read_predictions` reports."""
    if path is None:
        return None
    try:
        with open_regular(path, MOST_BYTES) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _ids_hash(ids: Sequence[str]) -> str:
    """Digest of the test ids in their order, as compared."""
    return hashlib.sha256(json.dumps([clean(name) for name in ids]).encode()).hexdigest()
