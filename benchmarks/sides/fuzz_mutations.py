"""Damage to bytes, texts and trees of values, from a seeded generator."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

WORDS = (
    "", " ", "\t", "a", "0", "-1", "1", "1.0", "1e-3", "1e999", "-1e308", "nan", "NaN", "inf",
    "null", "None", "true", "no", "~", "~nouser/x", "~~", "//x", ".", "..", "../../outside",
    "/etc/passwd", "C:\\x", "\\\\host\\share", "a/b", "a\\b", "con", "x" * 300, "x" * 5000, "\x00",
    "a\x00b",
    "\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "\r", "\n", "a\nb", "\x7f", "\u202eabc", "\u2066x",
    "\u200b", "\ufeff", "\udcff", "\ud800", "\U0001f600", "e\u0301", "\u00e9", "\u0131", "ß",
    "가나다", "١٢٣", "²", "1_000", "0x10", "[/]", "[red]", "[bold", "[a[b]", "{x}", "%s", "%(x)s",
    "$(id)", "`id`", "<script>alert(1)</script>", "<b>", "&amp;", "\"", "'", "\"\"", ",", ";", "|",
    "#",
    "=1+1", "@SUM(A1)", "+1", "-x", "--help", "*", "?", "[a-z]", "c0000", "c0001", "raw", "ema",
    "fold0", "2001-13-45", "2001-01-01", "59:59:59", "0o8", "s3://b/k", "s3://a:b@c/d?secret_key=x",
    "file:///etc/passwd", "http://x/y", "hf-hub:a/b", "timm/hf-hub:a/b", "postgresql://u:p@h/d",
    "1" * 5000, "é" * 200,
)  # fmt: skip
"""Texts that somebody somewhere takes for something else."""

NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 7, 255, 256, 65_535, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64,
    -(2**63), 10**30, 0.0, -0.0, 0.5, 1.5, -0.5, 1e-9, 1e-320, 1e9, 1e18, 1e308, -1e308,
    float("nan"), float("inf"), float("-inf"), 999_999_999, 99_999_999_999,
)  # fmt: skip


def value(rng: random.Random, depth: int = 0) -> Any:
    """Any value that JSON can hold, and some that it cannot."""
    kind = rng.randrange(10)
    if kind < 4:
        return rng.choice(WORDS)
    if kind < 7:
        return rng.choice(NUMBERS)
    if kind == 7:
        return rng.choice((None, True, False))
    if depth > 3:
        return rng.choice(([], {}))
    if kind == 8:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(WORDS): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def damaged(rng: random.Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """The bytes with one to four faults."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        _damage(rng, found, others)
    return bytes(found)


def _damage(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> None:
    size = len(data)
    at = rng.randrange(size + 1) if rng.random() < 0.6 else min(size, int(rng.expovariate(1 / 32)))
    end = min(size, at + int(rng.expovariate(1 / 16)) + 1)
    kind = rng.randrange(11)
    if kind == 0 and at < size:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1 and at < size:
        data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        del data[at:end]
    elif kind == 4:
        data[at:at] = data[at:end] * rng.choice((1, 2, 100))
    elif kind == 5:
        data[at:at] = rng.randbytes(rng.choice((1, 2, 4, 16, 300)))
    elif kind == 6:
        data[at:end] = bytes(end - at)
    elif kind == 7:
        width = rng.choice((2, 4, 8))
        number = rng.choice((0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1))
        number &= 256**width - 1
        data[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))
    elif kind == 8 and others:
        other = rng.choice(others)
        start = rng.randrange(len(other) + 1)
        data[at:end] = other[start : start + rng.choice((1, 8, 64, 1024))]
    elif kind == 9:
        data[at:at] = rng.choice(WORDS).encode("utf-8", "surrogatepass")
    else:
        other_at = rng.randrange(size + 1)
        data[at:at] = data[other_at : other_at + 64]


def changed(rng: random.Random, tree: Any, times: int | None = None) -> Any:
    """A copy of a tree of dicts and lists with one to three nodes changed."""
    found = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3)) if times is None else times):
        found = _changed(rng, found)
    return found


def _changed(rng: random.Random, tree: Any) -> Any:
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in items:
            places.append((node, key))
            if isinstance(child, dict | list):
                walk(child)

    if isinstance(tree, dict | list):
        walk(tree)
    if not places or rng.random() < 0.01:
        return value(rng)
    node, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind < 4:
        node[key] = _like(rng, node[key]) if rng.random() < 0.5 else value(rng)
    elif kind == 4:
        del node[key]
    elif kind == 5 and isinstance(node, dict):
        node[rng.choice(WORDS)] = node.pop(key)
    elif kind == 6:
        other, other_key = rng.choice(places)
        node[key] = copy.deepcopy(other[other_key])
    elif isinstance(node, list):
        node.insert(key, copy.deepcopy(node[key]))
    else:
        node[rng.choice(WORDS)] = value(rng)
    return tree


def _like(rng: random.Random, old: Any) -> Any:
    """Another value of the same type."""
    if isinstance(old, bool):
        return not old
    if isinstance(old, int | float):
        return rng.choice((*NUMBERS, old * 2, -old, old + 1))
    if isinstance(old, str):
        return rng.choice((*WORDS, old + rng.choice(WORDS), rng.choice(WORDS) + old, old[:-1]))
    return value(rng)


def json_text(rng: random.Random, tree: Any) -> bytes:
    """The tree as JSON text, at times with a fault that no tree has."""
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.3)
    kind = rng.randrange(20)
    if kind == 0:
        text = nested(rng, text)
    elif kind == 1:  # a key that is there twice
        keys = re.findall(r'"\w+": ', text)
        if keys:
            key = rng.choice(keys)
            text = text.replace(key, f"{key}{json.dumps(value(rng))}, {key}", 1)
    elif kind == 2:
        text = text.replace("0", "9" * 5000, 1)
    data = text.encode("utf-8", "surrogatepass")
    return damaged(rng, data) if kind in (3, 4, 5) else data


def nested(rng: random.Random, text: str) -> str:
    """A value or the whole text within very many brackets."""
    depth = rng.choice((50, 300, 1_000, 3_000, 20_000))
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    inner = opening * depth + (closing * depth if rng.random() < 0.5 else "")
    return text.replace("0", inner, 1) if rng.random() < 0.5 else inner


def npy(rng: random.Random, data: bytes) -> bytes:
    """The bytes of an .npy file with another header, or damaged."""
    kind = rng.randrange(4)
    if kind == 0 or not data.startswith(b"\x93NUMPY"):
        return damaged(rng, data)
    size = int.from_bytes(data[8:10], "little")
    header, body = data[10 : 10 + size].decode("latin-1"), data[10 + size :]
    swaps: tuple[tuple[str, Callable[[], str]], ...] = (
        (r"'descr': [^,]*", lambda: f"'descr': {rng.choice(_DTYPES)}"),
        (r"'shape': \([^)]*\)", lambda: f"'shape': {rng.choice(_SHAPES)}"),
        (r"'fortran_order': \w+", lambda: f"'fortran_order': {rng.choice(('True', '1', 'x'))}"),
        (r".$", lambda: rng.choice(("", "(", "'", "\x00", "[" * 300))),
        (r"^.*$", lambda: header[: rng.randrange(len(header))]),
    )
    pattern, made = rng.choice(swaps)
    header = re.sub(pattern, lambda _: made(), header, count=1, flags=re.DOTALL)
    if rng.random() < 0.3:
        body = damaged(rng, body)
    raw = header.encode("latin-1", "replace")
    return data[:8] + len(raw).to_bytes(2, "little") + raw + body


_DTYPES = (
    "'<f2'", "'<f4'", "'<f8'", "'>f4'", "'<i8'", "'|b1'", "'|O'", "'<U3'", "'|S5'", "'<c16'",
    "'<M8[s]'", "'|V9'", "[('a', '<f4')]", "'f'", "''", "5", "None", "'<f16'", "('<f4', (2,))",
    "'<i3'",
)  # fmt: skip
_SHAPES = (
    "()", "(0,)", "(1,)", "(-1,)", "(True, 2)", "(99999999, 99999999)", "(2**63,)", "('a',)", "[3]",
    "(3)", "(1.0,)", "(999999999999,)", "(None,)", "(3, 3, 3)", "(0, 0)", "(" + "1, " * 40 + ")",
)  # fmt: skip
