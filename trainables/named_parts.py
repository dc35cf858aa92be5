"""Hyperparameters that are names: which table has their rows.

Takes a hyperparameter and a name, gives a problem where there is no such row.
"""

from __future__ import annotations

from collections.abc import Mapping

from experiment.errors import Problem
from experiment.names import check_name
from trainables.augment import POLICIES
from trainables.class_weights import CLASS_WEIGHTS
from trainables.heads import HEADS
from trainables.losses import LOSSES
from trainables.optimizers import check_optimizer
from trainables.schedules import SCHEDULES

TABLES: dict[str, Mapping[str, object]] = {
    "loss": LOSSES,
    "class_weights": CLASS_WEIGHTS,
    "schedule": SCHEDULES,
    "head": HEADS,
    "policy": POLICIES,
}
OPTIMIZER = "optimizer"  # most of whose names are two libraries', not a table's
NAMED = (*TABLES, OPTIMIZER)


def check_part(knob: str, where: str, name: str) -> Problem | None:
    """`where` is the config's key that gives `name` to `knob`."""
    if knob == OPTIMIZER:
        return check_optimizer(where, name)
    return check_name(where, name, TABLES[knob])
