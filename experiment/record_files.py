"""Texts and records as files of a run folder.

Takes files and names, gives texts and validated records; what cannot be read is a RunFolderError
that names the file.
"""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from experiment.errors import RunFolderError
from experiment.files import Files

Record = TypeVar("Record", bound=BaseModel)


def to_bytes(text: str) -> bytes:
    """UTF-8; a Linux file name may hold bytes that are not, which Python keeps as surrogates."""
    return text.encode(errors="surrogateescape")


def read_text(files: Files, name: str) -> str:
    """The inverse of `to_bytes`."""
    try:
        return files.read(name).decode(errors="surrogateescape")
    except OSError as error:
        raise RunFolderError.single(f"{files.root}/{name}", f"cannot be read: {error}") from error


def record_json(record: BaseModel) -> bytes:
    return record.model_dump_json(indent=1).encode()


def read_record(files: Files, name: str, kind: type[Record]) -> Record:
    """RunFolderError where the file holds no such record."""
    try:
        return kind.model_validate_json(files.read(name))
    except (OSError, ValidationError) as error:
        raise RunFolderError.single(f"{files.root}/{name}", f"is damaged: {error}") from error
