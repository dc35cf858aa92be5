"""The HTML page around the sections: head, style, sorting script, font.

Takes titles and bodies, gives one self-contained document. Its content security policy forbids
every load from outside and every script but its own.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from foldrace.reporting.fonts import font_face
from foldrace.reporting.markup import Html, text


@dataclass(frozen=True)
class Block:
    """A section that has something to show."""

    id: str
    title: str
    body: Html


_STYLE = """
:root { color-scheme: light; --ink: #1f2933; --muted: #5b6770; --line: #dde2e6;
  --soft: #f5f7f8; --accent: #0b5cab; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 3.2rem; -webkit-text-size-adjust: 100%; }
body { margin: 0; color: var(--ink); background: #fff; line-height: 1.5; font-size: 16px;
  font-family: "Report Hangul", system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue",
  Arial, sans-serif; }
header, main, footer { max-width: 1080px; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .8rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem; }
p, figcaption { color: var(--muted); margin: .4rem 0 .8rem; font-size: .92rem; max-width: 70ch; }
nav { position: sticky; top: 0; z-index: 2; background: #fff; border-bottom: 1px solid var(--line);
  margin-top: 1rem; }
nav ul { max-width: 1080px; margin: 0 auto; padding: .55rem 1.25rem; display: flex; gap: 1.1rem;
  list-style: none; overflow-x: auto; white-space: nowrap; font-size: .92rem; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
.cards { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); }
.card { border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; }
.label, .remark, dt { color: var(--muted); font-size: .85rem; }
.figure { font-size: 1.5rem; font-weight: 600; font-variant-numeric: tabular-nums; }
dl { display: grid; gap: .7rem 1.5rem; margin: 1.2rem 0;
  grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); }
dd { margin: 0; overflow-wrap: anywhere; }
.warnings { list-style: none; padding: 0; margin: 1rem 0; }
.warnings li { border-left: 4px solid #d58a00; background: #fff7e6; padding: .5rem .8rem;
  margin-bottom: .4rem; border-radius: 0 6px 6px 0; overflow-wrap: anywhere; font-size: .92rem; }
.scroll { overflow: auto; max-height: 34rem; border: 1px solid var(--line); border-radius: 8px;
  margin: .6rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; }
th, td { padding: .35rem .7rem; text-align: left; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; }
th { position: sticky; top: 0; background: var(--soft); padding: 0; }
th button { all: unset; display: block; width: 100%; box-sizing: border-box; cursor: pointer;
  padding: .45rem .7rem; font-weight: 600; }
.number button { text-align: right; }
th button:focus-visible { outline: 2px solid var(--accent); outline-offset: -2px; }
th[aria-sort=ascending] button::after { content: " ▲"; font-size: .7em; }
th[aria-sort=descending] button::after { content: " ▼"; font-size: .7em; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.marked td { background: #eaf3fb; }
.status::before { content: ""; display: inline-block; width: .55em; height: .55em;
  border-radius: 50%; margin-right: .45em; background: #9aa5ad; }
.status.complete::before { background: #009e73; }
.status.running::before { background: #0072b2; }
.status.failed::before, .status.diverged::before { background: #d55e00; }
figure { margin: 1rem 0; }
figure .scroll { max-height: none; }
img { display: block; width: 100%; min-width: 34rem; max-width: 56rem; height: auto;
  margin: 0 auto; padding: .6rem; }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 8px; overflow: auto;
  padding: .8rem 1rem; max-height: 34rem; font-size: .85rem; }
code { font-family: "Report Hangul", ui-monospace, SFMono-Regular, Menlo, Consolas,
  "DejaVu Sans Mono", monospace; }
summary { cursor: pointer; color: var(--accent); margin: 1rem 0 .4rem; }
footer { color: var(--muted); font-size: .85rem; padding-top: 2rem; padding-bottom: 3rem; }
@media (max-width: 600px) {
  dl { grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .7rem 1rem; }
}
@media print { nav { display: none; } .scroll, pre { max-height: none; } }
"""

_SCRIPT = """
const key = (row, i) => {
  const cell = row.cells[i];
  if (cell.classList.contains("number"))
    return "value" in cell.dataset ? Number(cell.dataset.value) : NaN;
  return cell.textContent;
};
const compare = (a, b) => typeof a === "number" ? a - b : a.localeCompare(b, "en", {numeric: true});
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const body = table.tBodies[0];
    const rows = [...body.rows].map(row => [key(row, i), row]);
    const unknown = rows.filter(([k]) => Number.isNaN(k));
    const known = rows.filter(([k]) => !Number.isNaN(k));
    known.sort(([a], [b]) => sign * compare(a, b));
    body.append(...[...known, ...unknown].map(([, row]) => row));
  }));
}
"""


def page(name: str, subtitle: str, blocks: Sequence[Block]) -> str:
    """The whole document."""
    body = _body(name, subtitle, blocks)
    face = font_face("Report Hangul", body)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy()}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(name)}: Foldrace report</title>\n<style>{face}\n{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _body(name: str, subtitle: str, blocks: Sequence[Block]) -> Html:
    links = "".join(f'<li><a href="#{text(b.id)}">{text(b.title)}</a></li>' for b in blocks)
    sections = "\n".join(
        f'<section id="{text(b.id)}">\n<h2>{text(b.title)}</h2>\n{b.body}\n</section>'
        for b in blocks
    )
    return Html(
        f"<header><h1>{text(name)}</h1><p>{text(subtitle)}</p></header>\n"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main>\n{sections}\n</main>\n'
        "<footer>OOF: out-of-fold; a row's probabilities come from the one fold trial that did "
        "not train on it. Log loss is pooled over all rows, natural log.</footer>"
    )


def _policy() -> str:
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    return (
        "default-src 'none'; img-src data:; font-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'"
    )
