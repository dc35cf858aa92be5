"""Which backbone the next candidate has: minimum shares first, then by gain per cost.

Takes counts, gains over the race's blend and costs, gives a backbone. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from foldrace.core.random_streams import Stream, generator

_PRIOR = 4.0
"""Weight, in candidates, of the mean of all backbones in the mean of each."""
_FLOOR = 0.1
"""Part of the probability beyond the minimum shares that all backbones have alike."""


class BackboneAllocation:
    """Even at first, then by results.

    With n candidates started of N, a backbone of B is behind while it has fewer than
    max(min_share·N/B, 1)·(n+1)/N of them; the one with the fewest goes first. When none is behind,
    P(b) = 0.1/B + 0.9·r_b/Σr with r_b = m_b/c_b, the mean gain drawn towards that of all,
    m_b = (Σ max(gain, 0) + 4·mean of all) / (gains of b + 4), over the cost of a fold trial, c_b.
    """

    def __init__(
        self, backbones: Sequence[str], candidates: int, min_share: float, seed: int
    ) -> None:
        self._backbones, self._seed, self._candidates = tuple(backbones), seed, candidates
        self._rate = max(min_share / len(backbones), 1 / candidates)

    def choose(
        self,
        number: int,
        started: Mapping[str, int],
        gains: Mapping[str, Sequence[float]],
        cost: Mapping[str, float | None],
    ) -> str:
        """The backbone of candidate `number`; the same arguments give the same backbone.

        `started`: candidates of each backbone so far; `gains`: the latest gain of each of its
        candidates that has one (nats per row); `cost`: mean device-seconds of its fold trials. A
        backbone whose cost is missing or None has the mean of the others'.
        """
        fewest = min(self._backbones, key=lambda b: started.get(b, 0))  # the first one on a tie
        due = self._rate * (sum(started.values()) + 1)
        if started.get(fewest, 0) < due:
            return fewest
        probabilities = self.probabilities(gains, cost)
        if probabilities is None:
            return fewest
        draw = generator(self._seed, Stream.BACKBONE, number)
        return self._backbones[int(draw.choice(len(probabilities), p=probabilities))]

    def may_go_first(self, backbone: str, started: Mapping[str, int]) -> bool:
        """True where a candidate of another backbone than the chosen one leaves the minimum shares.

        It may take the chosen one's turn while that waits for a GPU.
        """
        least = int(self._rate * self._candidates + 1e-9)
        after = Counter(started) + Counter([backbone])
        owed = sum(max(0, least - after[b]) for b in self._backbones)
        return sum(after.values()) + owed <= self._candidates

    def probabilities(
        self, gains: Mapping[str, Sequence[float]], cost: Mapping[str, float | None]
    ) -> list[float] | None:
        """(B,) probabilities beyond the minimum shares; None without any gain above 0."""
        positive = [[max(g, 0.0) for g in gains.get(b, ())] for b in self._backbones]
        everything = [g for of_one in positive for g in of_one]
        if not sum(everything):
            return None
        mean = sum(everything) / len(everything)
        shrunk = [(sum(g) + _PRIOR * mean) / (len(g) + _PRIOR) for g in positive]
        known = [c for b in self._backbones if (c := cost.get(b))]
        usual = sum(known) / len(known) if known else 1.0
        rates = [m / (cost.get(b) or usual) for b, m in zip(self._backbones, shrunk, strict=True)]
        even = _FLOOR / len(rates)
        return [even + (1 - _FLOOR) * rate / sum(rates) for rate in rates]
