"""The console of every command: what it prints appears, and does nothing else.

Names of files, classes and keys come from others. Here, and nowhere else, their control characters
are escaped, and markup in them is text.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterable
from typing import IO, Any, TextIO, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.highlighter import RegexHighlighter
from rich.segment import Segment
from rich.text import Text

_JOINERS = "\u200c\u200d"  # within words of Persian and within emoji: harmless


def visible(text: str, also: str = "") -> str:
    """The text with the codes of characters that are not to be seen: line ends, ESC, U+202E, ...

    Those in `also` stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _JOINERS or c in also else _code(c) for c in text)


def _code(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class _FirstWords(RegexHighlighter):
    """Colours for the words that a line of ours begins with."""

    highlights = (
        r"^(?P<yellow>warning)\b",
        r"^(?P<bold>Blend|Unvalidated)\b",
        r"^(?P<red>\d+ problems?:)$",
    )


class Terminal(Console):
    """A console without markup; each text that it is given is one line, of whatever length."""

    def __init__(self, file: IO[str] | None = None, **options: Any) -> None:
        """`options`: those of rich's Console."""
        words = _FirstWords()
        super().__init__(file=file, markup=False, emoji=False, highlighter=words, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print; a text is not broken where the terminal ends, so that paths can be copied."""
        options.setdefault("soft_wrap", all(isinstance(one, str) for one in objects))
        super().print(*objects, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """The text in one line."""
        return super().render_str(visible(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render; what tables and styled texts hold is escaped, too."""
        if isinstance(renderable, Text) and renderable.no_wrap and "\n" in renderable.plain:
            renderable = Text(visible(renderable.plain), no_wrap=True, overflow=renderable.overflow)
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(visible(segment.text, also="\n"), segment.style)


def screen(file: TextIO) -> TextIO:
    """The file as a view: what is printed goes nowhere once nobody reads it."""
    return cast(TextIO, _Screen(file))


class _Screen(io.TextIOBase):
    """A terminal or a pipe that nobody may be reading any more."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        """Write it, if anybody reads; what the encoding does not have as its code."""
        try:
            try:
                return self._file.write(text)
            except UnicodeEncodeError:
                codec = self._file.encoding
                return self._file.write(text.encode(codec, "backslashreplace").decode(codec))
        except OSError:
            self._lose()
            return len(text)

    def flush(self) -> None:
        """Flush it, likewise."""
        try:
            self._file.flush()
        except OSError:
            self._lose()

    def isatty(self) -> bool:
        """True on a terminal."""
        return self._file.isatty()

    def fileno(self) -> int:
        """Its descriptor."""
        return self._file.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Its encoding."""
        return self._file.encoding

    def _lose(self) -> None:
        """Let the descriptor lead nowhere: what is buffered is flushed at Python's end, too."""
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._file.fileno())
            os.close(nowhere)
