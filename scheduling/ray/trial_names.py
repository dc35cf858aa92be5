"""Names of fold trials for people: in Ray's dashboard and list of tasks, and in the process list.

A worker process serves many trials, and Ray shows it under the name of the call that it answers: so
the calls by which Tune lets a trial train are given the trial's name.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

from ray import tune

NAME = "name"
"""Key of the name in what Tune passes to a worker."""

_UPDATE_NAME = "result so far"


def trial_name(candidate: str, fold: int, backbone: str) -> str:
    """`c0007/f2 convnext_tiny`: backbones without their library and the tag of their weights."""
    return f"{candidate}/f{fold} {re.sub(r'[^/(,]+/|[.][^,)]+', '', backbone)}"


def shown_name(trial: Any) -> str:
    """The name of a Tune trial."""
    return str(trial.config.get(NAME, _UPDATE_NAME))


class NamedCalls(tune.Callback):
    """Gives each trial's calls of its worker the trial's name."""

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Rename the calls to come of the process that the trial has got, new or used before."""
        # Tune has no setting for it; a Ray whose insides differ shows the method's name, as ever.
        with suppress(AttributeError):
            actor = trial.temporary_state.ray_actor
            vars(actor).pop("train", None)  # the last trial's
            actor.train = actor.train.options(name=shown_name(trial))
