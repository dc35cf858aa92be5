"""Rungs and places at them, against brute force."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldrace.config.hyperparameters import TrialParams
from foldrace.config.schema import RaceConfig
from foldrace.scheduling.rungs import (
    Rung,
    RungRecords,
    fractions,
    losses_of,
    rungs_of,
    seconds_of,
)
from tests.scheduling.raced_runs import log_of


def setting(grace: float = 0.25, reduction: int = 2) -> RaceConfig:
    return RaceConfig(grace=grace, reduction=reduction)


def at(config: RaceConfig, **params: Any) -> list[tuple[float, int]]:
    return [(rung.fraction, rung.epoch) for rung in rungs_of(config, TrialParams(**params))]


@pytest.mark.parametrize(
    ("config", "epochs", "expected"),
    [
        (setting(), 30, [(0.25, 8), (0.5, 15)]),
        (setting(), 4, [(0.25, 1), (0.5, 2)]),
        (setting(), 3, [(0.25, 1), (0.5, 2)]),
        (setting(), 2, [(0.5, 1)]),  # half of the schedule, whatever else it serves
        (setting(), 1, []),
        (setting(0.1, 3), 30, [(0.1, 3), (0.3, 9), (0.9, 27)]),  # 0.1 * 30 and 0.3 * 30 round up
        (setting(0.1, 10), 30, [(0.1, 3)]),
        (setting(0.9), 5, []),  # the fifth is the last
    ],
)
def test_rungs(config: RaceConfig, epochs: int, expected: list[tuple[float, int]]) -> None:
    found = at(config, epochs=epochs)
    assert [epoch for _, epoch in found] == [epoch for _, epoch in expected]
    assert [f for f, _ in found] == pytest.approx([f for f, _ in expected])


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"cycles": 2}, [(0.5, 15)]),  # the end of the first cycle serves both fractions
        ({"cycles": 3}, [(0.25, 10), (0.5, 20)]),
        ({"cycles": 5}, [(0.25, 12), (0.5, 18)]),
        ({"freeze_epochs": 1}, [(0.5, 15)]),  # 8 < 1 + 8
        ({"freeze_epochs": 3, "unfreeze_epochs": 4}, [(0.5, 15)]),
        ({"freeze_epochs": 3, "unfreeze_epochs": 5}, []),
        ({"freeze_epochs": 2, "cycles": 3}, [(0.25, 10), (0.5, 20)]),
        ({"freeze_epochs": 3, "cycles": 3}, [(0.5, 20)]),
    ],
)
def test_grace_of_curves_that_cross(
    params: dict[str, int], expected: list[tuple[float, int]]
) -> None:
    assert at(setting(), epochs=30, **params) == expected


@given(
    st.floats(0.01, 0.99), st.integers(2, 5), st.integers(1, 60), st.integers(1, 6),
    st.integers(0, 9), st.integers(0, 9),
)  # fmt: skip
def test_rungs_by_brute_force(
    grace: float, reduction: int, epochs: int, cycles: int, freeze: int, unfreeze: int
) -> None:
    """Every epoch is asked which fractions it is the first one for."""
    config, cycles = setting(grace, reduction), min(cycles, epochs)
    lengths = [len(part) for part in np.array_split(np.arange(epochs), cycles)]
    params = {"cycles": cycles, "freeze_epochs": freeze, "unfreeze_epochs": unfreeze}
    found = at(config, epochs=epochs, **params)
    assert found == sorted(found, key=lambda rung: rung[1])
    assert len({epoch for _, epoch in found}) == len(found)
    frozen = freeze + unfreeze
    for fraction, epoch in found:
        assert fraction in fractions(config)
        assert fraction <= epoch / epochs + 1e-9 and 1 <= epoch < epochs
        assert not frozen or epoch - frozen >= grace * epochs - 1e-8
        later = [f for f in fractions(config) if fraction < f <= epoch / epochs]
        assert not later
        if cycles == 1:
            assert epoch == 1 or (epoch - 1) / epochs < fraction
        else:  # cycles differ by an epoch at most, whatever their order
            assert any(abs(epoch - i * epochs / cycles) < 1 for i in range(1, cycles))
            assert epoch - max(lengths) < fraction * epochs
    if not frozen and cycles == 1 and 1 < grace * epochs <= epochs - 1:
        assert found[0][0] == grace


@given(
    st.lists(st.tuples(st.integers(0, 9), st.floats(0, 5)), min_size=1, max_size=40),
    st.integers(2, 4),
)
def test_places_by_brute_force(seen: list[tuple[int, float]], reduction: int) -> None:
    """Also where a trial comes again with another loss."""
    records, latest = RungRecords(), dict[str, float]()
    for number, loss in seen:
        latest[str(number)] = loss
        records.add(str(number), 0, [Rung(0.5, 1)], [loss])
        place = records.place(str(number), 0, 0.5, reduction)
        others = sorted(latest.values())
        best = others[: len(others) // reduction]
        assert (place.loss, place.count) == (loss, len(latest))
        assert place.cut == (best[-1] if best else None)
        assert place.is_among_best == (not best or loss <= best[-1])
        assert place.rank == pytest.approx(
            (sum(other < loss for other in others) + 0.5) / len(others)
        )


def test_a_record_is_the_loss_at_the_rung() -> None:
    records = RungRecords()
    rungs = [Rung(0.25, 2), Rung(0.5, 4), Rung(0.75, 6)]
    records.add("a", 1, rungs, [0.9, 0.5, 0.7, 0.6, 0.1])
    assert [records.place("a", 1, f, 2).loss for f in (0.25, 0.5)] == [0.5, 0.6]
    assert records.has("a", 1, 0.5) and not records.has("a", 1, 0.75)  # not reached
    assert not records.has("a", 0, 0.5)  # another fold


def test_the_better_variant_counts() -> None:
    assert losses_of(log_of([0.5, 0.4], [0.6, 0.1])) == [0.5, 0.1]
    assert losses_of(log_of([0.5, math.nan])) == [0.5, math.inf]
    assert losses_of("") == []


@pytest.mark.parametrize("log", ["epoch\n1\n", log_of([0.5]).replace("0.5", "half"), "a\n\0\n"])
def test_a_damaged_log_has_no_losses(log: str) -> None:
    with pytest.raises(ValueError):
        losses_of(log)


def test_seconds_are_those_of_all_epochs() -> None:
    assert seconds_of(log_of([0.5, 0.4, 0.3])) == 6.0
    assert seconds_of("epoch,seconds\n0,1.5\n1,\n") == 1.5
    assert seconds_of("epoch\n0\n") == seconds_of("epoch,seconds\n0,half\n") == 0.0
