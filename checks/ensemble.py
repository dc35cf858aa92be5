"""Checks of the config's `ensemble` section against what any blend of the run could have.

Takes a config with its search space, and the candidates that a run already has; gives every
problem.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from foldrace.config.schema import EnsembleConfig, SweepConfig
from foldrace.core.errors import Problem, listing
from foldrace.core.metrics import check_metric
from foldrace.core.plugins import NO_PARTS, Parts
from foldrace.ensemble.methods import METHODS, check_include, check_method
from foldrace.ensemble.selection.eligible import in_both_lists, too_many_included
from foldrace.search_spaces.space import SearchSpace

_CANDIDATE = re.compile(r"(c\d{4,})(?: (raw|ema|soup|snap\d+))?")


def ensemble_problems(
    config: SweepConfig,
    space: SearchSpace,
    earlier: Mapping[str, str] | None = None,
    parts: Parts = NO_PARTS,
) -> Iterator[Problem]:
    """Problems of the section; `earlier`: candidates of a run that goes on -> their backbones."""
    wishes, known = config.ensemble, earlier or {}
    method = check_method(wishes.method, parts)
    if method is not None:
        yield method
    metric = check_metric(wishes.metric, parts)
    if metric is not None:
        yield metric
    last = max([f"c{config.search.candidates - 1:04d}", *known], key=_number)
    backbones = list(dict.fromkeys([*config.search.backbones, *known.values()]))
    for key, names in (("exclude", wishes.exclude), ("include", wishes.include)):
        yield from _unknown(key, names, last, backbones)
    yield from _in_both(wishes)
    yield from _nothing_left(wishes, backbones)
    yield from _too_many(wishes)
    yield from _of_method(wishes, space, parts)


def _unknown(
    key: str, names: Sequence[str], last: str, backbones: Sequence[str]
) -> Iterator[Problem]:
    """Problems of unknown names; `last`: the candidate with the highest possible number."""
    allowed = (
        f"allowed: c0000 to {last}, each also with a variant (`c0000 ema`), or a backbone: "
        f"{listing(backbones)}"
    )
    for name in (name.removeprefix(":") for name in names):
        match = _CANDIDATE.fullmatch(name)
        if name not in backbones and (match is None or _number(match[1]) > _number(last)):
            message = f"{name!r} is neither a candidate nor a backbone of the search"
            yield Problem(f"ensemble.{key}", f"{message}; {allowed}")


def _number(candidate: str) -> int:
    return int(candidate.removeprefix("c"))


def _in_both(wishes: EnsembleConfig) -> Iterator[Problem]:
    """Problems of names in both lists, also as a variant of an excluded candidate."""
    out = {name.removeprefix(":") for name in wishes.exclude}
    for name in wishes.include:
        match = _CANDIDATE.fullmatch(name.removeprefix(":"))
        excluding = out & {name.removeprefix(":"), "" if match is None else match[1]}
        if excluding:
            yield in_both_lists(name, sorted(excluding))


def _nothing_left(wishes: EnsembleConfig, backbones: Sequence[str]) -> Iterator[Problem]:
    if set(backbones) <= {name.removeprefix(":") for name in wishes.exclude}:
        message = "excludes every backbone of the search, so that nothing is left to blend"
        yield Problem("ensemble.exclude", f"{message}; leave one in: {listing(backbones)}")


def _too_many(wishes: EnsembleConfig) -> Iterator[Problem]:
    """A candidate and a backbone may mean one member: as many are counted as there must be."""
    names = {name.removeprefix(":") for name in wishes.include}
    matches = {name: _CANDIDATE.fullmatch(name) for name in names}
    variants = {name for name, match in matches.items() if match and match[2]}
    of_variants = {match[1] for name in variants if (match := matches[name])}
    whole = {name for name, match in matches.items() if match and not match[2]} - of_variants
    backbones = sum(match is None for match in matches.values())
    needed = max(len(variants) + len(whole), backbones)
    yield from too_many_included(needed, wishes.max_members)


def _of_method(wishes: EnsembleConfig, space: SearchSpace, parts: Parts) -> Iterator[Problem]:
    problem = check_include(wishes.method, wishes.include, parts)
    if problem is not None:
        yield problem
    most = [
        int(value) for settings in space.settings.values() for value in settings["snapshots"].values
    ]
    method = parts[METHODS].get(wishes.method)
    if method is not None and method.needs_snapshots and most and max(most) == 0:
        message = f"{method.name!r} needs snapshots, and no trial keeps one"
        advice = "set `snapshots: 3` in search.space, or use another method"
        yield Problem("ensemble.method", f"{message}; {advice}")
