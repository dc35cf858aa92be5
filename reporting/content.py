"""The parts of which a section of the report is made: notes, tables and charts, as data.

Sections give lists of them; `templates/parts.html.j2` has a macro for each `kind`.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import ClassVar

from foldrace.reporting.formats import difference, number, percent


@dataclass(frozen=True)
class Number:
    """A cell of a column of numbers."""

    kind: ClassVar = "number"
    shown: str
    value: float | None
    """Number that the column is sorted by; None comes last."""


@dataclass(frozen=True)
class Badge:
    """A cell with a candidate's status and its colour."""

    kind: ClassVar = "badge"
    status: str


Cell = str | Number | Badge


def score(value: float | None, digits: int = 4) -> Number:
    """A cell with a fixed number of decimals."""
    return Number(number(value, digits), value)


def signed(value: float | None) -> Number:
    """A cell with a difference and its sign."""
    return Number(difference(value), value)


def share(value: float) -> Number:
    """A cell with a share of 1 in percent."""
    return Number(percent(value), value)


def count(value: int) -> Number:
    """A cell with a whole number."""
    return Number(f"{value:,}", float(value))


@dataclass(frozen=True)
class Note:
    """A paragraph of small text."""

    kind: ClassVar = "note"
    text: str
    file: str = ""
    """File of the run folder that is linked at the end."""


@dataclass(frozen=True)
class Heading:
    """A heading inside a section."""

    kind: ClassVar = "heading"
    text: str


@dataclass(frozen=True)
class Warnings:
    """Sentences that nobody should miss."""

    kind: ClassVar = "warnings"
    messages: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """Names with their values."""

    kind: ClassVar = "facts"
    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Card:
    """One of the figures to see first."""

    label: str
    figure: str
    remark: str


@dataclass(frozen=True)
class Cards:
    """The figures to see first, side by side."""

    kind: ClassVar = "cards"
    items: tuple[Card, ...]


@dataclass(frozen=True)
class Table:
    """A table in its own scrolling box; a click on a header sorts it."""

    kind: ClassVar = "table"
    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    name: str
    """Name of the box for those who cannot see it."""
    marked: frozenset[int] = frozenset()
    """Indices of the rows to highlight."""

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Columns that hold numbers, judged by the first row."""
        first = self.rows[0] if self.rows else ("",) * len(self.headers)
        return tuple(isinstance(cell, Number) for cell in first)


@dataclass(frozen=True)
class Chart:
    """A picture with its caption, inside the page."""

    kind: ClassVar = "chart"
    png: bytes
    alt: str
    caption: str

    @property
    def source(self) -> str:
        """The picture as a data URL."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


@dataclass(frozen=True)
class Code:
    """Lines to copy."""

    kind: ClassVar = "code"
    text: str


@dataclass(frozen=True)
class Collapsible:
    """Parts hidden until the reader opens them."""

    kind: ClassVar = "collapsible"
    summary: str
    parts: tuple[Part, ...]


Part = Note | Heading | Warnings | Facts | Cards | Table | Chart | Code | Collapsible
