"""HTML pieces: escaped text, numbers, tables, charts and notes.

Takes values from the run, gives `Html`. Whatever is not `Html` already is escaped, so a class
named `<script>` stays a name.
"""

from __future__ import annotations

import base64
import html
import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

UNKNOWN = "-"


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


@dataclass(frozen=True)
class Cell:
    """A number in a table: what is shown, and what the column is sorted by."""

    shown: str
    value: float | None


def text(value: object) -> Html:
    """Escaped, unless it is markup. Composed Hangul (NFC): file names of macOS come decomposed,
    and few fonts draw those."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(unicodedata.normalize("NFC", str(value)), quote=True))


def number(value: float | None, digits: int = 4) -> str:
    """A fixed number of decimals; a dash for what is unknown."""
    return UNKNOWN if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return UNKNOWN if value is None or not math.isfinite(value) else f"{100 * value:.2f} %"


def counted(n: int, word: str) -> str:
    return f"{n:,} {word}" if n == 1 else f"{n:,} {word}s"


def duration(seconds: float) -> str:
    """12s, 3m05s, 2h07m, 3d04h."""
    total = round(max(seconds, 0.0))
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    if total < 86400:
        return f"{total // 3600}h{total % 3600 // 60:02d}m"
    return f"{total // 86400}d{total % 86400 // 3600:02d}h"


def difference(value: float | None) -> str:
    """With its sign; four decimals, or as many as its first two digits need."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    if value == 0:
        return "0"
    return f"{value:+.4f}" if abs(value) >= 1e-3 else f"{value:+.1e}"


def file_size(n_bytes: int) -> str:
    """999 B, 12.3 kB, 1.23 GB: three digits, powers of 1000."""
    value, unit = float(n_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def milliseconds(value: float) -> str:
    """0.042 ms, 12.3 ms, 1,230 ms."""
    return f"{value:,.0f} ms" if value >= 999.5 else f"{value:.3g} ms"


def score(value: float | None, digits: int = 4) -> Cell:
    return Cell(number(value, digits), value)


def count(value: int) -> Cell:
    return Cell(f"{value:,}", float(value))


def table(
    headers: Sequence[str],
    rows: Iterable[Sequence[object]],
    marked: Iterable[int] = (),
    name: str = "",
) -> Html:
    """A table in its own scrolling box; a click on a header sorts it. `marked` are the indices
    of rows to highlight, `name` says what the box holds to those who cannot see it."""
    highlighted, listed = set(marked), list(rows)
    head = "".join(
        f'<th scope="col"{_is_number(i, listed)}><button type="button">{text(h)}</button></th>'
        for i, h in enumerate(headers)
    )
    body = "".join(
        f"<tr{' class=marked' if i in highlighted else ''}>{''.join(map(_td, row))}</tr>\n"
        for i, row in enumerate(listed)
    )
    return Html(
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(name or headers[0])}">'
        f'<table class="sortable"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def pairs(items: Iterable[tuple[str, object]]) -> Html:
    """Names with their values, as a list of definitions."""
    rows = "".join(f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in items)
    return Html(f"<dl>{rows}</dl>")


def cards(items: Iterable[tuple[str, str, str]]) -> Html:
    """(label, figure, remark): the numbers to see first."""
    boxes = "".join(
        f'<div class="card"><div class="label">{text(label)}</div>'
        f'<div class="figure">{text(figure)}</div><div class="remark">{text(remark)}</div></div>'
        for label, figure, remark in items
    )
    return Html(f'<div class="cards">{boxes}</div>')


def chart(png: bytes, alt: str, caption: str) -> Html:
    data = base64.b64encode(png).decode()
    return Html(
        f'<figure><div class="scroll" tabindex="0" role="region" aria-label="{text(alt)}">'
        f'<img alt="{text(alt)}" src="data:image/png;base64,{data}"></div>'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )


def note(*sentences: str) -> Html:
    return Html(f"<p>{text(' '.join(sentences))}</p>")


def heading(title: str) -> Html:
    return Html(f"<h3>{text(title)}</h3>")


def warning_list(messages: Iterable[str]) -> Html:
    items = "".join(f"<li>{text(m)}</li>" for m in messages)
    return Html(f'<ul class="warnings">{items}</ul>' if items else "")


def code(source: str) -> Html:
    return Html(f'<pre tabindex="0"><code>{text(source)}</code></pre>')


def folded(summary: str, inner: Html) -> Html:
    """Hidden until it is opened."""
    return Html(f"<details><summary>{text(summary)}</summary>{inner}</details>")


def join(*parts: Html | None) -> Html:
    return Html("\n".join(part for part in parts if part))


def _is_number(column: int, rows: Sequence[Sequence[object]]) -> str:
    return " class=number" if rows and isinstance(rows[0][column], Cell) else ""


def _td(value: object) -> str:
    if isinstance(value, Cell):
        key = "" if value.value is None else f' data-value="{value.value!r}"'
        return f'<td class="number"{key}>{text(value.shown)}</td>'
    return f"<td>{text(value)}</td>"
