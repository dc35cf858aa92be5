"""Nonsense that a trial may draw is a problem that says why; all else passes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from foldrace.checks.combinations import check_combinations
from foldrace.config.schema import SweepConfig
from foldrace.core.errors import Problem
from foldrace.search_spaces.space import build_space
from foldrace.trainables.models.classifier import drops_paths


def problems(
    space: dict[str, Any],
    own: dict[str, dict[str, Any]] | None = None,
    backbones: tuple[str, ...] = ("timm/a", "timm/b"),
    **training: Any,
) -> list[Problem]:
    search = {"backbones": backbones, "space": space, "per_backbone": own or {}}
    raw = {
        "name": "n",
        "data": {"train": "."},
        "search": search,
        "training": training,
    }
    config = SweepConfig.model_validate_json(json.dumps(raw))
    built, wrong = build_space(config, "c.yaml")
    assert not wrong
    return check_combinations(built.settings, lambda backbone: backbone != "timm/c")


NO_MIX = {"mixup_prob": 0, "label_smoothing": 0}


def between(low: float, high: float) -> dict[str, float]:
    return {"low": low, "high": high}


def test_defaults_are_sound() -> None:
    assert problems({}) == []
    assert check_combinations({}, drops_paths) == []


@pytest.mark.parametrize(
    ("space", "training", "knob", "says"),
    [
        ({"sam_rho": 0.05}, {"precision": "fp16"}, "sam_rho", "bf16 or fp32"),
        ({"sam_rho": "search"}, {"precision": "fp16"}, "sam_rho", "sam_rho 0"),
        ({"rdrop_alpha": 1, "dropout": 0, "drop_path": 0}, {}, "rdrop_alpha", "above 0"),
        ({"rdrop_alpha": 1, "dropout": 0}, {}, "rdrop_alpha", "drop_path 0"),  # its default
        ({"sam_rho": 0.05, "precision": {"choices": ["bf16", "fp16"]}}, {}, "sam_rho", "sam_rho 0"),
        (
            {"rdrop_alpha": 1, "dropout": {"choices": [0, 0.3]}, "drop_path": 0},
            {},
            "rdrop_alpha",
            "the same",
        ),
        ({"loss": "ldam"} | NO_MIX | {"mixup_prob": 0.1}, {}, "mixup_prob", "MixUp"),
        (NO_MIX | {"label_smoothing": 0.1}, {"loss": "ldam"}, "label_smoothing", "ldam"),
        (
            NO_MIX | {"loss": {"choices": ["focal", "ldam"]}, "cutmix_prob": "search"},
            {},
            "cutmix_prob",
            "one class an image",
        ),
        ({"mixup_prob": 0.5, "cutmix_prob": 0.6}, {}, "cutmix_prob", "a sum of 1 at most"),
        ({"l2_sp": "search"}, {"pretrained": False}, "l2_sp", "there are none"),
        ({"l2_sp": 0.1, "pretrained": "search"}, {}, "l2_sp", "set l2_sp 0 or pretrained true"),
        ({"snapshots": 5}, {"epochs": 5}, "snapshots", "at most 4"),
        ({"snapshots": 2, "cycles": 2}, {}, "snapshots", "2 cycles"),
        ({"snapshots": 2, "cycles": between(1, 6)}, {}, "snapshots", "2 cycles"),
        ({"snapshots": 2, "cycles": {"choices": [1, 2, 4]}}, {}, "snapshots", "2 cycles"),
        ({"cycles": "search", "epochs": between(3, 9)}, {}, "cycles", "6 cycles"),
        ({"cycles": 2, "schedule": "step"}, {}, "cycles", "step may be drawn"),
        (
            {"cycles": 2, "schedule": {"choices": ["cosine", "plateau"]}},
            {},
            "cycles",
            "plateau may be drawn",
        ),
        ({"freeze_epochs": 4, "unfreeze_epochs": 3}, {"epochs": 6}, "freeze_epochs", "6 epochs"),
        ({"unfreeze_epochs": 10, "epochs": between(8, 20)}, {}, "unfreeze_epochs", "8 epochs"),
    ],
)
def test_nonsense(space: dict[str, Any], training: dict[str, Any], knob: str, says: str) -> None:
    found = problems(space, **training)
    assert [problem.where for problem in found] == [f"search.space.{knob}"]
    assert says in found[0].message


@pytest.mark.parametrize(
    ("space", "training"),
    [
        ({"sam_rho": 0.05}, {"precision": "bf16"}),
        ({"sam_rho": 0.05}, {"precision": "auto"}),
        ({"rdrop_alpha": 1, "dropout": 0, "drop_path": 0.1}, {}),
        ({"rdrop_alpha": 1, "dropout": between(0, 0.5), "drop_path": 0}, {}),
        ({"rdrop_alpha": 0, "dropout": 0, "drop_path": 0}, {}),
        (NO_MIX | {"loss": "ldam"}, {}),
        ({"loss": "ldam", "label_smoothing": 0, "mixup_alpha": 0}, {}),
        ({"loss": "bce"}, {}),
        ({"loss": "bcee"}, {}),  # left to the check of names
        ({"mixup_prob": 0.5, "cutmix_prob": 0.5}, {}),
        ({"cutmix_prob": 0.6}, {}),  # MixUp is searched from 0 to 1
        ({"snapshots": 4}, {"epochs": 5}),
        ({"snapshots": 2, "cycles": 3}, {}),
        ({"snapshots": 3, "cycles": {"choices": [1, 4]}}, {}),
        ({"cycles": 3, "epochs": 3}, {}),
        ({"freeze_epochs": 3, "unfreeze_epochs": 3}, {"epochs": 6}),
    ],
)
def test_sense(space: dict[str, Any], training: dict[str, Any]) -> None:
    assert problems(space, **training) == []


def test_a_backbones_own_setting_is_named() -> None:
    own = {"timm/b": {"cycles": between(2, 40)}}
    found = problems({}, own, epochs=30)
    assert [problem.where for problem in found] == ["search.per_backbone.timm/b.cycles"]


def test_a_combination_of_two_sections_is_told_at_its_key() -> None:
    [problem] = problems({}, precision="fp16", sam_rho=0.1)
    assert problem.where == "training.sam_rho" and "unscaled gradients" in problem.message
    own = {"timm/b": {"precision": "fp16"}}
    assert [p.where for p in problems({}, own, sam_rho=0.1)] == ["training.sam_rho"]
    assert problems({"sam_rho": 0}, own, sam_rho=0.1) == []


def test_every_problem_is_told() -> None:
    found = problems({"sam_rho": 0.1, "snapshots": 9, "cycles": 3}, precision="fp16", epochs=4)
    assert [problem.where.split(".")[-1] for problem in found] == [
        "sam_rho",
        "snapshots",
        "snapshots",
    ]


def test_stochastic_depth_is_no_noise_where_there_is_none() -> None:
    space = {"rdrop_alpha": 1, "dropout": 0, "drop_path": 0.2}
    assert problems(space) == []
    [problem] = problems(space, backbones=("timm/c",))
    assert "timm/c has no stochastic depth" in problem.message
    assert drops_paths("timm/test_vit") and drops_paths("torchvision/convnext_tiny")
    assert not drops_paths("torchvision/resnet18")
    assert drops_paths("no such backbone")  # whose own check tells
