"""The peer of our suggestions: Ray Tune's `OptunaSearch` with Optuna's TPE on all trials.

`python plain_tpe.py TRIALS RUNNING ASKS OUT` makes the search space of `pretend_learner.py`, TRIALS
that have ended at random points and RUNNING ones beside them; writes the seconds of each of ASKS
suggestions as JSON to OUT, for OptunaSearch's own sampler and for TPE with the options of ours.
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, TPESampler
from ray.tune.search.optuna import OptunaSearch

_BACKBONES = ("vit", "resnet", "efficientnet", "byobnet")
_LR = FloatDistribution(1e-5, 1e-2, log=True)
_OWN_LR = FloatDistribution(1e-4, 3e-2, log=True)  # of the last backbone
_SHARED = {
    "weight_decay": FloatDistribution(1e-3, 0.2, log=True),
    "warmup": FloatDistribution(0.0, 0.3),
    "dropout": FloatDistribution(0.0, 0.5),
    "drop_path": FloatDistribution(0.0, 0.2),
    "mixup_alpha": FloatDistribution(0.1, 1.0),
    "mixup_prob": FloatDistribution(0.0, 1.0),
    "label_smoothing": FloatDistribution(0.0, 0.1),
}


def _space(trial: optuna.Trial) -> dict[str, Any]:
    """Tune takes what this returns as constants beside the suggested values."""
    for name, distribution in _knobs(
        str(trial.suggest_categorical("backbone", _BACKBONES))
    ).items():
        trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)
    return {}


def _knobs(backbone: str) -> dict[str, FloatDistribution]:
    own = {"own_lr": _OWN_LR} if backbone == _BACKBONES[-1] else {"lr": _LR}
    return own | _SHARED


def _ended(rng: np.random.Generator) -> optuna.trial.FrozenTrial:
    """A trial at a random point, with the log loss of a valley in log lr."""
    backbone = str(rng.choice(_BACKBONES))
    params: dict[str, Any] = {"backbone": backbone}
    distributions: dict[str, BaseDistribution] = {"backbone": CategoricalDistribution(_BACKBONES)}
    for name, knob in _knobs(backbone).items():
        low, high = (math.log(knob.low), math.log(knob.high)) if knob.log else (knob.low, knob.high)
        drawn = rng.uniform(low, high)
        params[name] = float(np.clip(math.exp(drawn) if knob.log else drawn, knob.low, knob.high))
        distributions[name] = knob
    away = math.log10(params.get("lr", params.get("own_lr")) / 1e-3)
    value = 0.5 + 0.3 * away**2 + abs(params["dropout"] - 0.2) + rng.normal(0.0, 0.05)
    return optuna.create_trial(params=params, distributions=distributions, value=value)


def _seconds(sampler: BaseSampler | None, trials: int, running: int, asks: int) -> list[float]:
    search = OptunaSearch(space=_space, sampler=sampler, metric="val_logloss", mode="min")
    for number in range(running):  # before any has ended: drawn at random, at once
        search.suggest(f"r{number}")
    rng = np.random.default_rng(0)
    # To its study: one by one through Tune they would be asked for first.
    search._ot_study.add_trials([_ended(rng) for _ in range(trials)])
    times = []
    for ask in range(asks):
        mark = time.perf_counter()
        search.suggest(f"a{ask}")
        times.append(time.perf_counter() - mark)
    return times


def main(trials: int, running: int, asks: int, out: Path) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore")  # `group` and `constant_liar` are called experimental
    ours = TPESampler(multivariate=True, group=True, constant_liar=True, seed=0)
    sides = {"OptunaSearch as it comes": None, "OptunaSearch with the options of ours": ours}
    found = {name: _seconds(sampler, trials, running, asks) for name, sampler in sides.items()}
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    given = sys.argv[1:]
    main(int(given[0]), int(given[1]), int(given[2]), Path(given[3]))
