"""A config as people write one: some keys alone, each with a comment of what it means.

Takes the keys by section, gives YAML that `parse_config` reads; the comments are the docstrings of
the schema and of the list of hyperparameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from foldrace.config.hyperparameters import KNOBS
from foldrace.config.schema import SweepConfig
from foldrace.config.texts import inline_yaml

_COMMENT_AT = 30  # column, where the value leaves room
_WIDTH = 100  # columns; a comment that does not fit beside its key stands above it
_LONGEST = 90  # characters of a comment


def commented_yaml(keys: Mapping[str, Any], head: Iterable[str] = ()) -> str:
    """YAML of the keys, in the schema's order, a comment at each.

    `head`: lines that stand above them as comments.
    """
    lines = [f"# {line}".rstrip() for line in head]
    for name, field in SweepConfig.model_fields.items():
        if name not in keys:
            continue
        section, value = field.annotation, keys[name]
        if isinstance(value, Mapping) and isinstance(section, type):
            lines.append(f"{name}:")
            lines += _section_lines(value, section)
        else:
            lines += _lines("", name, value, field.description or "")
    return "\n".join(lines) + "\n"


def _section_lines(keys: Mapping[str, Any], section: type[BaseModel]) -> Iterator[str]:
    for name, field in section.model_fields.items():
        if name in keys:
            doc = field.description or (KNOBS[name].doc if name in KNOBS else "")
            yield from _lines("  ", name, keys[name], doc)


def _lines(indent: str, key: str, value: object, doc: str) -> Iterator[str]:
    text, comment = f"{indent}{key}: {inline_yaml(value)}", f"# {_short(doc)}"
    beside = f"{text:<{_COMMENT_AT}}  {comment}"
    if len(beside) <= _WIDTH:
        yield beside
        return
    yield f"{indent}{comment}"
    yield text


def _short(doc: str) -> str:
    """A docstring's first statement in one line, or as much of it as ends at a comma or bracket."""
    text = " ".join(doc.replace("`", "").split())
    first = re.split(r"(?<=[\w)])[.;] ", text)[0].removesuffix(".")
    whole = first.count("(") == first.count(")")
    if whole and len(first) <= _LONGEST:
        return first
    ends = [m.start() for m in re.finditer(r", | \(|: ", first[: _LONGEST + 2])]
    parts = (first[:end] for end in reversed(ends))
    return next((part for part in parts if part.count("(") == part.count(")")), first)
