"""The table of blend methods: one record a method, looked up by the config's `ensemble.method`.

Takes a name and a `Pool`; gives a `Fit`. A new method is one function and one row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from foldrace.core.errors import ConfigError, Problem, check_name
from foldrace.ensemble.pool import Member, Pool, own_losses
from foldrace.ensemble.pooling import Fit, Settings, mixture_fit
from foldrace.ensemble.solvers.equal_weights import (
    equal_weights,
    hard_vote,
    is_snapshot,
    snapshot,
    soft_vote,
    top_k,
    uniform,
)
from foldrace.ensemble.solvers.greedy import greedy
from foldrace.ensemble.solvers.kernels import certified
from foldrace.ensemble.solvers.optimal import optimal
from foldrace.ensemble.solvers.stacking import geometric, stacking


@dataclass(frozen=True)
class Method:
    """One way to combine members."""

    name: str
    doc: str
    function: Callable[[Pool, Settings], Fit]
    """(members and rows to look at, the config's wishes) -> the combination found. It must not
    depend on the order of members or rows; a user's mistake is a ConfigError."""
    takes: Callable[[Member], bool] = lambda member: True
    """Whether it can use a member at all: limits are to be met by such members."""


def _greedy(pool: Pool, settings: Settings) -> Fit:
    return mixture_fit(
        greedy(
            pool.true_prob,
            max_rounds=settings.rounds,
            bags=settings.bags,
            forced=settings.forced,
        )
    )


def _optimal(pool: Pool, settings: Settings) -> Fit:
    """Forced members get what one round of `greedy` would give them; the certificate compares with
    the best of all blends, so their price is in it."""
    least = 1.0 / settings.rounds
    blend = optimal(pool.true_prob, forced=settings.forced, min_weight=least)
    return mixture_fit(certified(pool.true_prob, blend.weights) if settings.forced else blend)


def _soup(pool: Pool, settings: Settings) -> Fit:
    """The soup with the least OOF loss, alone; the lowest on a tie."""
    if settings.forced:
        raise ConfigError.single(
            "ensemble.include",
            "the method 'soup' takes one soup alone and can force no member in; empty the list or "
            "use another method",
        )
    soups = [i for i, member in enumerate(pool.members) if _is_soup(member)]
    if not soups:
        raise ConfigError.single(
            "ensemble.method",
            "'soup' needs soups, and no member is one: `ensemble DIR --method soup` tries them and "
            "keeps those that beat the best of their models; use another method",
        )
    best = soups[int(np.argmin(own_losses(pool)[soups]))]
    return mixture_fit(certified(pool.true_prob, equal_weights([best], len(pool.members))))


def _is_soup(member: Member) -> bool:
    return member.variant == "soup"


_ROWS = (
    Method(
        "greedy",
        "adds the member that helps most, round by round, and keeps the best prefix",
        _greedy,
    ),
    Method("optimal", "the weights of the least OOF loss, to 1e-6", _optimal),
    Method("uniform", "all members with the same weight", uniform),
    Method("top-k", "the best k members with the same weight, k by the OOF loss", top_k),
    Method("soft-vote", "the mean of one variant a candidate", soft_vote),
    Method("hard-vote", "one vote a candidate for its most probable class", hard_vote),
    Method("snapshot", "the mean of one candidate's last snapshots", snapshot, is_snapshot),
    Method("geometric", "product of up to 20 members' probabilities to fitted powers", geometric),
    Method("stacking", "logistic regression on up to 20 members' log-probabilities", stacking),
    Method(
        "soup",
        "the best average of one candidate's or backbone's weights, alone",
        _soup,
        _is_soup,
    ),
)

AUTO = "auto"
"""In place of a name: the method with the least cross-fitted loss (see `automatic`)."""

METHODS = {method.name: method for method in _ROWS}


def fit_method(name: str, pool: Pool, settings: Settings) -> Fit:
    """The method of that name on the pool; ConfigError if there is none."""
    problem = check_name("ensemble.method", name, METHODS)  # `auto` is none of them
    if problem is not None:
        raise ConfigError([problem])
    return METHODS[name].function(pool, settings)


def check_method(name: str) -> Problem | None:
    """What is wrong with the name, or None."""
    return check_name("ensemble.method", name, (*METHODS, AUTO))
