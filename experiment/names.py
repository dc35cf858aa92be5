"""Names that people mistype: the nearest allowed ones, and the problem that tells them.

Takes a name and a table, gives a `Problem` or nothing. Imports nothing heavy: the blend uses it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from experiment.errors import Problem


def closest(name: str, allowed: Iterable[str], n: int = 3) -> list[str]:
    """The names in `allowed` that `name` is probably a misspelling of, best first."""
    return difflib.get_close_matches(name, list(allowed), n=n, cutoff=0.6)


def check_name(where: str, name: str, table: Iterable[str]) -> Problem | None:
    """A problem with the nearest names where the table has no row `name`."""
    names = list(table)
    if name in names:
        return None
    near = closest(name, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return Problem(where, f"got {name!r}; {hint}allowed: {', '.join(names)}")
