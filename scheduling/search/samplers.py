"""The table of samplers: one row for each value of `search.sampler`.

Takes a `SuggestionRequest` (the space, trials that the sampler may see, a seed), gives proposals
in the order in which they should be tried: the study takes the first that no candidate has.
"""

from __future__ import annotations

import hashlib
import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial

from foldrace.config.ranges import Range, Value
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
    """Trials that the sampler may see, the oldest first."""

    def seed_of(self, attempt: object) -> int:
        """Seed of one attempt (32 bits)."""
        text = f"{self.seed}/{self.number}/{attempt}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])


@dataclass(frozen=True)
class Sampler:
    """One row of the table."""

    propose: Callable[[SuggestionRequest], Iterator[Mapping[str, Value]]]
    most_trials: int = 0
    """Largest number of candidates with a value that are shown to it, chosen so that a suggestion
    takes tens of milliseconds (GP: tenths of a second); 0: it learns nothing."""
    sees_pruned: bool = False
    """True where it ranks trials of the state PRUNED; to other samplers candidates that are not
    complete are shown as if they were, with the value that they have."""
    starts_with_portfolio: bool = True
    """True: the first candidates are those of the portfolio."""


def _asked(
    request: SuggestionRequest,
    make: Callable[[int], BaseSampler],
    attempts: Iterable[object],
    trials: Sequence[FrozenTrial] = (),
) -> Iterator[Mapping[str, Value]]:
    """What Optuna's sampler proposes in a study of these trials, with a fresh seed an attempt.

    An attempt that was refused stays a running trial: the constant liar keeps the next one off it.
    """
    space = {name: distribution(chosen) for name, chosen in request.ranges.items()}
    study = optuna.create_study(sampler=RandomSampler())
    study.add_trials(trials)
    for attempt in attempts:
        with warnings.catch_warnings():  # some options of Optuna's samplers are called experimental
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.sampler = make(request.seed_of(attempt))
            params = study.ask(fixed_distributions=space).params
        yield params


def _proposals(
    make: Callable[[int], BaseSampler],
) -> Callable[[SuggestionRequest], Iterator[Mapping[str, Value]]]:
    """The sampler's proposals, then random ones, then in a finite space all others."""

    def propose(request: SuggestionRequest) -> Iterator[Mapping[str, Value]]:
        yield from _asked(request, make, range(_TRIES), request.trials)
        yield from _asked(request, _random, (f"random {i}" for i in range(_RANDOM_TRIES)))
        rest = full_grid(request.ranges)
        if rest is not None:
            yield from rest.walk(request.seed_of("rest"))

    return propose


def _grid(request: SuggestionRequest) -> Iterator[Mapping[str, Value]]:
    return coarse_grid(request.ranges).walk(request.seed_of("grid"))


def _nothing(request: SuggestionRequest) -> Iterator[Mapping[str, Value]]:
    return iter(())


def _random(seed: int) -> BaseSampler:
    return RandomSampler(seed=seed)


def _tpe(seed: int) -> BaseSampler:
    return TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)


def _gp(seed: int) -> BaseSampler:
    return GPSampler(seed=seed, deterministic_objective=False)


SAMPLERS: dict[str, Sampler] = {
    "tpe": Sampler(_proposals(_tpe), most_trials=500, sees_pruned=True),
    "random": Sampler(_proposals(_random)),
    "gp": Sampler(_proposals(_gp), most_trials=60),
    "grid": Sampler(_grid, starts_with_portfolio=False),
    "list": Sampler(_nothing, starts_with_portfolio=False),
}
"""Optuna's samplers are made anew for each candidate, so the points of a sequence (Sobol's), which
must go on from candidate to candidate, need a `propose` of their own that uses `request.number`."""
