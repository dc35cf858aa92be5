"""Names and prices: who is let into a blend, and every wish that cannot be met."""

from __future__ import annotations

import numpy as np
import pytest

from ensemble.eligible import (
    Prices,
    check_wishes,
    find_limits,
    forced_members,
    without_excluded,
)
from ensemble.pool import Member
from experiment.config import EnsembleConfig
from experiment.errors import ConfigError

MEMBERS = (
    Member("c0001", "ema", "timm/a"),
    Member("c0001", "raw", "timm/a"),
    Member("c0002", "raw", "timm/b"),
    Member("c0002", "raw", "timm/b", run="other"),
    Member("mine", "added"),
)
LOSSES = np.array([0.3, 0.2, 0.5, 0.4, 0.1])


@pytest.mark.parametrize(
    ("exclude", "kept"),
    [
        ((), [0, 1, 2, 3, 4]),
        (("c0001",), [2, 3, 4]),
        (("c0001 ema",), [1, 2, 3, 4]),
        (("timm/a", "mine"), [2, 3]),
        (("c0002",), [0, 1, 4]),  # of every run folder
        (("c000",), [0, 1, 2, 3, 4]),  # no prefix
    ],
)
def test_excluded(exclude: tuple[str, ...], kept: list[int]) -> None:
    assert without_excluded(MEMBERS, exclude) == kept


def test_nothing_left() -> None:
    with pytest.raises(ConfigError, match="excludes all 5 members"):
        without_excluded(MEMBERS, ("timm/a", "timm/b", "mine"))


@pytest.mark.parametrize(
    ("include", "forced"),
    [
        ((), ()),
        (("c0001",), (1,)),
        (("c0001 ema",), (0,)),
        (("timm/b", "timm/a"), (1, 3)),
        (("mine", "c0001", "timm/a"), (1, 4)),
    ],
)
def test_forced(include: tuple[str, ...], forced: tuple[int, ...]) -> None:
    """Of each name the one with the least loss; the first on a tie."""
    assert forced_members(MEMBERS, LOSSES, include) == forced
    if forced:
        tied = forced_members(MEMBERS, np.zeros(len(MEMBERS)), include)
        assert all(a <= b for a, b in zip(tied, forced, strict=False))


def test_every_wrong_wish_at_once() -> None:
    config = EnsembleConfig(method="optimum", exclude=("x", "c0001"), include=("y", "c0002 ema"))
    with pytest.raises(ConfigError) as caught:
        check_wishes(MEMBERS, config)
    found = [str(p) for p in caught.value.problems]
    assert found[0].startswith("ensemble.method: got 'optimum'; did you mean 'optimal'?")
    allowed = (
        "names no member; candidates: c0001, c0002, mine; backbones: timm/a, timm/b; a variant: "
        "`c0001 ema`"
    )
    assert found[1:] == [
        f"ensemble.exclude: 'x' {allowed}",
        f"ensemble.include: 'y' {allowed}",
        f"ensemble.include: 'c0002 ema' {allowed}",
    ]
    check_wishes(MEMBERS, EnsembleConfig(exclude=("timm/a",), include=("mine",)))


def prices(ms: list[float], size: list[int]) -> Prices:
    return Prices(
        dict(zip(MEMBERS, ms, strict=False)), dict(zip(MEMBERS, size, strict=False)), "abacus"
    )


def test_limits_as_asked() -> None:
    known = prices([1, 2, 3, 4, 5], [10, 20, 30, 40, 50])
    none = find_limits(MEMBERS, known, EnsembleConfig(), ())
    assert not none.bounded and none.costs.shape == (0, 5)
    config = EnsembleConfig(max_ms_per_image=6.5, max_bytes=60, max_members=3)
    limits = find_limits(MEMBERS, known, config, (1,))
    np.testing.assert_array_equal(limits.costs, [[1, 2, 3, 4, 5], [10, 20, 30, 40, 50]])
    assert limits.budgets.tolist() == [6.5, 60] and limits.max_members == 3
    assert limits.admit((0, 1, 2)) and not limits.admit((2, 3)) and not limits.admit((0, 1, 4))
    (only,) = find_limits(MEMBERS, known, EnsembleConfig(max_bytes=60), ()).costs
    assert only.tolist() == [10, 20, 30, 40, 50]


def test_a_budget_for_exactly_one() -> None:
    known = prices([1, 2, 3, 4, 5], [10, 20, 30, 40, 50])
    assert find_limits(MEMBERS, known, EnsembleConfig(max_ms_per_image=1.0), ()).admit((0,))


def test_every_limit_that_cannot_be_held_at_once() -> None:
    known = prices([1, 2, 3, 4], [10, 20, 30, 40, 50])
    config = EnsembleConfig(max_ms_per_image=6.5, max_bytes=29, max_members=1)
    with pytest.raises(ConfigError) as caught:
        find_limits(MEMBERS, known, config, (0, 1))
    assert [str(p) for p in caught.value.problems] == [
        "ensemble.max_ms_per_image: cannot hold: mine added could not be measured; exclude them "
        "(or leave out their --add)",
        "ensemble.max_bytes: is 29; ensemble.include (c0001 ema, c0001 raw) needs 30 bytes",
        "ensemble.max_members: is 1, but ensemble.include forces 2 in",
    ]
    with pytest.raises(ConfigError, match="the cheapest member, c0001 ema, needs 10 bytes"):
        find_limits(MEMBERS, known, EnsembleConfig(max_bytes=9), ())


def test_each_limit_can_be_met_but_not_both() -> None:
    known = prices([1, 2, 3, 4, 5], [50, 40, 30, 20, 10])
    config = EnsembleConfig(max_ms_per_image=2, max_bytes=30)
    with pytest.raises(ConfigError) as caught:
        find_limits(MEMBERS, known, config, ())
    assert [str(p) for p in caught.value.problems] == [
        "ensemble.max_ms_per_image: no member meets both this and ensemble.max_bytes; raise one of "
        "them"
    ]


def test_only_members_that_the_method_takes_must_fit() -> None:
    """What a snapshot costs decides where only snapshots may enter."""
    members = (Member("c0001"), Member("c0001", "snap1"), Member("c0001", "snap2"))
    sizes = Prices({}, dict(zip(members, (10, 30, 20), strict=True)))
    config = EnsembleConfig(method="snapshot", max_bytes=15)
    with pytest.raises(ConfigError, match="is 15; the cheapest member, c0001 snap2, needs 20 byte"):
        find_limits(members, sizes, config, ())
    find_limits(members, sizes, config.model_copy(update={"method": "greedy"}), ())
    find_limits(members[:1], sizes, config, ())  # that there is none, the method tells
