"""The table of blend methods: one record a method, looked up by the config's `ensemble.method`.

Takes a name and true_prob (M, N); gives a `Blend`. A new method is one function and one row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from numpy.typing import ArrayLike

from ensemble.blend import Blend
from ensemble.greedy import greedy
from experiment.errors import ConfigError, Problem
from experiment.names import check_name


@dataclass(frozen=True)
class Method:
    """One way to choose the weights."""

    name: str
    doc: str
    function: Callable[[ArrayLike, int, int | None], Blend]
    """(true_prob (M, N), max_rounds, max_members) -> Blend; without rounds, it ignores them."""


_ROWS = (
    Method(
        "greedy",
        "adds the member that helps most, round by round, and keeps the best prefix",
        greedy,
    ),
)

METHODS = {method.name: method for method in _ROWS}


def blend(
    name: str, true_prob: ArrayLike, max_rounds: int = 50, max_members: int | None = None
) -> Blend:
    """The blend of true_prob (M, N) by the method of that name; ConfigError if there is none."""
    problem = check_method(name)
    if problem is not None:
        raise ConfigError([problem])
    return METHODS[name].function(true_prob, max_rounds, max_members)


def check_method(name: str) -> Problem | None:
    """What is wrong with the name, or None."""
    return check_name("ensemble.method", name, METHODS)
