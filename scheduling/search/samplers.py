"""The table of samplers: one row for each value of `search.sampler`.

Takes a `SuggestionRequest` (the space, trials that the sampler may see, a seed), gives proposals
in the order in which they should be tried: the study takes the first that no candidate has.
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

from foldrace.config.ranges import Range, Value
from foldrace.scheduling.search.cma import ReplayedCma
from foldrace.search_spaces.space import distribution

optuna.logging.set_verbosity(optuna.logging.ERROR)  # its warnings are for who chose the sampler

GRID_POINTS = 5
"""Values that a grid takes of a range."""
_RANDOM_POINTS = 20  # of a grid, before it is walked in order
_TRIES = 3  # of the sampler itself, when what it proposes is taken: each costs a whole suggestion
_RANDOM_TRIES = 20


@dataclass(frozen=True)
class Grid:
    """A finite search space, whose combinations are never listed: it may exceed the memory."""

    axes: Mapping[str, Sequence[Value]]
    """Knob -> its values."""

    @property
    def size(self) -> int:
        """Number of combinations."""
        return math.prod(len(values) for values in self.axes.values())

    def at(self, index: int) -> dict[str, Value]:
        """Combination `index` of 0 .. size - 1: the digits of the index choose the values."""
        chosen: dict[str, Value] = {}
        for name, values in self.axes.items():
            index, digit = divmod(index, len(values))
            chosen[name] = values[digit]
        return chosen

    def walk(self, seed: int) -> Iterator[dict[str, Value]]:
        """Every combination at least once: some at random, then all from a random one on.

        The random ones spare a search for a free combination the long way past those taken.
        """
        generator = random.Random(seed)
        for _ in range(_RANDOM_POINTS):
            yield self.at(generator.randrange(self.size))
        start = generator.randrange(self.size)
        for step in range(self.size):
            yield self.at((start + step) % self.size)


def coarse_grid(ranges: Mapping[str, Range]) -> Grid:
    """All choices, and at most `GRID_POINTS` values of each range."""
    return Grid({name: chosen.grid(GRID_POINTS) for name, chosen in ranges.items()})


def full_grid(ranges: Mapping[str, Range]) -> Grid | None:
    """All values of all knobs; None where one of them takes real numbers."""
    axes = {name: chosen.every() for name, chosen in ranges.items()}
    listed = {name: values for name, values in axes.items() if values is not None}
    return Grid(listed) if len(listed) == len(axes) else None


@dataclass(frozen=True)
class SuggestionRequest:
    """Request for the next configuration of a backbone, with what may be known for it."""

    seed: int
    """Seed of the search."""
    number: int
    """Number of the candidate; with `seed` it decides every draw, so that `resume` needs no
    generator's state."""
    ranges: Mapping[str, Range]
    """Optuna's name -> range, for the backbone's searched knobs."""
    trials: Sequence[FrozenTrial]
    """Trials that the sampler may see, by number; none of them has number 0."""

    def seed_of(self, attempt: object) -> int:
        """Seed of one attempt (32 bits)."""
        text = f"{self.seed}/{self.number}/{attempt}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])


MakeSampler = Callable[[int, Mapping[str, BaseDistribution]], BaseSampler]
"""Makes Optuna's sampler for one candidate, from a seed of its own.

The points of a sequence (Sobol's) must go on from candidate to candidate: such a sampler is a
`propose` that uses `ask.number`.
"""


@dataclass(frozen=True)
class Sampler:
    """One row of the table."""

    propose: Callable[[SuggestionRequest], Iterator[Mapping[str, Value]]]
    most_trials: int = 0
    """Largest number of ended candidates shown to it, chosen so that a suggestion takes tens of
    milliseconds (GP: tenths of a second); 0: it learns nothing."""
    sees_pruned: bool = False
    """True where it ranks trials of the state PRUNED; to other samplers stopped candidates are
    shown as complete, with the loss of the folds that they have."""
    starts_with_default: bool = True
    """True: the first candidate of each backbone has its default configuration."""


class _TrialsStorage(InMemoryStorage):
    """A study that holds the given trials and the one that is asked for.

    The given ones are only read and not copied in: a thousand copies a suggestion would take longer
    than the sampler.
    """

    def __init__(self, trials: Sequence[FrozenTrial]) -> None:
        super().__init__()
        self._given = trials

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Sequence[TrialState] | None = None,  # type: ignore[override]
    ) -> list[FrozenTrial]:
        given = [t for t in self._given if states is None or t.state in states]
        return given + super().get_all_trials(study_id, deepcopy, states)


def _suggestion(
    ask: SuggestionRequest, make: MakeSampler, attempt: object, trials: Sequence[FrozenTrial]
) -> dict[str, Value]:
    space = {name: distribution(chosen) for name, chosen in ask.ranges.items()}
    with warnings.catch_warnings():  # several options of Optuna's samplers are called experimental
        warnings.simplefilter("ignore", ExperimentalWarning)
        sampler = make(ask.seed_of(attempt), space)
        study = optuna.create_study(storage=_TrialsStorage(trials), sampler=sampler)
        return study.ask(fixed_distributions=space).params


def _proposals(make: MakeSampler) -> Callable[[SuggestionRequest], Iterator[Mapping[str, Value]]]:
    """The sampler's proposals, then random ones, then in a finite space all others."""

    def propose(ask: SuggestionRequest) -> Iterator[Mapping[str, Value]]:
        for attempt in range(_TRIES):
            yield _suggestion(ask, make, attempt, ask.trials)
        yield from _fallback(ask)

    return propose


def _fallback(ask: SuggestionRequest) -> Iterator[Mapping[str, Value]]:
    """Random proposals, then in a finite space all others."""
    for attempt in range(_RANDOM_TRIES):
        yield _suggestion(ask, _random, f"random {attempt}", ())
    rest = full_grid(ask.ranges)
    if rest is not None:
        yield from rest.walk(ask.seed_of("rest"))


def _grid(ask: SuggestionRequest) -> Iterator[Mapping[str, Value]]:
    return coarse_grid(ask.ranges).walk(ask.seed_of("grid"))


def _nothing(ask: SuggestionRequest) -> Iterator[Mapping[str, Value]]:
    return iter(())


def _random(seed: int, space: Mapping[str, BaseDistribution]) -> BaseSampler:
    return RandomSampler(seed=seed)


def _tpe(seed: int, space: Mapping[str, BaseDistribution]) -> BaseSampler:
    return TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)


def _gp(seed: int, space: Mapping[str, BaseDistribution]) -> BaseSampler:
    return GPSampler(seed=seed, deterministic_objective=False)


SAMPLERS: dict[str, Sampler] = {
    "tpe": Sampler(_proposals(_tpe), most_trials=1000, sees_pruned=True),
    "random": Sampler(_proposals(_random)),
    "cmaes": Sampler(_proposals(ReplayedCma), most_trials=1000),
    "gp": Sampler(_proposals(_gp), most_trials=60),
    "grid": Sampler(_grid, starts_with_default=False),
    "list": Sampler(_nothing, starts_with_default=False),
}
