"""What a config asks of the training, checked before anything is trained.

Takes a sweep's config and its search space, gives a problem for each name that is in no table, each
combination that makes no sense and each part that a backbone does not offer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from experiment.config import SweepConfig
from experiment.errors import Problem
from search_spaces.sampling import SearchSpace
from trainables.augment import check_policy
from trainables.backbones import check_backbone
from trainables.class_weights import check_class_weights
from trainables.combinations import check_combinations
from trainables.gradient_checkpointing import check_gradient_checkpointing
from trainables.heads import check_head
from trainables.losses import check_loss
from trainables.meta_features import check_meta
from trainables.optimizers import check_optimizer
from trainables.schedules import check_schedule

NAME_CHECKS: dict[str, Callable[[str], Problem | None]] = {
    "optimizer": check_optimizer,
    "schedule": check_schedule,
    "loss": check_loss,
    "class_weights": check_class_weights,
    "head": check_head,
    "policy": check_policy,
}
"""Knob -> the check of its table."""
_SECTION = {"loss": "training.loss", "policy": "augment.policy"}  # where their defaults are


def training_problems(config: SweepConfig, space: SearchSpace) -> list[Problem]:
    """Every problem once, under the key where the value was given."""
    found = [
        *_unknown_names(config, space),
        *check_combinations(space.settings, config.training),
        *check_meta(config.training.meta_features),
        *_checkpointing_problems(config),
    ]
    return list(dict.fromkeys(found))


def _unknown_names(config: SweepConfig, space: SearchSpace) -> Iterator[Problem]:
    for backbone, settings in space.settings.items():
        for knob, check in NAME_CHECKS.items():
            for value in settings[knob].values:
                problem = check(str(value))
                if problem is not None:
                    yield Problem(_given_at(config, backbone, knob), problem.message)


def _given_at(config: SweepConfig, backbone: str, knob: str) -> str:
    if knob in config.search.per_backbone.get(backbone, {}):
        return f"search.per_backbone.{backbone}.{knob}"
    return f"search.space.{knob}" if knob in config.search.space else _SECTION[knob]


def _checkpointing_problems(config: SweepConfig) -> Iterator[Problem]:
    if not config.training.gradient_checkpointing:
        return
    for backbone in dict.fromkeys(config.search.backbones):
        if check_backbone(backbone) is None:
            problem = check_gradient_checkpointing(backbone)
            if problem is not None:
                yield problem
