"""How the next configuration of a backbone is found: one row a `search.sampler`.

Takes an `Ask` (the space, what the sampler may see, a seed), gives proposals in the order in which
they should be tried: the study takes the first that no candidate has.

A finite search space: every combination of the values of its knobs, without listing them.

Takes values for each knob, gives combinations from a random place on. Larger than memory is fine.
"""

from __future__ import annotations

import hashlib
import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from foldrace.scheduling.search.cma import ReplayedCma
from foldrace.search_spaces.ranges import Range, Value
from foldrace.search_spaces.space import distribution

GRID_POINTS = 5
"""Values that a grid takes of a range."""
_DRAWS = 20


@dataclass(frozen=True)
class Lattice:
    """Knob -> its values."""

    axes: Mapping[str, Sequence[Value]]

    @property
    def size(self) -> int:
        return math.prod(len(values) for values in self.axes.values())

    def at(self, index: int) -> dict[str, Value]:
        """Combination `index` of 0 .. size - 1: the digits of the index choose the values."""
        chosen: dict[str, Value] = {}
        for name, values in self.axes.items():
            index, digit = divmod(index, len(values))
            chosen[name] = values[digit]
        return chosen

    def walk(self, seed: int) -> Iterator[dict[str, Value]]:
        """Every combination at least once: some at random, then all from a random one on, so that
        whoever looks for a free one finds it after as many steps as others are taken."""
        generator = random.Random(seed)
        for _ in range(_DRAWS):
            yield self.at(generator.randrange(self.size))
        start = generator.randrange(self.size)
        for step in range(self.size):
            yield self.at((start + step) % self.size)


def grid(ranges: Mapping[str, Range]) -> Lattice:
    """The choices, and at most `GRID_POINTS` values of each range."""
    return Lattice({name: chosen.grid(GRID_POINTS) for name, chosen in ranges.items()})


def every(ranges: Mapping[str, Range]) -> Lattice | None:
    """All values of all knobs; None where one of them takes real numbers."""
    axes = {name: chosen.every() for name, chosen in ranges.items()}
    listed = {name: values for name, values in axes.items() if values is not None}
    return Lattice(listed) if len(listed) == len(axes) else None


optuna.logging.set_verbosity(optuna.logging.ERROR)  # its warnings are for who chose the sampler

_TRIES = 3  # of the sampler itself, when what it proposes is taken: each costs a whole suggestion
_RANDOM_TRIES = 20


@dataclass(frozen=True)
class Ask:
    """What a proposal is made from."""

    seed: int
    """Of the search."""
    number: int
    """Of the candidate; with `seed` it decides every draw, so that `resume` needs no generator's
    state."""
    ranges: Mapping[str, Range]
    """Optuna's name -> range, of the backbone's searched knobs."""
    trials: Sequence[FrozenTrial]
    """What is known, by number; none of them has number 0."""

    def seed_of(self, attempt: object) -> int:
        """32 bits."""
        text = f"{self.seed}/{self.number}/{attempt}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])


Make = Callable[[int, Mapping[str, BaseDistribution]], BaseSampler]


@dataclass(frozen=True)
class Sampler:
    """`most_trials`: how many ended candidates it sees, so many that a suggestion takes tens of
    milliseconds (GP: tenths of a second). `sees_pruned`: whether it ranks trials of the state
    PRUNED; to others stopped candidates are shown as complete, with what their folds gave.
    `defaults`: whether each backbone begins with its default configuration."""

    propose: Callable[[Ask], Iterator[Mapping[str, Value]]]
    most_trials: int = 0
    sees_pruned: bool = False
    defaults: bool = True


class _Shown(InMemoryStorage):
    """A study that holds the given trials and the one that is asked for. They are not copied in
    (a thousand copies a suggestion would take longer than the sampler), and only read."""

    def __init__(self, trials: Sequence[FrozenTrial]) -> None:
        super().__init__()
        self._shown = trials

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Sequence[TrialState] | None = None,  # type: ignore[override]
    ) -> list[FrozenTrial]:
        shown = [t for t in self._shown if states is None or t.state in states]
        return shown + super().get_all_trials(study_id, deepcopy, states)


def _draw(ask: Ask, make: Make, attempt: object, trials: Sequence[FrozenTrial]) -> dict[str, Value]:
    """One suggestion."""
    space = {name: distribution(chosen) for name, chosen in ask.ranges.items()}
    with warnings.catch_warnings():  # several options of Optuna's samplers are called experimental
        warnings.simplefilter("ignore", ExperimentalWarning)
        sampler = make(ask.seed_of(attempt), space)
        study = optuna.create_study(storage=_Shown(trials), sampler=sampler)
        return study.ask(fixed_distributions=space).params


def _drawn(make: Make) -> Callable[[Ask], Iterator[Mapping[str, Value]]]:
    """The sampler's proposals, then random ones, then in a finite space all others."""

    def propose(ask: Ask) -> Iterator[Mapping[str, Value]]:
        for attempt in range(_TRIES):
            yield _draw(ask, make, attempt, ask.trials)
        for attempt in range(_RANDOM_TRIES):
            yield _draw(ask, _random, f"random {attempt}", ())
        rest = every(ask.ranges)
        if rest is not None:
            yield from rest.walk(ask.seed_of("rest"))

    return propose


def _grid(ask: Ask) -> Iterator[Mapping[str, Value]]:
    return grid(ask.ranges).walk(ask.seed_of("grid"))


def _nothing(ask: Ask) -> Iterator[Mapping[str, Value]]:
    return iter(())


def _random(seed: int, space: Mapping[str, BaseDistribution]) -> BaseSampler:
    return RandomSampler(seed=seed)


def _tpe(seed: int, space: Mapping[str, BaseDistribution]) -> BaseSampler:
    return TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)


def _gp(seed: int, space: Mapping[str, BaseDistribution]) -> BaseSampler:
    return GPSampler(seed=seed, deterministic_objective=False)


SAMPLERS: dict[str, Sampler] = {
    "tpe": Sampler(_drawn(_tpe), most_trials=1000, sees_pruned=True),
    "random": Sampler(_drawn(_random)),
    "cmaes": Sampler(_drawn(ReplayedCma), most_trials=1000),
    "gp": Sampler(_drawn(_gp), most_trials=60),
    "grid": Sampler(_grid, defaults=False),
    "list": Sampler(_nothing, defaults=False),
}
