"""NanumGothic for charts and page, so that Hangul is readable on any machine.

Takes the text of a page, gives a CSS rule with the part of the font that it needs. Only the font
file of koreanize-matplotlib is used; without it both fall back to the fonts of the machine.
"""

from __future__ import annotations

import base64
import importlib.util
import io
from functools import lru_cache
from pathlib import Path

NAME = "NanumGothic"
_RANGES = ((0x1100, 0x11FF), (0x2E80, 0xFFEF))
"""Hangul, Han and Kana with their punctuation; every machine has fonts for what lies outside."""
_EDITOR_TABLES = ["TSI0", "TSI1", "TSI2", "TSI3", "TSI5"]


def font_file() -> Path | None:
    """Path of the font in the installed package, or None.

    The package itself is never imported, as it would change matplotlib's settings.
    """
    spec = importlib.util.find_spec("koreanize_matplotlib")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / "fonts" / f"{NAME}.ttf"
    return path if path.is_file() else None


@lru_cache(maxsize=1)
def chart_families() -> list[str]:
    """Font families for matplotlib; the first that has a character draws it."""
    from matplotlib import font_manager

    path = font_file()
    if path is None:
        return ["DejaVu Sans"]
    font_manager.fontManager.addfont(str(path))
    return ["DejaVu Sans", NAME]


def font_face(family: str, text: str) -> str:
    """A CSS rule that embeds the characters of `text` that need the font; empty where none does."""
    path = font_file()
    needed = {ord(c) for c in set(text) if any(low <= ord(c) <= high for low, high in _RANGES)}
    data = _subset(path, needed) if path and needed else None
    if data is None:
        return ""
    url = f"data:font/woff;base64,{base64.b64encode(data).decode()}"
    ranges = ", ".join(f"U+{low:X}-{high:X}" for low, high in _RANGES)
    return f'@font-face {{ font-family: "{family}"; src: url({url}); unicode-range: {ranges}; }}'


def _subset(path: Path, needed: set[int]) -> bytes | None:
    from fontTools import subset  # type: ignore[import-untyped,unused-ignore]

    options = subset.Options(
        flavor="woff", hinting=False, layout_features=[], recalc_timestamp=False
    )
    options.drop_tables += _EDITOR_TABLES
    with subset.load_font(str(path), options) as font:
        present = needed & font.getBestCmap().keys()
        if not present:
            return None
        subsetter = subset.Subsetter(options)
        subsetter.populate(unicodes=present)
        subsetter.subset(font)
        buffer = io.BytesIO()
        subset.save_font(font, buffer, options)
    return buffer.getvalue()
