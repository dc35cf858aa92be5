"""Foldrace: race fold × backbone × hyperparameter trials, and blend the best checkpoints.

>>> run = foldrace.run("cars.yaml")          # or open_run("runs/cars")
>>> run.leaderboard(), run.oof()             # DataFrames
>>> foldrace.Predictor("runs/cars").predict(["car.jpg", array])  # a `Prediction` each
>>> foldrace.greedy(true_prob)               # the blend of any models: (M, N) probabilities

Each name is imported at its first use: `import foldrace` is light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foldrace.api import open_run, resume, run
    from foldrace.ensemble import greedy, optimal
    from foldrace.inference.predictor import Predictor

__version__ = "0.1.0"
__all__ = ["Predictor", "__version__", "greedy", "open_run", "optimal", "resume", "run"]

_HOMES = {
    "Predictor": "foldrace.inference.predictor",
    "greedy": "foldrace.ensemble",
    "open_run": "foldrace.api",
    "optimal": "foldrace.ensemble",
    "resume": "foldrace.api",
    "run": "foldrace.api",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'foldrace' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
