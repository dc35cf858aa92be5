"""Validation of what a configuration file holds, and the words for everything that is wrong.

Takes the mapping of a file, gives a `SweepConfig` and the problems that name file, key, value and
what is allowed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from foldrace.config.forms import TAGS
from foldrace.config.key_hints import unknown_key
from foldrace.config.schema import SweepConfig
from foldrace.core.errors import Problem
from foldrace.core.redaction import without_secrets
from foldrace.core.synonyms import did_you_mean

_SHAPES = {  # in the words of YAML, where pydantic has those of JSON
    "tuple_type": "should be a list: [..., ...]",
    "dict_type": "should be a mapping: {<key>: <value>}",
    "model_type": "should be a mapping: {<key>: <value>}",
    "bool_type": "should be true or false",
    "string_type": "should be text",
}


def validate(raw: dict[str, Any], source: str) -> tuple[SweepConfig | None, list[Problem]]:
    """The config of a mapping, and the problems of its values.

    Where values are wrong, they are left out, to give later checks a config to work on; None where
    that is not enough. JSON mode: lists become tuples, strings are never numbers.
    """
    try:
        return SweepConfig.model_validate_json(json.dumps(raw, default=str)), []
    except ValidationError as error:
        details = error.errors(include_url=False)
    empty = [detail for detail in details if _is_empty(detail)]
    if empty:
        return validate(_pruned(raw, (_keys(detail["loc"]) for detail in empty)), source)
    problems = [_describe(source, detail) for detail in details]
    for _ in range(8):  # a value that went may leave its section incomplete: prune that too
        raw = _pruned(raw, (_keys(detail["loc"]) for detail in details))
        try:
            return SweepConfig.model_validate_json(json.dumps(raw, default=str)), problems
        except ValidationError as error:
            details = error.errors(include_url=False)
    return None, problems


def _is_empty(detail: Any) -> bool:
    """True for a mapping with nothing below it, such as one whose keys are all comments."""
    return detail["type"] in ("model_type", "dict_type") and detail["input"] is None


def _keys(loc: Iterable[int | str]) -> tuple[int | str, ...]:
    """An error's location as the user wrote it: without pydantic's union tags."""
    return tuple(part for part in loc if part not in TAGS)


def _describe(source: str, detail: Any) -> Problem:
    loc = _keys(detail["loc"])
    where = f"{source}: {_path(loc)}"
    kind, given = detail["type"], shown(detail.get("input"))
    if loc[:1] == ("notify",):  # it may be a webhook's URL, which is a secret
        given = "a value that is not shown here"
    context = detail.get("ctx", {})
    if kind == "extra_forbidden":
        return Problem(where, unknown_key(loc))
    if kind == "missing":
        return Problem(where, "is missing; this key has no default")
    if kind == "literal_error":
        hint = did_you_mean(str(detail["input"]), re.findall(r"'([^']*)'", context["expected"]))
        return Problem(where, f"got {given}; {hint}allowed: {context['expected']}")
    if kind == "hyperparameter":
        return Problem(where, context["problem"])
    if kind == "value_error":
        return Problem(where, f"{context['error']} (got {given})")
    expected = _SHAPES.get(kind) or detail["msg"].replace("Input should", "should")
    return Problem(where, f"got {given}; {expected}")


def _path(loc: tuple[int | str, ...]) -> str:
    """('search', 'points', 0, 'backbone') -> 'search.points[0].backbone'."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return "".join(parts).removeprefix(".") or "top level"


def shown(value: object, limit: int = 80) -> str:
    """A value as a message shows it: as JSON, cut at `limit` characters."""
    if isinstance(value, str):
        value = without_secrets(value)
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _pruned(raw: dict[str, Any], locations: Iterable[tuple[int | str, ...]]) -> dict[str, Any]:
    """A copy without the wrong values, so that their defaults stand in."""
    copy: dict[str, Any] = json.loads(json.dumps(raw, default=str))
    for loc in locations:
        target: Any = copy
        for i, part in enumerate(loc):
            inner = target.get(part) if isinstance(target, dict) else None
            if not isinstance(target, dict) or part not in target:
                break
            if i == len(loc) - 1 or not isinstance(inner, dict):
                del target[part]
                break
            target = inner
    return copy
