"""Names and prices: who is let into a blend, and every wish that cannot be met."""

from __future__ import annotations

import numpy as np
import pytest

from foldrace.config.schema import EnsembleConfig
from foldrace.core.errors import ConfigError
from foldrace.ensemble.pool import Member
from foldrace.ensemble.selection.eligible import (
    Prices,
    find_limits,
    included_members,
    wish_problems,
    without_excluded,
)
from foldrace.ensemble.selection.members import is_named, member_name

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
    assert included_members(MEMBERS, LOSSES, include) == forced
    if forced:
        tied = included_members(MEMBERS, np.zeros(len(MEMBERS)), include)
        assert all(a <= b for a, b in zip(tied, forced, strict=False))


def test_every_wrong_wish_at_once() -> None:
    config = EnsembleConfig(method="optimum", exclude=("x", "c0001"), include=("y", "c0002 ema"))
    found = [str(p) for p in wish_problems(MEMBERS, config)]
    assert found[0].startswith("ensemble.method: got 'optimum'; did you mean 'optimal'?")
    allowed = (
        "names no member; candidates: c0001, c0002, mine; backbones: timm/a, timm/b; a variant: "
        "`c0001 ema`; those of one run folder: `RUN:c0001`, RUN one of other"
    )
    assert found[1:] == [
        f"ensemble.exclude: 'x' {allowed}",
        f"ensemble.include: 'y' {allowed}",
        f"ensemble.include: 'c0002 ema' {allowed}",
    ]
    assert wish_problems(MEMBERS, EnsembleConfig(exclude=("timm/a",), include=("mine",))) == []


def test_forced_names_that_may_not_enter_or_cannot_predict() -> None:
    config = EnsembleConfig(
        exclude=("c0001", "timm/b"), include=("c0001 ema", "c0009", "mine", "timm/a", "other:c0002")
    )
    gone = [Member("c0009", "raw", "timm/c")]
    assert [str(p) for p in wish_problems(MEMBERS, config, gone)] == [
        "ensemble.include: 'c0001 ema' is excluded by ensemble.exclude ('c0001'); leave it out of "
        "one of the two",
        "ensemble.include: 'c0009' cannot predict: not all its folds ended, or its weights are "
        "gone; leave it out, or train it again",
        "ensemble.include: 'timm/a' is excluded by ensemble.exclude ('c0001'); leave it out of one "
        "of the two",
        "ensemble.include: 'other:c0002' is excluded by ensemble.exclude ('timm/b'); leave it out "
        "of one of the two",
    ]
    assert wish_problems(MEMBERS, EnsembleConfig(exclude=("c0009",)), gone) == []
    half = EnsembleConfig(exclude=("c0001 ema",), include=("c0001",))
    assert wish_problems(MEMBERS, half, gone) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("c0002", [0, 1, 2]),
        ("other:c0002", [1]),
        ("runs/other:c0002 raw", [1]),
        ("runs/other/:timm/b", [1]),
        ("s3://bucket/sweep:c0002", [2]),
        ("sweep:c0002", [2]),
        (":c0002", [0]),
        (":timm/b", [0]),
        ("hub:org/x", [3]),
        ("other:", []),
        ("no:c0002", []),
        ("other:c0003", []),
    ],
)
def test_names_with_a_run_folder(name: str, expected: list[int]) -> None:
    members = [
        Member("c0002", "raw", "timm/b"),
        Member("c0002", "raw", "timm/b", run="runs/other"),
        Member("c0002", "raw", "timm/b", run="s3://bucket/sweep"),
        Member("c0003", "raw", "hub:org/x"),
    ]
    assert [i for i, m in enumerate(members) if is_named(m, name)] == expected


def test_members_are_told_apart_by_their_run_folder() -> None:
    assert [member_name(m) for m in MEMBERS[2:4]] == ["c0002 raw", "c0002 raw of other"]


def test_a_copy_is_forced_in_as_the_member_that_is_kept() -> None:
    copies = [(MEMBERS[2], Member("c0005", "raw", "timm/b")), (MEMBERS[0], Member("c0006"))]
    for include, forced in (("c0005", (2,)), ("c0006 raw", (0,)), ("timm/b", (3,))):
        assert included_members(MEMBERS, LOSSES, (include,), copies) == forced


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
        "ensemble.max_ms_per_image: cannot be applied to mine added: the time and size "
        "of predictions made elsewhere are unknown; drop --add or the limit",
        "ensemble.max_bytes: is 29; ensemble.include (c0001 ema, c0001 raw) needs 30 bytes",
        "ensemble.max_members: is 1, but ensemble.include forces 2 in; raise it, or shorten the "
        "list",
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
