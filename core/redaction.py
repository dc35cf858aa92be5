"""Texts without the passwords and keys in their URLs.

What is shown of a URL is a list of what is allowed: its scheme, host, port and path, and the query
values that only say where a store is. All user information and every other query value is `***`.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

HARMLESS = ("endpoint_override", "scheme", "region")
"""Keys of a URL's query whose values are shown."""

_USER = re.compile(r"(?<=://)(?:.*:.*@|[^/]*@)", re.DOTALL)
"""Up to the last @ where there is a colon before it, since a password may hold / and @."""
_USER_WITHOUT_SCHEME = re.compile(r"^.*:.*@", re.DOTALL)
_QUERY_VALUE = re.compile(r"[?&;][^?&;=]*=")
_QUERY_ITEM = re.compile(r"([?&;])([^?&;]*)")
_NAMED = re.compile(
    r"""(\b\w*(?:pass|passwd|password|pwd|secret|secret_key|token)\s*=\s*)[^\s&;,'"]+""",
    re.IGNORECASE,
)
"""`password=x` that is in no URL."""
_WORD = re.compile(r"""(["'(\[<]*)(\S+?)(["')\]>,.;:]*)(?=\s|$)""")
_PASSWORD_WITH_BLANK = re.compile(r"""(?<=://)[^\s:/@]*:(?!\d+(?:[/?\s"',;.)]|$))[^@\n]*@""")


def without_secrets(value: str) -> str:
    """A value that is a URL, or was meant to be one, without its secrets.

    Other values come back as they are, unless they have a colon before an @.
    """
    if "://" in value:
        shown = _without_user(_USER, value)
        is_url = True
    else:
        shown = _without_user(_USER_WITHOUT_SCHEME, value)
        is_url = shown != value or re.search(r"\?[^?&;=\s]+=", value) is not None
    return _NAMED.sub(r"\1***", _QUERY_ITEM.sub(_item, shown) if is_url else shown)


def _without_user(user: re.Pattern[str], value: str) -> str:
    """The value without user and password; where they hold a query, without what follows, too.

    An @ in a query's value may end a password or stand in a key: nothing tells which.
    """
    shown = user.sub("***@", value)
    if any(_QUERY_VALUE.search(found[0]) for found in user.finditer(value)):
        return f"{shown[: shown.rindex('@')]}@***"
    return shown


def has_secret(value: str) -> bool:
    """True where the value holds what may be a password or key; a user's name alone is none."""
    nameless = re.sub(r"(?<=://)[^/@:]*@", "", value)
    return without_secrets(nameless) != nameless


def holds_key(url: str) -> bool:
    """True where a URL names a password or key before its host or in its query."""
    return has_secret(url.partition("?")[0]) or _NAMED.search(unquote(url)) is not None


def starred(text: str) -> str:
    """A message, a log line or a traceback without the secrets of the URLs in it."""
    if not re.search(r"[@?=]", text):
        return text
    shown = _PASSWORD_WITH_BLANK.sub("***@", text)
    return _NAMED.sub(
        r"\1***", _WORD.sub(lambda word: word[1] + without_secrets(word[2]) + word[3], shown)
    )


def _item(found: re.Match[str]) -> str:
    key, equals, _ = found[2].partition("=")
    if not found[2] or (equals and unquote(key).lower() in HARMLESS):
        return found[0]
    return f"{found[1]}{key}=***" if equals else f"{found[1]}***"
