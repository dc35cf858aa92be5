"""What a knob may take: a float range, an integer range, or a set of choices; each validated.

Takes bounds, gives immutable ranges that know what they contain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Float:
    """Real numbers in [low, high], uniform or log-uniform."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        _check_bounds(self.low, self.high, self.log)

    def contains(self, value: float) -> bool:
        return self.low <= value <= self.high

    def middle(self) -> float:
        """The arithmetic middle, or the geometric one of a log range."""
        return _middle(self.low, self.high, self.log)

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

    def contains(self, value: float) -> bool:
        return float(value).is_integer() and self.low <= value <= self.high

    def middle(self) -> int:
        return round(_middle(self.low, self.high, self.log))

    def __str__(self) -> str:
        return f"whole numbers {self.low} to {self.high}{' (log)' if self.log else ''}"


@dataclass(frozen=True)
class Choice:
    """One of a few values."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("needs at least one choice")
        if len(set(self.values)) != len(self.values):
            raise ValueError(f"gives a choice twice: {list(self.values)}")

    def contains(self, value: float) -> bool:
        return value in self.values

    def middle(self) -> float:
        return sorted(self.values)[(len(self.values) - 1) // 2]

    def __str__(self) -> str:
        return "one of " + ", ".join(f"{value:g}" for value in self.values)


Range = Float | Int | Choice


def _check_bounds(low: float, high: float, log: bool) -> None:
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"needs finite bounds, got low {low:g} and high {high:g}")
    if low > high:
        raise ValueError(f"low {low:g} is above high {high:g}")
    if log and low <= 0:
        raise ValueError(f"a log range needs low above 0, got {low:g}")


def _middle(low: float, high: float, log: bool) -> float:
    return math.sqrt(low * high) if log else (low + high) / 2
