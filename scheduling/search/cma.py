"""CMA-ES without a state of its own: the distribution is rebuilt from the trials at each ask.

Takes the trials of a study, gives the numeric knobs of the next one. Method: Hansen, "The CMA
evolution strategy: a tutorial", arXiv 1604.00772; trials that it drew from an older distribution,
or not at all, are taken in as in Hansen, "Injecting external solutions into CMA-ES",
arXiv 1110.4181.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

if TYPE_CHECKING:
    from cmaes import CMA

_SIGMA = 0.3  # of the unit cube, as the tutorial suggests for an optimum inside it
LEAST_KNOBS = 2
"""Numeric knobs that CMA-ES needs: a covariance needs two."""


class ReplayedCma(BaseSampler):
    """Optuna sampler that rebuilds the distribution of CMA-ES from the ended trials at each ask.

    Each `population_size` ended trials, in the order of their numbers, are one generation. Choices,
    and fewer than two numeric knobs, are drawn at random.
    """

    def __init__(self, seed: int, distributions: Mapping[str, BaseDistribution]) -> None:
        self._seed = seed
        numeric = {n: d for n, d in distributions.items() if _is_numeric(d) and not d.single()}
        self._space = numeric if len(numeric) >= LEAST_KNOBS else {}
        self._others = RandomSampler(seed=seed)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The numeric knobs, or none where there are fewer than two."""
        return dict(self._space)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Values of the numeric knobs, from the distribution after all complete trials."""
        if not search_space:
            return {}
        ended = [
            t
            for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            if search_space.keys() <= t.params.keys()
        ]
        cube = self._replay(ended, search_space).ask()
        names = search_space.items()
        return {name: _from_unit(d, float(x)) for (name, d), x in zip(names, cube, strict=True)}

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """A random value of a knob that is not numeric."""
        return self._others.sample_independent(study, trial, param_name, param_distribution)

    def _replay(self, ended: Sequence[FrozenTrial], space: Mapping[str, BaseDistribution]) -> CMA:
        from cmaes import CMA  # it imports scipy.stats: a second, for one sampler

        size = len(space)
        bounds = np.tile([0.0, 1.0], (size, 1))
        optimizer = CMA(mean=np.full(size, 0.5), sigma=_SIGMA, bounds=bounds, seed=self._seed)
        population = optimizer.population_size
        scored = [
            (np.array([_to_unit(d, t.params[n]) for n, d in space.items()]), t.value)
            for t in ended
            if t.value is not None
        ]
        for start in range(0, len(scored) - population + 1, population):
            optimizer.tell(scored[start : start + population])
        return optimizer


def _is_numeric(distribution: BaseDistribution) -> bool:
    return not isinstance(distribution, CategoricalDistribution)


def _ends(distribution: BaseDistribution) -> tuple[float, float, bool]:
    """Ends of the range, and whether it is logarithmic; a whole number owns half a unit a side."""
    match distribution:
        case FloatDistribution():
            return distribution.low, distribution.high, distribution.log
        case IntDistribution():
            return distribution.low - 0.5, distribution.high + 0.5, distribution.log
    raise TypeError(f"{distribution} has no unit interval")


def _to_unit(distribution: BaseDistribution, value: float) -> float:
    low, high, log = _ends(distribution)
    if log:
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)


def _from_unit(distribution: BaseDistribution, x: float) -> float | int:
    low, high, log = _ends(distribution)
    value = low * (high / low) ** x if log else low + (high - low) * x
    if isinstance(distribution, IntDistribution):
        return min(max(round(value), distribution.low), distribution.high)
    return min(max(value, low), high)
