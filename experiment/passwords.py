"""URLs as they may be shown: a database's URL may hold a password.

Takes URLs, gives text for messages and reports.
"""

from __future__ import annotations

import re

_OF_USER = re.compile(r"(://[^:/]*):.*@", re.DOTALL)
"""Up to the last @, since a password may hold one that is not escaped."""
_IN_QUERY = re.compile(r"([?&]password=)[^&]*", re.IGNORECASE)


def without_password(url: str) -> str:
    """With *** in its place, also where the URL is malformed."""
    return _IN_QUERY.sub(r"\1***", _OF_USER.sub(r"\1:***@", url))


def has_password(url: str) -> bool:
    return without_password(url) != url
