"""Stacks: names, and the members' pooled features side by side."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from foldrace.trainables.models.backbones import build_encoder, check_backbone
from foldrace.trainables.models.classifier import (
    Classifier,
    ModelConfig,
    build_classifier,
    check_image_size,
    parameter_count,
)
from foldrace.trainables.models.layers import layer_ids
from foldrace.trainables.models.stack import StackMember, members

RESNET, VIT = "timm/test_resnet", "timm/test_vit"
STACK = f"stack({RESNET},{VIT}@48,torchvision/mobilenet_v3_small)"


def stack(head: str = "linear") -> Classifier:
    torch.manual_seed(0)
    return build_classifier(ModelConfig(STACK, 4, 32, head)).eval()


def test_members_of_a_name() -> None:
    assert members(STACK) == (
        StackMember(RESNET, None),
        StackMember(VIT, 48),
        StackMember("torchvision/mobilenet_v3_small", None),
    )
    assert members(RESNET) == (StackMember(RESNET, None),)
    assert check_backbone(STACK) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"stack( {RESNET} ,{VIT}@ 48 )", f"without spaces: stack({RESNET},{VIT}@48)"),
        (f"stack ({RESNET},{VIT})", f"without spaces: stack({RESNET},{VIT})"),
        (f"stack({RESNET}", 'put the name in quotes: ["stack(timm/a,timm/b)"]'),
        (f"stack({RESNET},stack({VIT},{VIT}))", "a stack holds no stacks"),
        (f"stack({RESNET})", "two or more members"),
        (f"stack({RESNET},)", "two or more members"),
        ("stack()", "two or more members"),
        (f"stack({RESNET},{VIT},{RESNET})", f"has {RESNET} twice"),
        (f"stack({RESNET},{VIT}@8)", f"{VIT}@8: the size should be from 16 to 2048 pixels"),
        (f"stack({RESNET},{VIT}@)", f"{VIT}@: the size should be"),
        (f"stack({RESNET},{VIT}@32@48)", "the size should be"),
        (f"stack({RESNET},timm/resnet1818)", "timm/resnet1818: unknown backbone; did you mean "),
        (f"stack(resnet18,{VIT})", "resnet18: should look like timm/<name>"),
        ("stack(timm/xyzzy,torchvision/googlenet)", "torchvision/googlenet: has no linear"),
    ],
)
def test_wrong_names_are_told_with_the_member(name: str, expected: str) -> None:
    problem = check_backbone(name)
    assert problem is not None and problem.where == f"search.backbones: {name}"
    assert expected in problem.message


def test_pooled_features_side_by_side_each_normalised_and_sized_by_its_own() -> None:
    model = stack().double()
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    parts: list[Tensor] = []
    with torch.no_grad():
        for i, member in enumerate(members(STACK)):
            size = member.image_size or 32
            encoder = build_encoder(member.backbone, size, False, 0.0)
            module, normalise = encoder.module.double().eval(), encoder.normalise.double()
            module.load_state_dict(model.body.members[i].state_dict())  # type: ignore
            resized = functional.resize(images, [size, size], antialias=True)
            parts.append(module(normalise(resized)))
        expected = model.head(torch.cat(parts, dim=1))
        torch.testing.assert_close(model(images), expected)


def test_members_without_a_size_follow_the_images() -> None:
    model = stack()
    seen: dict[int, torch.Size] = {}
    for i, member in enumerate(model.body.members):  # type: ignore[arg-type, union-attr]
        member.register_forward_pre_hook(
            lambda module, args, i=i: seen.update({i: args[0].shape[2:]})
        )
    with torch.no_grad():
        model(torch.rand(1, 3, 64, 64))
    assert seen == {0: (64, 64), 1: (48, 48), 2: (64, 64)}


@pytest.mark.parametrize("head", ["linear", "layernorm", "mlp"])
def test_gradients_reach_every_member(head: str) -> None:
    model = stack(head).train()
    model(torch.rand(2, 3, 32, 32)).square().sum().backward()
    for member in model.body.members:  # type: ignore[union-attr]
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in member.parameters())


def test_size_and_refusals() -> None:
    model = stack()
    assert parameter_count(ModelConfig(STACK, 4, 32)) == sum(p.numel() for p in model.parameters())
    assert check_image_size(STACK, 32) is None
    problem = check_image_size(f"stack({RESNET},{VIT}@70)", 32)
    assert problem is not None and f"{VIT} refuses 70 px" in problem.message
    problem = check_image_size(f"stack({RESNET},{VIT})", 70)
    assert problem is not None and f"{VIT} refuses 70 px" in problem.message


def test_a_copy_is_its_own() -> None:
    """As EMA makes one."""
    model = stack()
    twin = copy.deepcopy(model)
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        before = model(images)
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(model(images), before)


def test_layers_of_the_members_lie_side_by_side() -> None:
    model = stack()
    ids = layer_ids(model)
    assert set(ids) == {name for name, _ in model.named_parameters()}
    head = ids["head.1.weight"]
    for i, member in enumerate(members(STACK)):
        alone = layer_ids(build_classifier(ModelConfig(member.backbone, 2, 48)))
        last = max(alone.values()) - 1  # in front of the head
        prefix = f"body.members.{i}."
        own = {f"body.{k.removeprefix(prefix)}": v for k, v in ids.items() if k.startswith(prefix)}
        assert {own[k] for k, number in alone.items() if number == 0} == {0}
        assert {own[k] for k, number in alone.items() if number == last} == {head - 1}
        ordered = sorted(own, key=lambda k: alone[k])
        assert [own[k] for k in ordered] == sorted(own.values())
