"""What is tried where the config says nothing: by weights, kind of backbone, batch and length."""

from __future__ import annotations

import json
from typing import Any

import pytest
import timm
from hypothesis import given
from hypothesis import strategies as st

from foldrace.config.hyperparameters import KNOBS
from foldrace.config.ranges import Float
from foldrace.config.schema import SweepConfig
from foldrace.search_spaces.defaults import SHORT, Family, Situation, by_situation, family
from foldrace.search_spaces.space import SearchSpace, build_space


def space(rows: int | None = None, **sections: Any) -> SearchSpace:
    raw = {"name": "s", "data": {"train": "t"}, **sections}
    raw["search"] = {"backbones": ["timm/resnet18"]} | raw.get("search", {})
    built, problems = build_space(SweepConfig.model_validate_json(json.dumps(raw)), "", rows)
    assert problems == []
    return built


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("resnet", "cnn"), ("efficientnet", "cnn"), ("regnet", "cnn"), ("densenet", "cnn"),
        ("vision_transformer", "transformer"), ("swin_transformer", "transformer"),
        ("eva", "transformer"), ("beit", "transformer"), ("cait", "transformer"),
        ("maxxvit", "hybrid"), ("convnext", "hybrid"), ("mobilevit", "hybrid"),
        ("efficientformer", "hybrid"), ("coat", "hybrid"), ("edgenext", "hybrid"),
    ],
)  # fmt: skip
def test_the_family_of_timms_backbones(module: str, expected: Family) -> None:
    """As timm's own modules have them."""
    names = timm.list_models(module=module)
    wrong = [name for name in names if family(f"timm/{name}") != expected]
    assert names and len(wrong) <= 0.15 * len(names), wrong


FAMILIES = st.sampled_from(["cnn", "hybrid", "transformer"])


@given(
    kind=FAMILIES,
    pretrained=st.booleans(),
    optimizer=st.sampled_from(["adamw", "sgd", "timm/lion"]),
    batch=st.none() | st.integers(1, 4096),
    updates=st.none() | st.integers(1, 10**6),
)
def test_no_default_lies_at_the_edge_of_its_range(
    kind: Family, pretrained: bool, optimizer: str, batch: int | None, updates: int | None
) -> None:
    found = by_situation(Situation(kind, pretrained, optimizer, batch, updates))
    for name, (default, chosen) in found.items():
        if isinstance(chosen, Float):
            limits = KNOBS[name].limits
            assert isinstance(limits, Float)
            off = default in (limits.low, limits.high)
            assert chosen.low < float(default) < chosen.high or off, name


def test_the_rate_goes_by_the_batch() -> None:
    """Adam's by its square root, SGD's by the batch itself."""
    for optimizer, factor in (("adamw", 4.0), ("sgd", 16.0)):
        small, large = (
            Situation("cnn", False, optimizer, batch_size=batch).lr for batch in (32, 512)
        )
        assert large / small == pytest.approx(factor, rel=0.05)


def test_the_rate_from_pretrained_weights_falls_with_the_updates() -> None:
    rates = [Situation("cnn", True, updates=n).lr for n in (100, 300, 1000, 3000, 10**5)]
    assert rates == sorted(rates, reverse=True)
    assert rates[1] / rates[2] == pytest.approx(1000 / 300, rel=0.05)
    assert (rates[0], rates[-1]) == (8 * rates[2], 0.5 * rates[2])
    scratch = {Situation("cnn", False, updates=n).lr for n in (100, 10**5)}
    assert len(scratch) == 1


def test_published_rates_lie_inside() -> None:
    """ConvNeXt 5e-5 and EVA-02 2e-5 to 5e-5 at 512 images, thousands of updates (their papers)."""
    for kind in ("hybrid", "transformer"):
        [lr] = [
            chosen
            for name, (_, chosen) in by_situation(
                Situation(kind, True, batch_size=512, updates=20_000)
            ).items()
            if name == "lr"
        ]
        assert isinstance(lr, Float) and lr.contains(5e-5) and lr.contains(3e-5)


def test_the_situation_is_the_configs() -> None:
    built = space(
        rows=1000,
        folds={"k": 5},
        training={"epochs": 10},
        search={
            "backbones": ["timm/resnet18", "timm/vit_tiny_patch16_224"],
            "per_backbone": {"timm/resnet18": {"pretrained": False, "batch_size": 64}},
        },
    )
    first, other = built.situations.values()
    assert {b: built.default(b).lr_batch for b in built.backbones} == dict.fromkeys(
        built.backbones, 0
    )
    assert first == Situation("cnn", False, "adamw", 64, 10 * (800 // 64))
    assert other == Situation("transformer", True, "adamw", 32, 10 * (800 // 32))


def test_the_rate_follows_a_batch_size_that_is_searched() -> None:
    ranges = {"batch_size": {"choices": [16, 64]}}
    params = space(search={"space": ranges}).default("timm/resnet18")
    assert params.lr_batch == 32 and params.lr == Situation("cnn", True, batch_size=32).lr
    fixed = space(search={"space": ranges}, training={"lr_batch": 0}).default("timm/resnet18")
    assert fixed.lr_batch == 0


def test_layer_decay_and_the_heads_rate_are_searched_from_pretrained_weights_alone() -> None:
    for pretrained in (False, True):
        searched = space(training={"pretrained": pretrained}).searched("timm/resnet18")
        assert ("layer_decay" in searched) is ("head_lr" in searched) is pretrained
    fixed = space(training={"layer_decay": 0.7, "lr": 0.01}).settings["timm/resnet18"]
    assert (fixed["layer_decay"].default, fixed["layer_decay"].range) == (0.7, None)
    assert (fixed["lr"].default, fixed["lr"].range) == (0.01, None)


def test_convolutions_start_with_one_rate_for_all_layers() -> None:
    """In 120 updates EfficientNet-Lite learned less with layer decay."""
    built = space(search={"backbones": ["timm/efficientnet_lite0", "timm/vit_tiny_patch16_224"]})
    cnn, transformer = (built.default(b) for b in built.backbones)
    assert (cnn.layer_decay, cnn.head_lr) == (1.0, 1.0)
    assert (transformer.layer_decay, transformer.head_lr) == (0.9, 3.0)


def test_very_short_trainings_do_not_mix() -> None:
    for rows, mixes in ((30 * 32, False), (300 * 32, True)):
        built = space(rows=rows, folds={"k": 2}, training={"epochs": 2})
        assert built.situations["timm/resnet18"].updates == 2 * (rows // 2 // 32)
        assert (built.situations["timm/resnet18"].updates < SHORT) is not mixes  # type: ignore[operator]
        assert ("mixup_prob" in built.searched("timm/resnet18")) is mixes
        assert built.default("timm/resnet18").mixup_prob == 0.0


def test_backbones_of_unlike_situations_have_parameters_of_their_own() -> None:
    """Optuna would mix their ranges up otherwise."""
    names = ["timm/resnet18", "timm/vit_tiny_patch16_224", "timm/resnet34"]
    built = space(search={"backbones": names})
    rates = [next(n for n in built.searched(b) if n.startswith("lr")) for b in names]
    assert rates[0] == rates[2] != rates[1]
    assert all("dropout" in built.searched(b) for b in names)
    for name in names:
        ranges = built.searched(name)
        assert isinstance(ranges[next(n for n in ranges if n.startswith("lr"))], Float)


def test_an_end_that_is_left_out_is_the_situations() -> None:
    usual = space().settings["timm/resnet18"]["lr"].range
    given = space(search={"space": {"lr": {"low": 1e-6}}}).settings["timm/resnet18"]["lr"].range
    assert isinstance(usual, Float) and given == Float(1e-6, usual.high, log=True)
    assert space(search={"space": {"lr": "search"}}).settings["timm/resnet18"]["lr"].range == usual


def test_a_default_at_the_edge_of_the_users_range_gives_way_to_its_middle() -> None:
    lr = space().default("timm/resnet18").lr
    built = space(search={"space": {"lr": {"low": lr / 100, "high": lr, "log": True}}})
    assert built.default("timm/resnet18").lr == pytest.approx(lr / 10)
    off = space(search={"space": {"mixup_prob": {"low": 0.0, "high": 0.4}}})
    assert off.default("timm/resnet18").mixup_prob == 0.0  # no effect: no edge
