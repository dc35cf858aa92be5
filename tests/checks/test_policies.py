"""A plugin's policy may name transforms: they are checked as those of the config's list are."""

from __future__ import annotations

import json

from foldrace.checks.config import _transform_problems
from foldrace.config.schema import SweepConfig
from foldrace.core.plugin_files import PluginFile
from foldrace.core.plugins import load_parts
from foldrace.search_spaces.space import build_space
from foldrace.trainables.plugins import TRAINING_TABLES

PLUGIN = b"""
from foldrace.parts import Policy

PARTS = [
    Policy("sound", "", transforms=({"torchvision.RandomInvert": {"p": 0.5}},)),
    Policy("wrong", "", transforms=({"torchvision.RandomInvart": {}},)),
]
"""


def problems(policy: str) -> list[str]:
    raw = {
        "name": "n",
        "data": {"train": "."},
        "search": {"backbones": ["timm/a"]},
        "augment": {"policy": policy},
        "training": {"image_size": 32},
    }
    config = SweepConfig.model_validate_json(json.dumps(raw))
    parts = load_parts((PluginFile("policies", PLUGIN, "/gone/policies.py"),), TRAINING_TABLES)
    found = _transform_problems(config, build_space(config, "")[0], parts)
    return [f"{problem.where}: {problem.message}" for problem in found]


def test_a_policys_transforms_are_checked() -> None:
    assert problems("sound") == problems("light") == []
    [problem] = problems("wrong")
    assert problem.startswith("policy wrong: transforms")
    assert "did you mean" in problem and "RandomInvert" in problem
