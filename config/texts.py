"""YAML and JSON texts as plain values, and values as YAML.

Takes a text, gives mappings, lists and scalars; ValueError, in one line, says what is wrong with
it. A text is refused before it is expanded where aliases would make it large: a few hundred bytes
of them can stand for more than fits into memory.
"""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from foldrace.core.errors import cause
from foldrace.core.opening import MB

MOST_BYTES = MB
"""Size of the largest config that is read."""
_MOST_DEPTH = 50
_MOST_EXPANDED = 2_000_000  # characters, with all that aliases stand for
_NODE = 20  # characters that a key, an item or a mapping counts for, beside its text
_LONGEST_NUMBER = 100  # characters; the time that a number takes grows with their square
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def load_yaml(text: str) -> Any:
    """The value of a YAML text; ValueError where there is none."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        raise ValueError(_in_one_line(error)) from error
    except Exception as error:  # its constructors raise whatever they stumble over
        raise ValueError(cause(error)) from error


def load_json(text: str) -> Any:
    """The value of a JSON text; ValueError where there is none."""

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"key {key!r} is given twice")
            found[key] = value
        return found

    try:
        value = json.loads(text, object_pairs_hook=mapping)
    except Exception as error:  # as above
        raise ValueError(cause(error)) from error
    _check_json(value)
    return value


def yaml_text(tree: object) -> str:
    """A tree as YAML, which `load_yaml` reads as the same."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def inline_yaml(value: object) -> str:
    """A value as YAML in one line."""
    text = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10**9
    )
    return text.removesuffix("...\n").strip()


class _Loader(yaml.SafeLoader):
    """Reader of YAML as people write it, within bounds.

    `1e-3` is a number, a key given twice is an error.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[yaml.Node, int] = {}
        """Characters of each node that is whole, with all that aliases in it stand for."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        self._depth += 1
        if self._depth > _MOST_DEPTH:
            raise _refusal(f"more than {_MOST_DEPTH} levels of keys and lists", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None and node not in self._sizes:
            if isinstance(event, yaml.AliasEvent):
                raise _refusal(f"*{event.anchor} stands within what it stands for", event)
            self._sizes[node] = size = _NODE + self._size_of_value(node)
            if size > _MOST_EXPANDED:
                raise _refusal(
                    f"holds more than {_MOST_EXPANDED:,} characters, with what its aliases "
                    "stand for",
                    event,
                )
        return node

    def _size_of_value(self, node: yaml.Node) -> int:
        if isinstance(node, yaml.ScalarNode):
            return len(node.value)
        if isinstance(node, yaml.MappingNode):
            return sum(self._sizes[part] for pair in node.value for part in pair)
        return sum(self._sizes[part] for part in node.value)

    def compose_scalar_node(self, anchor: dict[Any, yaml.Node]) -> yaml.ScalarNode:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        node = super().compose_scalar_node(anchor)
        if node.tag in _NUMBERS and len(node.value) > _LONGEST_NUMBER:
            raise _refusal(f"a number of {len(node.value):,} characters", event)
        if fault := _fault(node.value):
            raise _refusal(fault, event)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *defaults` has no value of its own
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, (str, int, float, type(None))):
                key = str(key)  # a date; a list is refused further down
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return {str(key): value for key, value in super().construct_mapping(node, deep).items()}


class _Dumper(yaml.SafeDumper):
    """Writer that puts a text such as `1e-3` in quotes, which `_Loader` takes for a number."""


for _reader_or_writer in (_Loader, _Dumper):
    _reader_or_writer.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )


def _refusal(message: str, event: yaml.Event) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, message, event.start_mark)  # type: ignore[arg-type]


def _in_one_line(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    said = (part for part in (error.context, error.problem, error.note) if part)
    return place + " ".join(": ".join(said).split())


def _fault(text: str) -> str | None:
    """Why no file or terminal would take a text; None where they do."""
    if "\0" in text:
        return "a text with a NUL character"
    try:
        text.encode("utf-8", "surrogateescape")  # as names of files that are not UTF-8 are read
    except UnicodeEncodeError as error:
        return f"a text with half a character, {text[error.start]!a}"
    return None


def _check_json(value: Any) -> None:
    """ValueError for what the YAML reader would refuse, too."""
    level = [value]
    for _ in range(_MOST_DEPTH):
        below: list[Any] = []
        for found in level:
            if isinstance(found, str) and (fault := _fault(found)):
                raise ValueError(fault)
            if isinstance(found, dict):
                below += [*found, *found.values()]
            elif isinstance(found, list):
                below += found
        level = below
    if level:
        raise ValueError(f"more than {_MOST_DEPTH} levels of keys and lists")
