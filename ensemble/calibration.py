"""Which temperatures a blend keeps: those that the cross-fitted loss asks for, and no others.

Takes `MemberRows` and a method; gives the `CalibrationChoice`, and with it the fit on all rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ensemble.calibrate import at_temperature, fit_temperature
from ensemble.crossfit import CrossFitRows, crossfit_rows
from ensemble.fit import Fit, blend_prob
from ensemble.pool import MemberRows, Pool
from ensemble.reliability import reliability
from experiment.metrics import normalise, row_losses
from experiment.records import Calibration, CalibrationTrial

_MARGIN = 1.0
"""Standard errors."""


@dataclass(frozen=True, eq=False)
class CalibrationChoice:
    """The temperatures that are kept."""

    members: bool
    blend: bool
    crossfit: CrossFitRows
    """With them."""
    record: Calibration


def choose_calibration(
    rows: MemberRows, fit: Callable[[Pool], Fit], enabled: bool = True
) -> CalibrationChoice:
    """Cross-fits none, a temperature of the blend, one a member, and both; keeps the fewest that
    are as good as the best. Without `enabled` only none is tried."""
    plain, blend = crossfit_rows(rows, fit, calibrated=False)
    tried = {(False, False): plain}
    if enabled:
        members, both = crossfit_rows(rows, fit, calibrated=True)
        tried |= {(False, True): blend, (True, False): members, (True, True): both}
    kept = _fewest_as_good(tried)
    return CalibrationChoice(*kept, tried[kept], _record(kept, tried))


def final_fit(
    rows: MemberRows, fit: Callable[[Pool], Fit], choice: CalibrationChoice
) -> tuple[Fit, float, NDArray[np.float64]]:
    """The fit on all rows with the kept temperatures, the temperature of the blend (1: none) and
    the blend's probabilities (N, C) on the rows it was fitted on, its temperature included."""
    pool = rows.pool(choice.members)
    chosen = fit(pool)
    prob = normalise(blend_prob(chosen, pool))
    if not choice.blend:
        return chosen, 1.0, prob
    log_prob = np.log(prob, out=prob)
    temperature = fit_temperature(log_prob, rows.labels)
    return chosen, temperature, np.exp(at_temperature(log_prob, temperature), dtype=np.float64)


def _fewest_as_good(tried: dict[tuple[bool, bool], CrossFitRows]) -> tuple[bool, bool]:
    """The first, in ascending number of temperatures, whose loss is within the margin of the
    least one's."""
    least = min(tried.values(), key=lambda crossfit: crossfit.loss)
    return next(kept for kept, crossfit in tried.items() if _as_good(crossfit, least))


def _as_good(crossfit: CrossFitRows, least: CrossFitRows) -> bool:
    """The rows are the same, so the standard error is that of their differences."""
    excess = row_losses(crossfit.true_prob) - row_losses(least.true_prob)
    se = float(excess.std(ddof=1)) / math.sqrt(len(excess))
    return float(excess.mean()) <= _MARGIN * se


def _record(kept: tuple[bool, bool], tried: dict[tuple[bool, bool], CrossFitRows]) -> Calibration:
    before, after = tried[False, False], tried[kept]
    return Calibration(
        members=kept[0],
        blend=kept[1],
        tried=tuple(
            CalibrationTrial(
                members=members,
                blend=blend,
                crossfit_logloss=crossfit.loss,
                crossfit_se=crossfit.se,
            )
            for (members, blend), crossfit in tried.items()
        ),
        before=reliability(before.confidence, before.hits),
        after=reliability(after.confidence, after.hits),
    )
