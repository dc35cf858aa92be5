"""Values of a hyperparameter: a range of numbers, a set of choices, a switch, a name of a table.

Takes bounds, gives immutable ranges that know what they contain.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

Value = bool | int | float | str


@dataclass(frozen=True)
class Float:
    """Real numbers in [low, high], uniform or log-uniform."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        _check_bounds(self.low, self.high, self.log)

    def contains(self, value: Value) -> bool:
        """True where the value is allowed."""
        return is_number(value) and self.low <= value <= self.high

    def middle(self) -> float:
        """The arithmetic middle, or the geometric one of a log range."""
        return _middle(self.low, self.high, self.log)

    def grid(self, points: int) -> tuple[float, ...]:
        """The given number of values from low to high, in equal steps, of a log range factors."""
        if self.low == self.high:
            return (self.low,)
        return _spaced(self.low, self.high, points, self.log)

    def every(self) -> Sequence[float] | None:
        """All values, or None where they cannot be listed."""
        return (self.low,) if self.low == self.high else None

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}{' (log)' if self.log else ''}"


@dataclass(frozen=True)
class Int:
    """Whole numbers in [low, high], uniform or log-uniform."""

    low: int
    high: int
    log: bool = False

    def __post_init__(self) -> None:
        _check_bounds(self.low, self.high, self.log)

    def contains(self, value: Value) -> bool:
        """True where the value is allowed."""
        return is_number(value) and self.low <= value <= self.high and float(value).is_integer()

    def middle(self) -> int:
        """The middle as `Float` has it, rounded."""
        return round(_middle(self.low, self.high, self.log))

    def grid(self, points: int) -> tuple[int, ...]:
        """All values if there are at most `points`, else that many.

        They are spaced as those of a `Float` and rounded.
        """
        if self.high - self.low < points:
            return tuple(self.every())
        return tuple(dict.fromkeys(map(round, _spaced(self.low, self.high, points, self.log))))

    def every(self) -> Sequence[int]:
        """All values."""
        return range(self.low, self.high + 1)

    def __str__(self) -> str:
        return f"whole numbers {self.low} to {self.high}{' (log)' if self.log else ''}"


@dataclass(frozen=True)
class Choice:
    """One of a few values."""

    values: tuple[Value, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("needs at least one choice")
        if len(set(self.values)) != len(self.values):
            raise ValueError(f"gives a choice twice: {list(self.values)}")

    def contains(self, value: Value) -> bool:
        """True where the value is allowed."""
        # In Python True equals 1.
        return any(
            value == v and isinstance(value, bool) == isinstance(v, bool) for v in self.values
        )

    def middle(self) -> Value:
        """The middle one of numbers, the first of names and switches."""
        numbers = [value for value in self.values if is_number(value)]
        if len(numbers) < len(self.values):
            return self.values[0]
        return sorted(numbers)[(len(numbers) - 1) // 2]

    def grid(self, points: int) -> tuple[Value, ...]:
        """All values, however many `points` are asked for."""
        return self.values

    def every(self) -> Sequence[Value]:
        """All values."""
        return self.values

    def __str__(self) -> str:
        return "one of " + ", ".join(shown(value) for value in self.values)


@dataclass(frozen=True)
class Name:
    """Name of a row of one of the training tables (losses, optimisers, heads ...).

    It is checked against the rows where the table lives.
    """

    def contains(self, value: Value) -> bool:
        """True where the value is allowed."""
        return isinstance(value, str) and value != ""

    def __str__(self) -> str:
        return "a name"


@dataclass(frozen=True)
class Switch:
    """true or false; with `or_path` the path of a file or folder, too."""

    or_path: bool = False

    def contains(self, value: Value) -> bool:
        """True where the value is allowed."""
        return isinstance(value, bool) or (self.or_path and isinstance(value, str) and value != "")

    def __str__(self) -> str:
        return "true, false or the path of a file or folder" if self.or_path else "true or false"


@dataclass(frozen=True)
class Seconds(Float):
    """Numbers of seconds; a text such as 90s, 5m or 1.5h is one, too."""


Range = Float | Int | Choice
Limits = Range | Name | Switch

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def is_number(value: object) -> TypeGuard[int | float]:
    """True for a number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def seconds(text: str) -> float:
    """Seconds in '90m', '1.5h', '45s', '2d' or '90'; ValueError where the text is none of these."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd]?)\s*", text)
    if match is None:
        raise ValueError("should be seconds, or a number with s, m, h or d, such as 90m or 1.5h")
    return float(match[1]) * _UNITS[match[2]]


def shown(value: object) -> str:
    """A value in a message or a table, as YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def _check_bounds(low: float, high: float, log: bool) -> None:
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"needs finite bounds, got low {low:g} and high {high:g}")
    if low > high:
        raise ValueError(f"low {low:g} is above high {high:g}")
    if log and low <= 0:
        raise ValueError(f"a log range needs low above 0, got {low:g}")


def _middle(low: float, high: float, log: bool) -> float:
    return math.sqrt(low * high) if log else (low + high) / 2


def _spaced(low: float, high: float, points: int, log: bool) -> tuple[float, ...]:
    """The given number of values; rounding carries neither end out of the range."""
    parts = [i / (points - 1) for i in range(1, points - 1)]
    inner = [low * (high / low) ** x if log else low + (high - low) * x for x in parts]
    return (low, *inner, high)
