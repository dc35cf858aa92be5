"""The first candidates of a sweep: configurations that did well together on other data sets.

Takes a search space, gives backbones with their hyperparameters, in the order in which they are
tried. The table, `portfolio.json`, is made by `benchmarks/portfolio.py`: greedy selection, as in
Feurer, Eggensperger, Falkner, Lindauer and Hutter, Auto-sklearn 2.0, JMLR 2022, by the loss of the
blend of the chosen ones.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from foldrace.config.hyperparameters import TrialParams
from foldrace.config.ranges import Value
from foldrace.search_spaces.defaults import Start, family
from foldrace.search_spaces.space import SearchSpace

_OF_A_FAMILY = frozenset(
    ("layer_decay", "head_lr")
)  # its own defaults say more than another's entry
_TABLE = Path(__file__).with_name("portfolio.json")


@dataclass(frozen=True)
class Entry:
    """One configuration of the table."""

    backbone: str
    """The one that it was recorded with."""
    params: Mapping[str, Value]
    """Its hyperparameters; `lr` is relative to the situation's usual one."""


Portfolio = Mapping[Start, Sequence[Entry]]


@functools.cache
def recorded() -> Portfolio:
    """The table that the product comes with, the best entries first."""
    table = json.loads(_TABLE.read_text(encoding="utf-8"))
    starts: tuple[Start, ...] = ("scratch", "pretrained")
    return {start: [Entry(**entry) for entry in table[start]] for start in starts}


def first_candidates(
    space: SearchSpace,
    most: int,
    earlier: Sequence[tuple[str, TrialParams]] = (),
    portfolio: Portfolio | None = None,
) -> list[tuple[str, TrialParams]]:
    """At most `most` configurations, and at least one a backbone.

    `earlier`: the best of the user's own earlier runs, which come first. Then entries recorded with
    one of the backbones; then every backbone has its turn with the entries in their order, its own
    ones before those of others. What the config fixes, or searches elsewhere, wins over an entry.
    """
    table = recorded() if portfolio is None else portfolio
    of_each = {b: _of_backbone(space, b, table) for b in space.backbones}
    own = [
        (b, _configuration(space, b, entry))
        for start, entries in table.items()
        for entry in entries
        for b in space.backbones
        if b == entry.backbone and start == space.situations[b].start
    ]
    turns = max(len(each) for each in of_each.values())
    others = [
        (b, each[turn]) for turn in range(turns) for b, each in of_each.items() if turn < len(each)
    ]
    known = [
        (b, _inside(space, b, params.as_dict())) for b, params in earlier if b in space.backbones
    ]
    found = list(dict.fromkeys([*known, *own, *others]))
    kept = {next(candidate for candidate in found if candidate[0] == b) for b in of_each}
    for candidate in found:
        if len(kept) >= most:
            break
        kept.add(candidate)
    return [candidate for candidate in found if candidate in kept]


def _of_backbone(space: SearchSpace, backbone: str, table: Portfolio) -> list[TrialParams]:
    entries = sorted(
        table[space.situations[backbone].start], key=lambda entry: entry.backbone != backbone
    )
    made = [_configuration(space, backbone, entry) for entry in entries]
    return list(dict.fromkeys(made or [space.default(backbone)]))


def _configuration(space: SearchSpace, backbone: str, entry: Entry) -> TrialParams:
    situation, params = space.situations[backbone], dict(entry.params)
    params["lr"] = float(f"{float(params.get('lr', 1.0)) * situation.lr:.3g}")
    if family(entry.backbone) != situation.family:
        params = {name: value for name, value in params.items() if name not in _OF_A_FAMILY}
    return _inside(space, backbone, params)


def _inside(space: SearchSpace, backbone: str, given: Mapping[str, Value]) -> TrialParams:
    """The default configuration, with the given values where the space searches and holds them."""
    own = {
        name: given[name]
        for name, setting in space.settings[backbone].items()
        if setting.range is not None and name in given and setting.range.contains(given[name])
    }
    return TrialParams.from_dict(space.default(backbone).as_dict() | own)
