"""Which members the config lets into a blend: names that are excluded, forced in, or too dear.

Takes members and the config's wishes, gives indices and `Limits`; every wish that cannot be met is
told at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ensemble.automatic import methods_to_try
from ensemble.limits import Limits
from ensemble.methods import METHODS, check_method
from ensemble.pool import Member
from experiment.config import EnsembleConfig
from experiment.errors import ConfigError, Problem, listing

_TIME, _BYTES = "ensemble.max_ms_per_image", "ensemble.max_bytes"


@dataclass(frozen=True)
class Prices:
    """What a prediction with each member costs, all its fold models together."""

    ms_per_image: Mapping[Member, float]
    """Members that could not be measured are missing."""
    weight_bytes: Mapping[Member, int]
    device: str = ""
    """What the time was measured on."""


def check_wishes(members: Sequence[Member], config: EnsembleConfig) -> None:
    """ConfigError with everything that can be known to be wrong before any array is read: the
    method, names of nothing."""
    method = check_method(config.method)
    unknown = (
        *_unknown(members, config.exclude, "exclude"),
        *_unknown(members, config.include, "include"),
    )
    problems = [*([] if method is None else [method]), *unknown]
    if problems:
        raise ConfigError(problems)


def without_excluded(members: Sequence[Member], exclude: Sequence[str]) -> list[int]:
    """Indices of the members that no name excludes; ConfigError where nothing is left."""
    kept = [i for i, m in enumerate(members) if not any(_is_named(m, name) for name in exclude)]
    if members and not kept:
        raise ConfigError.single("ensemble.exclude", f"excludes all {len(members)} members")
    return kept


def forced_members(
    members: Sequence[Member], losses: NDArray[np.float64], include: Sequence[str]
) -> tuple[int, ...]:
    """Of each name the member with the least own loss (M,); ConfigError with every name that no
    member has: those of excluded ones."""
    unknown = _unknown(members, include, "include")
    if unknown:
        raise ConfigError(unknown)
    named = ([i for i, m in enumerate(members) if _is_named(m, name)] for name in include)
    return tuple(sorted({min(found, key=lambda i: (losses[i], i)) for found in named}))


def find_limits(
    members: Sequence[Member], prices: Prices, config: EnsembleConfig, forced: Sequence[int]
) -> Limits:
    """ConfigError where a limit is set whose price is unknown, or that nothing can meet that the
    method takes."""
    rows, budgets, problems = [], [], []
    methods = [METHODS[name] for name in methods_to_try(config.method)]
    able = [i for i, m in enumerate(members) if any(method.takes(m) for method in methods)]
    asked = (
        (_TIME, config.max_ms_per_image, prices.ms_per_image, "ms per image"),
        (_BYTES, config.max_bytes, prices.weight_bytes, "bytes"),
    )
    for key, budget, price, unit in asked:
        if budget is None:
            continue
        unknown = [_name(m) for m in members if m not in price]
        if unknown:
            message = f"cannot hold: {listing(unknown)} could not be measured; exclude them"
            problems.append(Problem(key, f"{message} (or leave out their --add)"))
            continue
        costs = np.array([float(price[m]) for m in members])
        named = [_name(m) for m in members]
        dear = _too_dear(budget, costs, named, forced, able)
        problems += [Problem(key, f"is {budget:g}; {d} {unit}") for d in dear]
        rows.append(costs)
        budgets.append(float(budget))
    if config.max_members is not None and len(forced) > config.max_members:
        message = f"is {config.max_members}, but ensemble.include forces {len(forced)} in"
        problems.append(Problem("ensemble.max_members", message))
    if problems:
        raise ConfigError(problems)
    costs_table = np.array(rows).reshape(len(rows), len(members))
    limits = Limits(costs_table, np.array(budgets), config.max_members)
    if able and not forced and not any(limits.admit((i,)) for i in able):
        message = f"no member meets both this and {_BYTES}; raise one of them"
        raise ConfigError.single(_TIME, message)
    return limits


def _too_dear(
    budget: float,
    costs: NDArray[np.float64],
    names: Sequence[str],
    forced: Sequence[int],
    able: Sequence[int],
) -> Iterator[str]:
    """What needs more than the budget, though it must be possible: the forced members together,
    else the cheapest of those that the method takes."""
    needed = float(costs[list(forced)].sum())
    if forced and needed > budget:
        yield f"ensemble.include ({listing(names[i] for i in forced)}) needs {needed:g}"
    least = min(able, key=lambda i: costs[i], default=None)
    if not forced and least is not None and costs[least] > budget:
        yield f"the cheapest member, {names[least]}, needs {costs[least]:g}"


def _unknown(members: Sequence[Member], names: Sequence[str], key: str) -> list[Problem]:
    """Every name that no member has."""
    known = listing(dict.fromkeys([m.candidate for m in members]))
    backbones = listing(dict.fromkeys([m.backbone for m in members if m.backbone]))
    allowed = f"candidates: {known}; backbones: {backbones}; a variant: `c0001 ema`"
    return [
        Problem(f"ensemble.{key}", f"{name!r} names no member; {allowed}")
        for name in names
        if not any(_is_named(m, name) for m in members)
    ]


def _is_named(member: Member, name: str) -> bool:
    return name in (member.candidate, _name(member), member.backbone)


def _name(member: Member) -> str:
    return f"{member.candidate} {member.variant}"
