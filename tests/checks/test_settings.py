"""Checks go over every value that a backbone may draw, and name the key that it comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from foldrace.checks.config import config_problems
from foldrace.config.schema import SweepConfig
from foldrace.scheduling.nodes import Node
from foldrace.search_spaces.space import build_space

NODES = [Node(cpus=8.0, gpus=0.0)]
VIT, PLAIN = "timm/test_vit", "torchvision/resnet18"  # without checkpointing


def problems(
    space: dict[str, Any] | None = None,
    own: dict[str, dict[str, Any]] | None = None,
    points: list[dict[str, Any]] | None = None,
    **training: Any,
) -> dict[str, str]:
    raw = {
        "name": "n",
        "data": {"train": "."},
        "search": {
            "backbones": [VIT, PLAIN], "space": space or {}, "per_backbone": own or {},
            "points": points or [],
        },
        "training": {"pretrained": False, "image_size": 32} | training,
    }  # fmt: skip
    config = SweepConfig.model_validate_json(json.dumps(raw))
    built, wrong = build_space(config, "c.yaml")
    found = config_problems(config, built, NODES)
    assert not wrong and len({p.where for p in found}) == len(found)
    return {p.where: p.message for p in found}


def test_nothing_is_wrong_with_what_works() -> None:
    assert problems() == {}
    assert problems(own={VIT: {"gradient_checkpointing": True, "precision": "bf16"}}) == {}


CHECKPOINTS = "gradient_checkpointing"


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({CHECKPOINTS: True}, f"training.{CHECKPOINTS}"),
        ({"space": {CHECKPOINTS: "search"}}, f"search.space.{CHECKPOINTS}"),
        (
            {"own": {PLAIN: {CHECKPOINTS: {"choices": [False, True]}}}},
            f"search.per_backbone.{PLAIN}.{CHECKPOINTS}",
        ),
        (
            {"points": [{"backbone": PLAIN, "params": {CHECKPOINTS: True}}]},
            f"search.points[0].params.{CHECKPOINTS}",
        ),
    ],
)
def test_gradient_checkpointing(given: dict[str, Any], where: str) -> None:
    found = problems(**given)
    assert list(found) == [where] and found[where].startswith(PLAIN)


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"precision": "fp16"}, "training.precision"),
        ({"space": {"precision": {"choices": ["auto", "fp16"]}}}, "search.space.precision"),
        ({"own": {VIT: {"precision": "fp16"}}}, f"search.per_backbone.{VIT}.precision"),
        (
            {"points": [{"backbone": VIT, "params": {"precision": "fp16"}}]},
            "search.points[0].params.precision",
        ),
    ],
)
def test_fp16_without_a_gpu(given: dict[str, Any], where: str) -> None:
    found = problems(**given)
    assert list(found) == [where] and "needs a GPU" in found[where]


def test_a_section_that_the_space_overrules_is_not_checked() -> None:
    assert problems(space={"precision": "fp32", CHECKPOINTS: False}, precision="fp16",
                    gradient_checkpointing=True) == {}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"space": {"pretrained": {"choices": [False, "WEIGHTS"]}}}, "search.space.pretrained"),
        (
            {"own": {VIT: {"pretrained": "WEIGHTS"}}},
            "search.per_backbone.timm/test_vit.pretrained",
        ),
        (
            {"points": [{"backbone": VIT, "params": {"pretrained": "WEIGHTS"}}]},
            "search.points[0].params.pretrained",
        ),
        ({"pretrained": "WEIGHTS"}, "training.pretrained"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_weights_that_are_not_there(tmp_path: Path, given: dict[str, Any], key: str) -> None:
    path = str(tmp_path / "gone.safetensors")
    found = problems(**json.loads(json.dumps(given).replace("WEIGHTS", path)))
    assert list(found) == [f"{key}: {path}"] and "cannot be read" in found[f"{key}: {path}"]


def test_an_image_size_of_one_backbone_alone() -> None:
    found = problems(own={VIT: {"image_size": {"choices": [32, 33]}}})
    assert list(found) == [f"search.backbones: {VIT}"] and "33 px" in str(found)
    found = problems(own={VIT: {"image_size": {"low": 32, "high": 64}}})
    assert list(found) == [f"search.per_backbone.{VIT}.image_size"]
    points = [{"backbone": VIT, "params": {"image_size": 33}}]
    assert list(problems(points=points)) == ["search.points[0].params.image_size"]
