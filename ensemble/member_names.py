"""What a member is called in messages, tables and wishes.

Takes a member, gives its name; says whether a wish (`ensemble.exclude`, `ensemble.include`) means
it.
"""

from __future__ import annotations

from posixpath import basename

from ensemble.pool import Member


def member_name(member: Member) -> str:
    """`c0007 ema`, of a further run folder `c0007 ema of runs/other`."""
    return f"{_own_name(member)} of {member.run}" if member.run else _own_name(member)


def is_named(member: Member, name: str) -> bool:
    """Whether a wish means it: `c0007`, `c0007 ema` or a backbone, of every run folder; with
    `RUN:` before, only of the folder with that path or last name; with `:` alone, of the run that
    is blended."""
    names = (member.candidate, _own_name(member), member.backbone)
    if name in names:
        return True
    run, colon, rest = name.rpartition(":")
    folder = run.rstrip("/") if len(run) > 1 else run
    runs = (member.run.rstrip("/"), basename(member.run.rstrip("/")))
    return bool(colon and rest) and rest in names and folder in runs


def _own_name(member: Member) -> str:
    return f"{member.candidate} {member.variant}"
