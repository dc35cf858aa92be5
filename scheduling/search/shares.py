"""Which backbone the next candidate has: each gets its minimum share, then those go first that have
brought the race's blend something.

Takes counts and gains, gives a backbone. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

_PRIOR = 4.0
"""So many candidates with the mean of all backbones does each backbone's mean begin with."""
_FLOOR = 0.1
"""Of the probability beyond the minimum shares; it is shared evenly, whatever the gains."""


class Shares:
    """Fair at first, then by results.

    With n candidates started of N, a backbone of B is behind while it has fewer than
    max(min_share·N/B, 1)·(n+1)/N of them; the one with the fewest goes first. When none is behind,
    P(b) = 0.1/B + 0.9·m_b/Σm, m_b = (Σ max(gain, 0) + 4·mean of all) / (gains of b + 4).
    """

    def __init__(
        self, backbones: Sequence[str], candidates: int, min_share: float, seed: int
    ) -> None:
        self._backbones, self._seed = tuple(backbones), seed
        self._rate = max(min_share / len(backbones), 1 / candidates)

    def choose(
        self, number: int, started: Mapping[str, int], gains: Mapping[str, Sequence[float]]
    ) -> str:
        """The backbone of candidate `number`. `started`: candidates of each backbone so far;
        `gains`: the latest gain of each of its candidates that has one, in nats a row. The same
        arguments give the same backbone."""
        fewest = min(self._backbones, key=lambda b: started.get(b, 0))  # the first one on a tie
        due = self._rate * (sum(started.values()) + 1)
        if started.get(fewest, 0) < due:
            return fewest
        chance = self.chances(gains)
        if chance is None:
            return fewest
        drawn = np.random.default_rng((self._seed, number)).choice(len(chance), p=chance)
        return self._backbones[int(drawn)]

    def chances(self, gains: Mapping[str, Sequence[float]]) -> list[float] | None:
        """(B,) probabilities beyond the minimum shares; None while nobody has gained anything."""
        brought = [[max(g, 0.0) for g in gains.get(b, ())] for b in self._backbones]
        everyone = [g for of_one in brought for g in of_one]
        if not sum(everyone):
            return None
        mean = sum(everyone) / len(everyone)
        shrunk = [(sum(g) + _PRIOR * mean) / (len(g) + _PRIOR) for g in brought]
        even = _FLOOR / len(shrunk)
        return [even + (1 - _FLOOR) * m / sum(shrunk) for m in shrunk]
