"""Ranges know what they contain, and refuse to be nonsense."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldrace.config.ranges import Choice, Float, Int, Limits, Name, Range, Switch, Value, shown


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Float, (1.0, 0.5), "low 1 is above high 0.5"),
        (Int, (3, 2), "low 3 is above high 2"),
        (Float, (0.0, 1.0, True), "a log range needs low above 0, got 0"),
        (Int, (0, 8, True), "a log range needs low above 0"),
        (Float, (math.nan, 1.0), "finite bounds"),
        (Float, (0.0, math.inf), "finite bounds"),
        (Choice, ((),), "at least one choice"),
        (Choice, ((1.0, 2.0, 1.0),), "a choice twice"),
    ],
)
def test_nonsense_is_refused(
    kind: type[Float | Int | Choice], arguments: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("chosen", "inside", "outside"),
    [
        (Float(0.1, 0.5), (0.1, 0.3, 0.5), (0.09, 0.51, math.nan, math.inf, -math.inf)),
        (Int(2, 8), (2, 5.0, 8), (1, 9, 2.5, math.nan, math.inf)),
        (Choice((1.0, 4.0)), (1, 4.0), (2, math.nan)),
        (Choice(("sgd", "adamw")), ("sgd",), ("lamb", 1.0)),
        (Name(), ("sgd",), ("", 1.0)),
        (Float(0.0, 1.0), (), ("a",)),
        (Int(0, 1), (), ("a",)),
        (Float(0.0, 1.0), (0, 1), (True, False)),
        (Int(0, 1), (0, 1.0), (True, False)),
        (Choice((0, 1)), (1.0,), (True, False)),
        (Choice((False, True)), (True, False), (0, 1.0, "true")),
        (Choice((True, "/w")), (True, "/w"), (False, 1)),
        (Switch(), (True, False), (0, 1.0, "true", "")),
        (Switch(or_path=True), (True, "/w"), (1, "")),
    ],
)
def test_contains(chosen: Limits, inside: tuple[Value, ...], outside: tuple[Value, ...]) -> None:
    assert all(chosen.contains(value) for value in inside)
    assert not any(chosen.contains(value) for value in outside)


@pytest.mark.parametrize(
    ("chosen", "middle"),
    [
        (Float(0.0, 0.5), 0.25),
        (Float(1e-4, 1e-2, log=True), 1e-3),
        (Int(16, 64), 40),
        (Int(16, 64, log=True), 32),
        (Choice((3.0, 1.0, 2.0)), 2.0),
        (Choice((3.0, 1.0)), 1.0),
        (Choice(("sgd", "adamw", "lamb")), "sgd"),
        (Choice((True, False)), True),
        (Float(0.2, 0.2), 0.2),
    ],
)
def test_middle(chosen: Range, middle: Value) -> None:
    assert chosen.middle() == pytest.approx(middle)
    assert chosen.contains(chosen.middle())


@given(st.floats(1e-12, 1e3), st.floats(1e-12, 1e3))
def test_the_middle_lies_inside(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    for log in (False, True):
        assert low <= Float(low, high, log).middle() * (1 + 1e-12)
        assert Float(low, high, log).middle() <= high * (1 + 1e-12)


def test_words() -> None:
    assert str(Float(1e-4, 0.01, log=True)) == "0.0001 to 0.01 (log)"
    assert str(Int(1, 8)) == "whole numbers 1 to 8"
    assert str(Choice((1.0, 0.5))) == "one of 1, 0.5"
    assert str(Choice(("sgd", "adamw"))) == "one of sgd, adamw"
    assert str(Choice((False, True))) == "one of false, true"
    assert str(Switch()) == "true or false"
    assert [shown(v) for v in (None, True, 1, 0.25, "a")] == ["null", "true", "1", "0.25", "a"]


def test_grids_are_evenly_spaced_with_exact_ends() -> None:
    assert Float(0.1, 0.7).grid(4) == pytest.approx((0.1, 0.3, 0.5, 0.7))
    assert Float(1e-5, 1e-1, log=True).grid(5) == pytest.approx((1e-5, 1e-4, 1e-3, 1e-2, 1e-1))
    for chosen in (Float(0.1, 0.7), Float(1e-5, 3e-3, log=True)):
        assert all(chosen.contains(value) for value in chosen.grid(7))
        assert (chosen.grid(7)[0], chosen.grid(7)[-1]) == (chosen.low, chosen.high)
    assert Float(0.3, 0.3).grid(5) == (0.3,)
    assert Int(2, 5).grid(5) == (2, 3, 4, 5)
    assert Int(1, 5).grid(5) == (1, 2, 3, 4, 5)
    assert Int(0, 20).grid(5) == (0, 5, 10, 15, 20)
    assert Int(1, 256, log=True).grid(5) == (1, 4, 16, 64, 256)
    assert Choice(tuple(range(9))).grid(2) == tuple(range(9))


def test_what_can_be_listed_is() -> None:
    assert list(Int(3, 6).every()) == [3, 4, 5, 6]
    assert Choice(("b", "a")).every() == ("b", "a")
    assert Float(0.5, 0.5).every() == (0.5,)
    assert Float(0.5, 0.6).every() is None
