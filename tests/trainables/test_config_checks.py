"""A config's training part: each wrong name under the key where it was given."""

from __future__ import annotations

import json
from typing import Any

import pytest

from experiment.config import SweepConfig
from search_spaces.params import KNOBS
from search_spaces.sampling import build_space
from trainables.config_checks import NAME_CHECKS, training_problems

NET, OTHER = "timm/test_vit", "timm/test_resnet"


def problems(backbones: tuple[str, ...] = (NET, OTHER), **sections: Any) -> list[str]:
    sections.setdefault("search", {})["backbones"] = backbones
    config = SweepConfig.model_validate_json(
        json.dumps({"name": "x", "data": {"train": "x"}, **sections})
    )
    space, wrong = build_space(config, "x.yaml")
    assert not wrong
    return [str(problem) for problem in training_problems(config, space)]


def test_every_named_hyperparameter_is_looked_up() -> None:
    assert NAME_CHECKS.keys() == {name for name, knob in KNOBS.items() if knob.named}


def test_the_defaults_are_sound() -> None:
    assert problems() == []


@pytest.mark.parametrize("knob", NAME_CHECKS)
def test_a_wrong_name_is_told_once_where_it_was_given(knob: str) -> None:
    [shared] = problems(search={"space": {knob: {"choices": [str(KNOBS[knob].default), "nope"]}}})
    assert shared.startswith(f"search.space.{knob}: got 'nope'; ")
    [own] = problems(search={"per_backbone": {OTHER: {knob: "nope"}}})
    assert own.startswith(f"search.per_backbone.{OTHER}.{knob}: got 'nope'; ")


def test_names_of_other_sections_are_told_there() -> None:
    [loss] = problems(training={"loss": "nope"})
    [policy] = problems(augment={"policy": "nope"})
    assert loss.startswith("training.loss: got 'nope'; ")
    assert policy.startswith("augment.policy: got 'nope'; ")


def test_a_combination_a_meta_feature_and_a_backbone_without_checkpointing() -> None:
    found = problems(
        backbones=("torchvision/resnet18",),
        search={"space": {"rdrop_alpha": 1, "dropout": 0, "drop_path": 0}},
        training={"meta_features": ["weight"], "gradient_checkpointing": True},
    )
    wheres = [text.partition(": ")[0] for text in found]
    assert wheres == [
        "search.space.rdrop_alpha",
        "training.meta_features",
        "training.gradient_checkpointing",
    ]
