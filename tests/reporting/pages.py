"""The report as a reader sees it: tables, links and words of an HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from html.parser import HTMLParser

from foldrace.reporting.content import Part
from foldrace.reporting.page import templates

_VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Fails on unbalanced tags and unreadable numbers; keeps tables, attributes and text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.loads: list[str] = []
        self.scripts = 0
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "action")]
        assert not [k for k, _ in attrs if k.startswith("on")]
        assert all(float(v or "") == float(v or "") for k, v in attrs if k == "data-value")
        if tag not in _VOID:
            self.open.append(tag)
        self.scripts += tag == "script"
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def html_of(parts: Sequence[Part]) -> str:
    """The parts of one section as the page shows them."""
    module = templates().get_template("parts.html.j2").module
    return str(module.parts(parts)).strip()  # type: ignore[attr-defined,unused-ignore]


def table_of(document: str, header: str) -> list[dict[str, str]]:
    """The first table with that column."""
    found = next(t for t in Page(document).tables if header in t[0])
    return [dict(zip(found[0], row, strict=True)) for row in found[1:]]
