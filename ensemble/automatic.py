"""Which method a blend uses, where the config leaves it open (`ensemble.method: auto`).

Takes `MemberRows` and some methods, gives the one with the least cross-fitted loss, each with the
temperatures that suit it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ensemble.calibration import CalibrationChoice, choose_calibration
from ensemble.fit import Fit
from ensemble.methods import AUTO
from ensemble.pool import MemberRows, Pool
from experiment.records import MethodTrial

TRIED = ("greedy", "geometric", "stacking")
"""What wins somewhere in `benchmarks/generalisation.py`: with few rows a mixture, with many a
pooling of logarithms. The first on a tie."""


@dataclass(frozen=True, eq=False)
class MethodChoice:
    """A method with its temperatures."""

    method: str
    calibration: CalibrationChoice
    tried: tuple[MethodTrial, ...]
    """Empty where there was no choice."""


def methods_to_try(method: str) -> tuple[str, ...]:
    """The method itself, or those of `auto`."""
    return TRIED if method == AUTO else (method,)


def choose_method(
    rows: MemberRows,
    methods: Sequence[str],
    fit: Callable[[str, Pool], Fit],
    calibrate: bool = True,
) -> MethodChoice:
    """Cross-fits each method of `methods`; fit(method, pool) is one fit."""
    choices = {
        method: choose_calibration(rows, partial(fit, method), calibrate) for method in methods
    }
    best = min(choices, key=lambda method: choices[method].crossfit.loss)
    tried = [
        MethodTrial(method=m, crossfit_logloss=c.crossfit.loss, crossfit_se=c.crossfit.se)
        for m, c in choices.items()
    ]
    return MethodChoice(best, choices[best], tuple(tried) if len(tried) > 1 else ())
