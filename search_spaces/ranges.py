"""What a knob may take: a float range, an integer range, a set of choices, or a name of a table.

Takes bounds, gives immutable ranges that know what they contain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Value = int | float | str


@dataclass(frozen=True)
class Float:
    """Real numbers in [low, high], uniform or log-uniform."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        _check_bounds(self.low, self.high, self.log)

    def contains(self, value: Value) -> bool:
        return not isinstance(value, str) and self.low <= value <= self.high

    def middle(self) -> float:
        """The arithmetic middle, or the geometric one of a log range."""
        return _middle(self.low, self.high, self.log)

    def grid(self, points: int) -> tuple[float, ...]:
        """So many values from low to high: equal steps, or equal factors of a log range."""
        if self.low == self.high:
            return (self.low,)
        return _spaced(self.low, self.high, points, self.log)

    def every(self) -> Sequence[float] | None:
        """All values; None where they cannot be listed."""
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
        if isinstance(value, str):
            return False
        return float(value).is_integer() and self.low <= value <= self.high

    def middle(self) -> int:
        return round(_middle(self.low, self.high, self.log))

    def grid(self, points: int) -> tuple[int, ...]:
        """All values where there are no more than `points`, else so many, spaced as those of a
        `Float` and rounded."""
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
        return value in self.values

    def middle(self) -> Value:
        """Of numbers the middle one, of names the first."""
        numbers = [value for value in self.values if not isinstance(value, str)]
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
    """A row of one of the training tables (losses, optimisers, heads ...), by its name. Whether
    there is such a row is checked where the table lives."""

    def contains(self, value: Value) -> bool:
        return isinstance(value, str) and value != ""

    def __str__(self) -> str:
        return "a name"


Range = Float | Int | Choice


def shown(value: Value) -> str:
    """A knob's value in a message or a table."""
    return value if isinstance(value, str) else f"{value:g}"


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
    """The ends are exact: rounding must not carry one out of the range."""
    parts = [i / (points - 1) for i in range(1, points - 1)]
    inner = [low * (high / low) ** x if log else low + (high - low) * x for x in parts]
    return (low, *inner, high)
