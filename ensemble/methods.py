"""The table of blend methods: one record a method, looked up by the config's `ensemble.method`.

Takes a name and a `Pool`; gives a `Fit`. A new method is one function and one row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ensemble.fit import Fit, Settings, mixture_fit
from ensemble.greedy import greedy
from ensemble.pool import Pool
from experiment.errors import ConfigError, Problem
from experiment.names import check_name


@dataclass(frozen=True)
class Method:
    """One way to combine members."""

    name: str
    doc: str
    function: Callable[[Pool, Settings], Fit]


def _greedy(pool: Pool, settings: Settings) -> Fit:
    return mixture_fit(greedy(pool.true_prob, settings.max_rounds))


_ROWS = (
    Method(
        "greedy",
        "adds the member that helps most, round by round, and keeps the best prefix",
        _greedy,
    ),
)

METHODS = {method.name: method for method in _ROWS}


def fit_method(name: str, pool: Pool, settings: Settings) -> Fit:
    """The method of that name on the pool; ConfigError if there is none."""
    problem = check_method(name)
    if problem is not None:
        raise ConfigError([problem])
    return METHODS[name].function(pool, settings)


def check_method(name: str) -> Problem | None:
    """What is wrong with the name, or None."""
    return check_name("ensemble.method", name, METHODS)
