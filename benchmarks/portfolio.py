"""Which configurations a sweep should try first: chosen from the same ones trained on many small
data sets (`sides/portfolio_recorder.py`), and checked on data sets that had no part in the choice.

`--record FOLDER` trains what the table lacks (hours; goes on where it was cut off) and adds it to
`benchmarks/data/portfolio.npz`. Then the portfolio is chosen and written to
`search_spaces/portfolio.json`.

Only configurations that differ from each other in what a sweep searches by default take part.

Choice: greedy, from no candidate (every class alike) on, the configuration that lowers the regret
most for its time: per (own time + mean time). Regret: mean over data sets of log(loss of the chosen
/ loss of the best single one of all), where the loss of the chosen is that of their best one or of
their blend, whichever is less. The blend's weights are fitted on one half of the rows and scored on
the other. Check: the same without a data set, on that data set, after 1, 2, 4 and 8
configurations, against random orders (their mean and standard error over orders) and the order by
the single loss.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness import ROOT, Results, options
from numpy.typing import NDArray
from sides.portfolio_recorder import (
    BY_HAND,
    SEARCHED,
    STARTS,
    Start,
    keys,
    record,
    seen_file,
)

from foldrace.search_spaces.defaults import Situation, family

TABLE = ROOT / "benchmarks" / "data" / "portfolio.npz"
_PORTFOLIO = ROOT / "search_spaces" / "portfolio.json"
_WANTED = {"scratch": 40, "pretrained": 6}
_PROCESSES = 2
_ENTRIES = {"scratch": 8, "pretrained": 6}
_SIZES = (1, 2, 4, 8)  # prefixes that are checked
_ORDERS = 20
_LEAST_GAIN = 1e-3  # of the regret: the list ends where nothing brings more
_FLOOR = 1e-4  # of a probability
Columns = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Trial:
    """One recorded fold trial."""

    facts: Mapping[str, Any]
    column: Columns
    """(rows,) calibrated true-class probabilities of the better variant."""


Table = Mapping[str, Mapping[int, Trial]]  # data set -> configuration -> trial


def read(stored: Mapping[str, Any], start: Start) -> Table:
    """The configurations that every data set has and that a sweep can take over."""
    found: dict[str, dict[int, Trial]] = {name: {} for name in start.sets}
    for key in keys(start, 1000):
        if f"{key.name}/facts" in stored:
            facts = json.loads(str(stored[f"{key.name}/facts"]))
            if any(facts["params"][k] != v for k, v in BY_HAND.items() if k not in SEARCHED):
                continue
            column = stored[f"{key.name}/prob"].astype(np.float64)
            found[key.set][key.number] = Trial(facts, np.maximum(column, _FLOOR))
    whole = set.intersection(*(set(trials) for trials in found.values()))
    return {name: {i: trials[i] for i in sorted(whole)} for name, trials in found.items()}


def _added(folder: Path, stored: dict[str, Any]) -> dict[str, Any]:
    """The table with what a folder has beyond it."""
    for start in STARTS.values():
        for key in keys(start, _WANTED[start.name]):
            path = seen_file(folder, key)
            if not path.is_file():
                continue
            with np.load(path) as seen:
                facts = json.loads(str(seen["facts"]))
                variants = facts["loss"]
                rows = facts["rows"]
                if variants:
                    best = min(variants, key=variants.get)
                    column = seen[f"prob_{best}"]
                else:  # diverged: no better than nothing
                    column = np.full(rows // 3, _FLOOR, np.float16)
            stored[f"{key.name}/facts"] = np.array(json.dumps(facts))
            stored[f"{key.name}/prob"] = column
    return stored


def _weights(columns: Columns) -> Columns:
    """(rows, members) -> the mixture with the largest mean log probability, by expectation
    maximisation."""
    weights = np.full(columns.shape[1], 1 / columns.shape[1])
    for _ in range(60):
        shares = columns * weights
        weights = (shares / shares.sum(1, keepdims=True)).mean(0)
    return weights


def blend(trials: Mapping[int, Trial], chosen: Sequence[int]) -> float:
    """Log loss of the blend of the chosen, its weights from the other half of the rows."""
    columns = np.column_stack([trials[i].column for i in chosen])
    halves = [columns[::2], columns[1::2]]
    losses = [
        -np.log(scored @ _weights(fitted)).mean() for fitted, scored in (halves, halves[::-1])
    ]
    return float(np.mean(losses))


class Chooser:
    """Greedy selection over some data sets."""

    def __init__(self, table: Table, sets: Sequence[str]) -> None:
        self._table, self._sets = table, tuple(sets)
        self._best = {name: min(blend(t, [i]) for i in t) for name, t in table.items()}
        self.configurations = list(next(iter(table.values())))

    def regret(self, chosen: Sequence[int], sets: Sequence[str] | None = None) -> float:
        """Mean over data sets of log(loss of the chosen / loss of the best single one of all)."""
        names = self._sets if sets is None else sets
        losses = [
            min(blend(self._table[n], part) for part in [[i] for i in chosen] + [list(chosen)])
            for n in names
        ]
        best = [self._best[n] for n in names]
        return float(np.mean(np.log(losses) - np.log(best)))

    def cost(self, number: int) -> float:
        """Its time relative to the mean of all, mean over data sets.

        A trial's time is the least that one of its backbone took: what else the machine did while
        the table was recorded only adds.
        """
        relative = []
        for name in self._sets:
            least: dict[str, float] = {}
            for trial in self._table[name].values():
                backbone, seconds = trial.facts["backbone"], trial.facts["seconds"]
                least[backbone] = min(seconds, least.get(backbone, seconds))
            all_seconds = [least[t.facts["backbone"]] for t in self._table[name].values()]
            own = least[self._table[name][number].facts["backbone"]]
            relative.append(own / np.mean(all_seconds))
        return float(np.mean(relative))

    def order(self, count: int) -> list[int]:
        """The configurations in the order of the choice."""
        chosen: list[int] = []
        start = [np.log(np.log(self._classes(n)) / self._best[n]) for n in self._sets]
        now = float(np.mean(start))
        while len(chosen) < min(count, len(self.configurations)):
            left = [i for i in self.configurations if i not in chosen]
            after = {i: self.regret([*chosen, i]) for i in left}
            best = max(left, key=lambda i: (now - after[i]) / (1 + self.cost(i)))
            if now - after[best] < _LEAST_GAIN:
                break
            chosen.append(best)
            now = after[best]
        return chosen

    def by_loss(self) -> list[int]:
        """The configurations by their own mean log loss."""
        return sorted(self.configurations, key=lambda i: self.regret([i]))

    def _classes(self, name: str) -> int:
        return int(next(iter(self._table[name].values())).facts.get("classes", 10))


def _check(results: Results, start: Start, table: Table) -> None:
    """Each data set left out in turn."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, float]] = []
    for name in start.sets:
        chooser = Chooser(table, [n for n in start.sets if n != name])
        chosen, single = chooser.order(max(_SIZES)), chooser.by_loss()
        orders = [list(rng.permutation(chooser.configurations)) for _ in range(_ORDERS)]
        for size in _SIZES:
            if size > len(chooser.configurations):
                continue
            random = [chooser.regret(order[:size], [name]) for order in orders]
            row = {
                "portfolio": chooser.regret(chosen[:size], [name]),
                "by_loss": chooser.regret(single[:size], [name]),
                "random": float(np.mean(random)),
                "random_se": float(np.std(random, ddof=1) / np.sqrt(len(random))),
            }
            results.add(f"{start.name}: left out in turn", data=name, first=size, **row)
            rows.append({"size": size, **row})
    for size in _SIZES:
        of_size = [row for row in rows if row["size"] == size]
        if of_size:
            difference = [row["portfolio"] - row["random"] for row in of_size]
            results.at_most(
                f"{start.name}: regret of the first {size} less that of random ones, mean of sets",
                0.0,
                float(np.mean(difference)),
            )


def _entries(start: Start, table: Table) -> list[dict[str, Any]]:
    """The portfolio as the product has it: the rate relative to the usual one."""
    chooser = Chooser(table, start.sets)
    found = []
    for number in chooser.order(_ENTRIES[start.name]):
        trials = [table[name][number] for name in start.sets]
        facts = trials[0].facts
        params = dict(facts["params"])
        batch, pretrained = params["batch_size"], start.name == "pretrained"
        updates = np.mean([t.facts["rows"] * 2 / 3 // batch * t.facts["epochs"] for t in trials])
        usual = Situation(family(facts["backbone"]), pretrained, "adamw", batch, int(updates)).lr
        params["lr"] = float(f"{params['lr'] / usual:.3g}")
        own = {name: value for name, value in params.items() if name in SEARCHED}
        found.append({"backbone": facts["backbone"], "params": own})
    return found


def main() -> None:
    given = options(__doc__, record="a folder for the trials that the table lacks")
    stored: dict[str, Any] = {}
    if TABLE.is_file():
        with np.load(TABLE) as table:
            stored = dict(table)
    if given.record is not None:
        done = {name.removesuffix("/facts") for name in stored if name.endswith("/facts")}
        record(given.record, _WANTED, done, _PROCESSES)
        stored = _added(given.record, stored)
        np.savez_compressed(TABLE, **stored)  # type: ignore[arg-type]
    results, portfolio = Results("portfolio"), dict[str, Any]()
    sources = []
    for start in STARTS.values():
        table = read(stored, start)
        count = len(next(iter(table.values())))
        sources.append(f"{count} configurations on {len(table)} data sets ({start.name})")
        portfolio[start.name] = _entries(start, table) if count else []
        if count:
            _check(results, start, table)
    portfolio = {"about": f"made by benchmarks/portfolio.py of {'; '.join(sources)}", **portfolio}
    if not given.quick:
        _PORTFOLIO.write_text(json.dumps(portfolio, indent=1) + "\n", encoding="utf-8")
    results.publish(given)


if __name__ == "__main__":
    main()
