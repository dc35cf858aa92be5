"""Which members the config lets into a blend: names left out or forced in, and limits.

Takes members and the config's settings, gives indices and `Limits`; all that cannot be met is
reported at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from posixpath import basename

import numpy as np
from numpy.typing import NDArray

from foldrace.config.schema import EnsembleConfig
from foldrace.core.errors import ConfigError, Problem, listing
from foldrace.core.metrics import check_metric
from foldrace.core.plugins import NO_PARTS, Parts
from foldrace.ensemble.calibration import methods_to_try
from foldrace.ensemble.limits import Limits
from foldrace.ensemble.methods import METHODS, check_method
from foldrace.ensemble.pool import Member
from foldrace.ensemble.selection.external import VARIANT
from foldrace.ensemble.selection.members import is_named, member_name

_TIME, _BYTES = "ensemble.max_ms_per_image", "ensemble.max_bytes"


@dataclass(frozen=True)
class Prices:
    """The price of a prediction with each member, all its fold models together."""

    ms_per_image: Mapping[Member, float]
    """Members that could not be measured are missing."""
    weight_bytes: Mapping[Member, int]
    device: str = ""
    """Name of the device that the time was measured on."""


def wish_problems(
    members: Sequence[Member],
    config: EnsembleConfig,
    absent: Sequence[Member] = (),
    parts: Parts = NO_PARTS,
) -> list[Problem]:
    """Everything that is known to be wrong with the settings before any array is read.

    Method and metric, names of nothing, included names of what may not enter or cannot predict.
    `absent` are the run's variants that cannot predict: a name may exclude them.
    """
    named = (check_method(config.method, parts), check_metric(config.metric, parts))
    return [
        *(problem for problem in named if problem is not None),
        *_unknown(members, config.exclude, "exclude", absent),
        *_unknown(members, config.include, "include", absent),
        *_unmet_includes(members, absent, config),
        *_nothing_left(members, config.exclude),
    ]


def without_excluded(members: Sequence[Member], exclude: Sequence[str]) -> list[int]:
    """Indices of the members that no name excludes; ConfigError where nothing is left."""
    problems = _nothing_left(members, exclude)
    if problems:
        raise ConfigError(problems)
    return [i for i, member in enumerate(members) if not _excluding(member, exclude)]


def included_members(
    members: Sequence[Member],
    losses: NDArray[np.float64],
    include: Sequence[str],
    duplicates: Sequence[tuple[Member, ...]] = (),
) -> tuple[int, ...]:
    """The member of the least own loss (M,) for each name of `include`.

    For a name of copies alone the one that is kept, the first of its `duplicates`. ConfigError with
    every name that no member has.
    """
    unknown = _unknown((*members, *chain(*duplicates)), include, "include")
    if unknown:
        raise ConfigError(unknown)
    kept = {member: members.index(same[0]) for same in duplicates for member in same}
    meant = ([*members, *kept], [*range(len(members)), *kept.values()])
    named = ([i for m, i in zip(*meant, strict=True) if is_named(m, name)] for name in include)
    return tuple(sorted({min(found, key=lambda i: (losses[i], i)) for found in named}))


def find_limits(
    members: Sequence[Member],
    prices: Prices,
    config: EnsembleConfig,
    forced: Sequence[int],
    parts: Parts = NO_PARTS,
) -> Limits:
    """The limits of the config, with what each member costs.

    Raises ConfigError where a limit is set whose price is unknown, or that nothing can meet that
    the method takes.
    """
    rows, budgets = [], []
    problems: list[Problem] = []
    methods = [parts[METHODS][name] for name in methods_to_try(config.method, parts)]
    able = [i for i, m in enumerate(members) if any(method.takes(m) for method in methods)]
    asked = (
        (_TIME, config.max_ms_per_image, prices.ms_per_image, "ms per image"),
        (_BYTES, config.max_bytes, prices.weight_bytes, "bytes"),
    )
    for key, budget, price, unit in asked:
        if budget is None:
            continue
        unknown = [m for m in members if m not in price]
        if unknown:
            problems += _unpriced(key, unknown)
            continue
        costs = np.array([float(price[m]) for m in members])
        named = [member_name(m) for m in members]
        dear = _too_dear(budget, costs, named, forced, able)
        problems += [Problem(key, f"is {budget:g}; {d} {unit}") for d in dear]
        rows.append(costs)
        budgets.append(float(budget))
    problems += too_many_included(len(forced), config.max_members)
    if problems:
        raise ConfigError(problems)
    costs_table = np.array(rows).reshape(len(rows), len(members))
    limits = Limits(costs_table, np.array(budgets), config.max_members)
    if able and not forced and not any(limits.admit((i,)) for i in able):
        message = f"no member meets both this and {_BYTES}; raise one of them"
        raise ConfigError.single(_TIME, message)
    return limits


def _unpriced(key: str, unknown: Sequence[Member]) -> Iterator[Problem]:
    """Problems of members without a price: made elsewhere, or damaged."""
    added = listing(member_name(m) for m in unknown if m.variant == VARIANT)
    unmeasured = listing(member_name(m) for m in unknown if m.variant != VARIANT)
    if added:
        message = "the time and size of predictions made elsewhere are unknown"
        yield Problem(key, f"cannot be applied to {added}: {message}; drop --add or the limit")
    if unmeasured:
        yield Problem(key, f"cannot hold: {unmeasured} could not be measured; exclude them")


def _too_dear(
    budget: float,
    costs: NDArray[np.float64],
    names: Sequence[str],
    forced: Sequence[int],
    able: Sequence[int],
) -> Iterator[str]:
    """Say what needs more than the budget, though it must be possible.

    The forced members together, else the cheapest of those that the method takes.
    """
    needed = float(costs[list(forced)].sum())
    if forced and needed > budget:
        yield f"ensemble.include ({listing(names[i] for i in forced)}) needs {needed:g}"
    least = min(able, key=lambda i: costs[i], default=None)
    if not forced and least is not None and costs[least] > budget:
        yield f"the cheapest member, {names[least]}, needs {costs[least]:g}"


def _nothing_left(members: Sequence[Member], exclude: Sequence[str]) -> list[Problem]:
    if not members or not all(_excluding(member, exclude) for member in members):
        return []
    return [Problem("ensemble.exclude", f"excludes all {len(members)} members")]


def _unknown(
    members: Sequence[Member], names: Sequence[str], key: str, absent: Sequence[Member] = ()
) -> list[Problem]:
    """Problems of every name that no member has, nor one that is absent."""
    known = listing(dict.fromkeys([m.candidate for m in members]))
    backbones = listing(dict.fromkeys([m.backbone for m in members if m.backbone]))
    runs = listing(dict.fromkeys([basename(m.run.rstrip("/")) for m in members if m.run]))
    allowed = f"candidates: {known}; backbones: {backbones}; a variant: `c0001 ema`"
    of_run = f"; those of one run folder: `RUN:c0001`, RUN one of {runs}" if runs else ""
    return [
        Problem(f"ensemble.{key}", f"{name!r} names no member; {allowed}{of_run}")
        for name in names
        if not any(is_named(m, name) for m in (*members, *absent))
    ]


def _unmet_includes(
    members: Sequence[Member], absent: Sequence[Member], config: EnsembleConfig
) -> Iterator[Problem]:
    """Problems of names in `include`, all members of which are excluded or cannot predict."""
    for name in config.include:
        named = [m for m in members if is_named(m, name)]
        excluding = [bar for m in named for bar in _excluding(m, config.exclude)]
        gone = any(is_named(m, name) for m in absent)
        if named and all(_excluding(m, config.exclude) for m in named):
            yield in_both_lists(name, excluding)
        if gone and not named:
            message = f"{name!r} cannot predict: not all its folds ended, or its weights are gone"
            yield Problem("ensemble.include", f"{message}; leave it out, or train it again")


def in_both_lists(name: str, excluding: Iterable[str]) -> Problem:
    """Say that a name of `ensemble.include` is excluded by these names."""
    excluding = listing(map(repr, dict.fromkeys(excluding)))
    message = (
        f"{name!r} is excluded by ensemble.exclude ({excluding}); leave it out of one of the two"
    )
    return Problem("ensemble.include", message)


def too_many_included(needed: int, max_members: int | None) -> list[Problem]:
    """Say that `ensemble.include` needs more members than there may be, where it does."""
    if max_members is None or needed <= max_members:
        return []
    message = f"is {max_members}, but ensemble.include forces {needed} in"
    return [Problem("ensemble.max_members", f"{message}; raise it, or shorten the list")]


def _excluding(member: Member, exclude: Sequence[str]) -> list[str]:
    """The names that exclude a member."""
    return [name for name in exclude if is_named(member, name)]
