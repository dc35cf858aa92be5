"""What the pixel cache knows of a list of image paths: the entry that it led to, or that there was
no room for one.

Takes a record file and a session, gives the entry that the session found before. Sessions are those
of `open_images`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from trainables.cache_entry import VERSION, Layout, StoredImages
from trainables.cache_room import find_entry

_SESSIONS = 16  # that share a list of files at the same time


class Refused(Exception):
    """There is no room for these images, now or earlier in the session."""


@dataclass(frozen=True)
class Known:
    """Where a list of paths led to."""

    key: str = ""
    """Of the entry; empty where there never was one."""
    state: str = ""
    """Of the files when they were last compared with it (`Scan.state`)."""
    sessions: tuple[str, ...] = ()
    """Those that found them so."""
    refused: dict[str, str] = field(default_factory=dict)
    """Session -> why there was no room, since then."""


def list_hash(files: Sequence[Path], layout: Layout) -> str:
    """The name of the list's record."""
    paths = [str(file) if file.is_absolute() else os.path.abspath(file) for file in files]
    listed = json.dumps([VERSION, layout.side, layout.format, paths])
    return hashlib.sha256(listed.encode()).hexdigest()[:32]


def of_session(record: Path, session: str | None) -> StoredImages | None:
    """The entry that was compared with the files in this session, where it is still there. Raises
    Refused where the session found no room."""
    known = None if session is None else read_known(record)
    if known is None or session is None:
        return None
    if session in known.refused:
        raise Refused(known.refused[session])
    return find_entry(record.parent / known.key) if session in known.sessions else None


def seen(known: Known | None, now: Known, session: str | None) -> Known:
    """`now`, with the sessions that found the files in the same state before. Those that found no
    room may look again."""
    same = known is not None and known.state == now.state
    sessions = (*(known.sessions if known and same else ()), *([session] if session else []))
    return replace(now, sessions=sessions[-_SESSIONS:])


def refused(known: Known | None, session: str | None, reason: str) -> Known:
    """What was known, and that the session found no room."""
    known = known or Known()
    if session is None:
        return known
    all_refused = [*known.refused.items(), (session, reason)]
    return replace(known, refused=dict(all_refused[-_SESSIONS:]))


def read_known(record: Path) -> Known | None:
    try:
        return Known(**json.loads(record.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def write_known(record: Path, known: Known) -> None:
    """Whole or not at all; called with the list's lock."""
    aside = record.with_suffix(".tmp")
    aside.write_text(json.dumps(asdict(known)), encoding="utf-8")
    aside.replace(record)
