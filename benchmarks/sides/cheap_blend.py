"""Both figures of a blend as they are printed, and as they are on many new rows.

Takes a `Scene` and a seed, blends its sweep by the product's own functions.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from benchmarks.sides.cheap_sweep import Scene, Sweep, sweep
from foldrace.core.metrics import log_loss_of_true, normalise, row_losses
from foldrace.core.temperature import at_temperature
from foldrace.ensemble.calibration import choose_method, final_fit, methods_to_try
from foldrace.ensemble.fold_mean import fold_mean, loss_of_mean
from foldrace.ensemble.methods import fit_method
from foldrace.ensemble.pool import MemberRows, Pool, member_rows
from foldrace.ensemble.pooling import Fit, Settings, pool_terms
from foldrace.ensemble.uncertainty import standard_error

_NEW, _UNLABELLED = 8000, 500
Figures = dict[str, float]


def measure(scene: Scene, seed: int, new: int = _NEW, unlabelled: int = _UNLABELLED) -> Figures:
    """Both figures of one sweep as they are printed, and as they are on `new` rows."""
    made = sweep(scene, seed, new + unlabelled)
    rows = member_rows(made.log_probs, made.labels, made.folds, groups=made.groups)
    begun = time.process_time()

    def fit(method: str, pool: Pool) -> Fit:
        return fit_method(method, pool, Settings())

    choice = choose_method(rows, methods_to_try(scene.method), fit)
    chosen, temperature, prob = final_fit(
        rows, lambda pool: fit(choice.method, pool), choice.calibration
    )
    seconds = time.process_time() - begun
    logs = _of_folds(made, rows, chosen, choice.calibration.members)
    mean = fold_mean(logs, temperature)
    log_z, truth = mean.log_z[new:], made.new_labels[:new]
    loss, se = loss_of_mean(choice.crossfit.loss, choice.crossfit.se, log_z)
    each = [
        row_losses(_at(of, temperature)[np.arange(new), truth]) for of in (f[:new] for f in logs)
    ]
    one_fold = np.mean(each, axis=0)
    of_mean = row_losses(mean.prob[np.arange(new), truth])
    return {
        "oof": log_loss_of_true(prob[np.arange(len(made.labels)), made.labels]),
        "tried": choice.calibration.crossfit.loss,
        "one fold": choice.crossfit.loss,
        "one fold se": choice.crossfit.se,
        "one fold true": float(one_fold.mean()),
        "one fold true se": standard_error(one_fold),
        "mean": loss,
        "mean se": se,
        "mean true": float(of_mean.mean()),
        "mean true se": standard_error(of_mean),
        "seconds": seconds,
    }


def _of_folds(
    made: Sweep, rows: MemberRows, chosen: Fit, calibrated: bool
) -> list[NDArray[np.float64]]:
    """(n, C) log-probabilities of each fold's blend of the new rows, as in `Predictor`."""
    temperatures = rows.temperatures[0] if calibrated else np.ones(len(rows.members))
    used = chosen.used.tolist()
    return [
        np.log(
            normalise(
                pool_terms(
                    chosen.combiner,
                    (
                        (m, at_temperature(made.new_log_probs[m][fold], float(temperatures[m])))
                        for m in used
                    ),
                )
            )
        )
        for fold in range(len(made.new_log_probs[0]))
    ]


def _at(log_prob: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    return fold_mean([log_prob], temperature).prob
