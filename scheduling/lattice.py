"""A finite search space: every combination of the values of its knobs, without listing them.

Takes values for each knob, gives combinations from a random place on. Larger than memory is fine.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from search_spaces.ranges import Range, Value

GRID_POINTS = 5
"""Values that a grid takes of a range."""
_DRAWS = 20


@dataclass(frozen=True)
class Lattice:
    """Knob -> its values."""

    axes: Mapping[str, Sequence[Value]]

    @property
    def size(self) -> int:
        return math.prod(len(values) for values in self.axes.values())

    def at(self, index: int) -> dict[str, Value]:
        """Combination `index` of 0 .. size - 1: the digits of the index choose the values."""
        chosen: dict[str, Value] = {}
        for name, values in self.axes.items():
            index, digit = divmod(index, len(values))
            chosen[name] = values[digit]
        return chosen

    def walk(self, seed: int) -> Iterator[dict[str, Value]]:
        """Every combination at least once: some at random, then all from a random one on, so that
        whoever looks for a free one finds it after as many steps as others are taken."""
        generator = random.Random(seed)
        for _ in range(_DRAWS):
            yield self.at(generator.randrange(self.size))
        start = generator.randrange(self.size)
        for step in range(self.size):
            yield self.at((start + step) % self.size)


def grid(ranges: Mapping[str, Range]) -> Lattice:
    """The choices, and at most `GRID_POINTS` values of each range."""
    return Lattice({name: chosen.grid(GRID_POINTS) for name, chosen in ranges.items()})


def every(ranges: Mapping[str, Range]) -> Lattice | None:
    """All values of all knobs; None where one of them takes real numbers."""
    axes = {name: chosen.every() for name, chosen in ranges.items()}
    listed = {name: values for name, values in axes.items() if values is not None}
    return Lattice(listed) if len(listed) == len(axes) else None
