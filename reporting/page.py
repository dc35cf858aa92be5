"""The HTML page around the sections: templates filled with their parts.

Takes titles and parts, gives one self-contained document. Its content security policy forbids
every load from outside and every script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from foldrace.reporting.content import Part
from foldrace.reporting.fonts import font_face


@dataclass(frozen=True)
class Block:
    """A section that has something to show."""

    id: str
    title: str
    parts: Sequence[Part]


def page(name: str, subtitle: str, blocks: Sequence[Block]) -> str:
    """The whole document; whatever comes from the run is escaped."""
    script = _source("report.js")
    return (
        templates()
        .get_template("report.html.j2")
        .render(
            name=name,
            subtitle=subtitle,
            blocks=blocks,
            style=Markup(_source("report.css")),
            script=Markup(script),
            script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            font_face=lambda body: Markup(font_face("Report Hangul", body)),
        )
    )


@lru_cache(maxsize=1)
def templates() -> Environment:
    """The templates of the report, which escape every text."""
    return Environment(
        loader=PackageLoader("foldrace.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_composed,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _composed(value: object) -> object:
    """Hangul composed (NFC): macOS decomposes file names, and few fonts draw that."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return unicodedata.normalize("NFC", value)


def _source(name: str) -> str:
    environment = templates()
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]
