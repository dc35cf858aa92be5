"""The table of blend methods: one record a method, looked up by the config's `ensemble.method`.

Takes a name and a `Pool`; gives a `Fit`. A new method is one function and one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from foldrace.core.errors import ConfigError, Problem, check_name
from foldrace.core.plugins import NO_PARTS, Parts, Table
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
    """The members that it can use at all: limits are to be met by such members."""
    takes_one_candidate: bool = False
    """It chooses one candidate's members alone, so that none can be forced in."""
    fits_weights: bool = False
    """True: without a member it would refit the weights of the others, even if they come out
    equal."""
    in_auto: bool = False
    """`auto` tries it: it won somewhere in `benchmarks/generalisation.py`. With few rows that is a
    mixture, with many a pooling of logarithms."""
    needs_soups: bool = False
    """Soups are made before the choice."""
    needs_snapshots: bool = False
    """It has nothing to choose from where no trial keeps a snapshot."""


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
    """Certified weights; forced members get what one round of `greedy` would give them.

    The certificate compares with the best of all blends, so that their price is in it.
    """
    least = 1.0 / settings.rounds
    blend = optimal(pool.true_prob, forced=settings.forced, min_weight=least)
    return mixture_fit(certified(pool.true_prob, blend.weights) if settings.forced else blend)


def _soup(pool: Pool, settings: Settings) -> Fit:
    """The soup with the least OOF loss, alone; the lowest on a tie."""
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
        fits_weights=True,
        in_auto=True,
    ),
    Method("optimal", "the weights of the least OOF loss, to 1e-6", _optimal, fits_weights=True),
    Method("uniform", "all members with the same weight", uniform),
    Method("top-k", "the best k members with the same weight, k by the OOF loss", top_k),
    Method("soft-vote", "the mean of one variant a candidate", soft_vote),
    Method("hard-vote", "one vote a candidate for its most probable class", hard_vote),
    Method(
        "snapshot",
        "the mean of one candidate's last snapshots and last epoch",
        snapshot,
        takes=is_snapshot,
        takes_one_candidate=True,
        needs_snapshots=True,
    ),
    Method(
        "geometric",
        "product of up to 20 members' probabilities to fitted powers",
        geometric,
        in_auto=True,
    ),
    Method(
        "stacking",
        "logistic regression on up to 20 members' log-probabilities",
        stacking,
        in_auto=True,
    ),
    Method(
        "soup",
        "the best average of one candidate's or backbone's weights, alone",
        _soup,
        takes=_is_soup,
        takes_one_candidate=True,
        needs_soups=True,
    ),
)

AUTO = "auto"
"""In place of a name: the method that the cross-fitted losses choose (see `calibration`)."""

METHODS = Table(Method, "blend method", _ROWS)


def fit_method(name: str, pool: Pool, settings: Settings, parts: Parts = NO_PARTS) -> Fit:
    """Fit the method of that name to the pool.

    Raises ConfigError where there is none, or it can force no member in.
    """
    problem = check_name("ensemble.method", name, parts[METHODS])  # `auto` is none of them
    problem = problem or check_include(name, settings.forced, parts)
    if problem is not None:
        raise ConfigError([problem])
    return parts[METHODS][name].function(pool, settings)


def check_method(name: str, parts: Parts = NO_PARTS) -> Problem | None:
    """Say what is wrong with the name, or None."""
    return check_name("ensemble.method", name, (*parts[METHODS], AUTO))


def check_include(name: str, include: Sequence[object], parts: Parts = NO_PARTS) -> Problem | None:
    """Say that the method, of any name, can force nothing of `include` in, or None."""
    method = parts[METHODS].get(name)
    if not include or method is None or not method.takes_one_candidate:
        return None
    message = f"the method {name!r} can force none in; empty the list or use another method"
    return Problem("ensemble.include", message)
