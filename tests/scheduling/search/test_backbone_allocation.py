"""Minimum shares, and what goes beyond them."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import pytest

from foldrace.scheduling.search.backbone_allocation import BackboneAllocation

_FOUR = ("a", "b", "c", "d")


def _sweep(
    backbones: Sequence[str],
    candidates: int,
    min_share: float,
    gain: Callable[[str], float | None],
    seed: int = 0,
    cost: Mapping[str, float | None] = MappingProxyType({}),
) -> list[str]:
    """The backbones of a whole sweep, candidate by candidate; each gain is known at once."""
    allocation = BackboneAllocation(backbones, candidates, min_share, seed)
    gains: dict[str, list[float]] = {b: [] for b in backbones}
    chosen: list[str] = []
    for number in range(candidates):
        backbone = allocation.choose(number, Counter(chosen), gains, cost)
        chosen.append(backbone)
        value = gain(backbone)
        if value is not None:
            gains[backbone].append(value)
    return chosen


@pytest.mark.parametrize("candidates", [1, 4, 22, 40])
def test_a_minimum_share_of_one_is_round_robin(candidates: int) -> None:
    chosen = _sweep(_FOUR, candidates, 1.0, lambda b: 1.0 if b == "d" else 0.0)
    assert chosen == [_FOUR[i % 4] for i in range(candidates)]


def test_without_any_gain_it_is_round_robin_too() -> None:
    for gain in (lambda b: None, lambda b: -0.1):
        assert _sweep(_FOUR, 18, 0.0, gain) == [_FOUR[i % 4] for i in range(18)]


@pytest.mark.parametrize("min_share", [0.0, 0.25, 0.5, 0.8, 1.0])
@pytest.mark.parametrize(("count", "candidates"), [(4, 40), (3, 50), (7, 30), (5, 5), (4, 3)])
def test_everyone_has_its_minimum(count: int, candidates: int, min_share: float) -> None:
    backbones = [f"b{i}" for i in range(count)]
    entitled = max(1, math.floor(min_share * candidates / count)) if count <= candidates else 0
    for seed in range(20):
        chosen = _sweep(backbones, candidates, min_share, lambda b: float(b == "b1"), seed)
        counts = Counter(chosen)
        assert min(counts[b] for b in backbones) >= entitled
        assert len(chosen) == candidates


def test_minimum_shares_are_spread_over_the_sweep() -> None:
    chosen = _sweep(_FOUR, 80, 0.5, lambda b: float(b == "d"))
    for started in (16, 40, 80):  # 1/8 of those started, each
        assert min(Counter(chosen[:started]).values()) >= started // 8
    assert Counter(chosen[:16])["d"] > 16 / 4  # who brings something need not wait


def test_who_brings_everything_gets_the_most() -> None:
    counts = [Counter(_sweep(_FOUR, 100, 0.4, lambda b: float(b == "c"), s)) for s in range(30)]
    mean = {b: sum(c[b] for c in counts) / len(counts) for b in _FOUR}
    assert mean["c"] > 2 * max(mean[b] for b in "abd")
    assert all(c["c"] == max(c.values()) for c in counts)


def test_probabilities_have_their_closed_form() -> None:
    allocation = BackboneAllocation(("a", "b", "c"), 10, 0.0, 0)
    probabilities = allocation.probabilities({"a": [0.3, -9.0], "b": [0.0], "gone": [5.0]}, {})
    mean = 0.3 / 3
    shrunk = [(0.3 + 4 * mean) / 6, 4 * mean / 5, mean]
    expected = [0.1 / 3 + 0.9 * m / sum(shrunk) for m in shrunk]
    assert probabilities == pytest.approx(expected)
    assert sum(expected) == pytest.approx(1.0)


def test_the_gain_is_divided_by_the_cost() -> None:
    allocation = BackboneAllocation(("a", "b", "c", "d"), 10, 0.0, 0)
    cost = {"a": 10.0, "b": 50.0, "c": None, "gone": 1.0}  # the unknown ones: 30 s
    probabilities = allocation.probabilities({b: [0.2] for b in _FOUR}, cost)
    rates = [1 / 10, 1 / 50, 1 / 30, 1 / 30]
    expected = [0.1 / 4 + 0.9 * rate / sum(rates) for rate in rates]
    assert probabilities == pytest.approx(expected)
    seconds = allocation.probabilities({b: [0.2] for b in _FOUR}, {"a": 1.0, "b": 5.0})
    assert seconds == pytest.approx(expected)  # the unit does not matter


def test_of_two_that_bring_the_same_the_cheap_one_gets_more_candidates() -> None:
    cost = {"a": 30.0, "b": 120.0}
    counts = [Counter(_sweep(("a", "b"), 100, 0.2, lambda b: 0.1, s, cost)) for s in range(30)]
    mean = sum(c["a"] for c in counts) / len(counts)
    share = 0.05 + 0.9 * 4 / 5  # which leaves the other one above its minimum
    assert mean == pytest.approx(100 * share, abs=4 * (100 * share * (1 - share) / 30) ** 0.5 + 1)


def test_draws_follow_the_probabilities() -> None:
    allocation = BackboneAllocation(("a", "b"), 1000, 0.0, 3)
    gains = {"a": [0.2, 0.1], "b": [0.0, 0.0, 0.0]}
    cost = {"a": 2.0, "b": 1.0}
    probabilities = allocation.probabilities(gains, cost)
    assert probabilities is not None
    drawn = [allocation.choose(n, {"a": 400, "b": 400}, gains, cost) for n in range(4000)]
    error = math.sqrt(probabilities[0] * probabilities[1] / 4000)
    assert drawn.count("a") / 4000 == pytest.approx(probabilities[0], abs=4 * error)


def test_a_choice_depends_on_its_number_and_seed_alone() -> None:
    """So a resumed sweep chooses what the first one would have chosen."""
    gains = {b: [0.1 * i] for i, b in enumerate(_FOUR)}
    started = dict.fromkeys(_FOUR, 10)

    def row(seed: int, order: Sequence[int]) -> dict[int, str]:
        allocation = BackboneAllocation(_FOUR, 80, 0.2, seed)
        return {n: allocation.choose(n, started, gains, {"a": 3.0}) for n in order}

    assert row(5, range(40, 80)) == row(5, range(79, 39, -1))
    assert row(5, range(40, 80)) != row(6, range(40, 80))


def test_a_backbone_added_on_resume_catches_up() -> None:
    allocation = BackboneAllocation((*_FOUR, "new"), 100, 0.5, 0)
    started = Counter(dict.fromkeys(_FOUR, 10))
    for number in range(40, 44):  # it is entitled to a tenth of them
        assert allocation.choose(number, started, {b: [1.0] for b in _FOUR}, {}) == "new"
        started["new"] += 1


@pytest.mark.parametrize("min_share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("count", "candidates"), [(4, 40), (3, 50), (5, 5), (4, 22)])
def test_who_goes_first_while_another_waits_takes_nobodys_minimum(
    count: int, candidates: int, min_share: float
) -> None:
    """The first backbone never has a place of its own accord: others go first as often as they may,
    and only then it is waited for."""
    backbones = [f"b{i}" for i in range(count)]
    allocation = BackboneAllocation(backbones, candidates, min_share, 0)
    started = Counter[str]()
    rng = random.Random(candidates)
    for number in range(candidates):
        chosen = allocation.choose(number, started, {}, {})
        others = [b for b in backbones[1:] if allocation.may_go_first(b, started)]
        if chosen == "b0" and others:
            chosen = rng.choice(others)
        started[chosen] += 1
    entitled = max(1, math.floor(min_share * candidates / count))
    assert min(started[b] for b in backbones) >= entitled
    assert started["b0"] == entitled
