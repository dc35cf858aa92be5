"""Every optimiser that a config may name makes real steps and can be resumed; groups; closed
forms of the first update."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import timm
import torch
import torchvision
from pytorch_optimizer.base.exception import NoClosureError
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torch.nn import functional

from foldrace.config.hyperparameters import TrialParams
from foldrace.trainables.models.classifier import ModelConfig, build_classifier
from foldrace.trainables.models.layers import layer_ids
from foldrace.trainables.optimizers import (
    REFUSED,
    _library_names,
    build_optimizer,
    check_optimizer,
    optimizer_names,
    parameter_groups,
)


def tiny_model() -> nn.Module:
    """Conv, norm and linear layers, in the memory format of trials."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )
    return model.to(memory_format=torch.channels_last)


LAYERS = {"0.weight": 0, "1.weight": 1, "1.bias": 1, "5.weight": 2, "5.bias": 2}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    images, labels = torch.rand(8, 3, 6, 6), torch.arange(8) % 4
    for _ in range(steps):
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def params_of(name: str) -> TrialParams:
    return TrialParams(optimizer=name, lr=1e-3, weight_decay=0.05, layer_decay=0.5)


@pytest.mark.parametrize("name", optimizer_names())
def test_steps_resumes_as_if_never_interrupted_and_leaves_frozen_weights(name: str) -> None:
    assert check_optimizer("search.space.optimizer", name) is None
    model = tiny_model()
    optimizer = build_optimizer(model, params_of(name), LAYERS)
    assert len({group["lr"] for group in optimizer.param_groups}) == 3
    start = weights(model)
    train(model, optimizer, 12, seed=1)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not all(map(torch.equal, start, weights(model)))

    again = copy.deepcopy(model)
    resumed = build_optimizer(again, params_of(name), LAYERS)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 2, seed=2)
    train(again, resumed, 2, seed=2)
    for undisturbed, restored in zip(weights(model), weights(again), strict=True):
        torch.testing.assert_close(undisturbed, restored, rtol=0, atol=1e-7)

    model[0].requires_grad_(False)
    frozen = model[0].weight.clone()
    train(model, optimizer, 2, seed=3)
    assert torch.equal(model[0].weight, frozen)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str) -> None:
    problem = check_optimizer("search.space.optimizer", name)
    assert name in _library_names()
    assert problem is not None and problem.where == "search.space.optimizer"
    assert problem.message == f"{name} {REFUSED[name]}"


def cannot_step() -> list[str]:
    """Not those that would step, but to no good, or where a package is installed."""
    others = ("schedulefree", "kron", "sara", "bnb", "fused", "demo")
    return [name for name in REFUSED if not any(other in name for other in others)]


@pytest.mark.parametrize("name", cannot_step())
def test_refused_because_it_cannot_step(name: str) -> None:
    model = tiny_model()
    model[0].register_parameter("bias", nn.Parameter(torch.zeros(6)))
    with pytest.raises((TypeError, ValueError, RuntimeError, AttributeError, NoClosureError)):
        train(model, build_optimizer(model, params_of(name)), 2, seed=1)


@pytest.mark.parametrize(
    ("name", "near"),
    [("adamv", "adamw"), ("timm/adann", "timm/adan"), ("lion", "timm/lion"), ("SGD", "sgd")],
)
def test_unknown_name(name: str, near: str) -> None:
    problem = check_optimizer("search.space.optimizer", name)
    assert problem is not None and f"got {name!r}; did you mean " in problem.message
    assert near in problem.message.split("?")[0]


def test_biases_and_norms_are_not_decayed_as_in_timm() -> None:
    model = tiny_model()
    optimizer = build_optimizer(model, TrialParams(weight_decay=0.07))
    found = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    timm_groups = param_groups_weight_decay(model, 0.07)
    assert found == {p: g["weight_decay"] for g in timm_groups for p in g["params"]}
    assert len(found) == 5 and sorted(found.values()) == [0.0, 0.0, 0.0, 0.07, 0.07]


def undecayed(model: nn.Module) -> set[str]:
    """Names of the parameters that our groups give no weight decay."""
    decay = {
        parameter: group["weight_decay"]
        for group in parameter_groups(model, TrialParams(weight_decay=0.05))
        for parameter in group["params"]
    }
    assert set(decay.values()) <= {0.0, 0.05}
    return {name for name, parameter in model.named_parameters() if not decay[parameter]}


def undecayed_by_timm(model: nn.Module) -> set[str]:
    listed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=listed)
    free = {p for group in groups if not group["weight_decay"] for p in group["params"]}
    return {name for name, parameter in model.named_parameters() if parameter in free}


@pytest.mark.parametrize(
    ("name", "scales"),
    [
        ("test_vit", ""),
        ("test_convnext", ""),
        ("swin_tiny_patch4_window7_224", ""),
        ("swinv2_cr_tiny_224", ""),
        ("swinv2_tiny_window8_256", ""),
        ("xcit_nano_12_p16_224", "temperature"),
        ("test_nfnet", "gain"),
    ],
)
def test_what_is_not_decayed_is_timms_and_scales_of_many_dimensions(name: str, scales: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    found, theirs = undecayed(model), undecayed_by_timm(model)
    assert theirs <= found
    assert all(scales and each.endswith(scales) for each in found - theirs)
    assert bool(found - theirs) is bool(scales)


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("convnext_tiny", ("layer_scale",)),
        ("swin_v2_t", ("logit_scale",)),
        ("swin_t", ("relative_position_bias_table",)),
        ("vit_b_16", ("class_token", "pos_embedding")),
    ],
)
def test_torchvisions_scales_and_positions_are_not_decayed(
    name: str, ends: tuple[str, ...]
) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    shapes = {name: parameter.ndim for name, parameter in model.named_parameters()}
    flat = {name for name, ndim in shapes.items() if ndim == 1 or name.endswith(".bias")}
    others = {name for name in shapes if name.endswith(ends)}
    assert others and undecayed(model) == flat | others


def test_a_stacks_members_say_for_themselves_what_is_not_decayed() -> None:
    config = ModelConfig("stack(timm/test_vit,timm/swin_tiny_patch4_window7_224)", 3, 224)
    with torch.device("meta"):
        model = build_classifier(config)
    found = undecayed(model)
    assert "body.members.0.pos_embed" in found
    assert "body.members.1.layers.0.blocks.0.attn.relative_position_bias_table" in found
    assert not any(name.endswith("mlp.fc1.weight") for name in found)


def test_the_heads_own_rate() -> None:
    model = build_classifier(ModelConfig("timm/test_vit", 3, 160))
    plain = TrialParams(lr=1e-3, layer_decay=0.7)
    ids = layer_ids(model)
    rates = [
        {p: group["lr"] for group in parameter_groups(model, params, ids) for p in group["params"]}
        for params in (plain, replace(plain, head_lr=8.0))
    ]
    for name, parameter in model.named_parameters():
        factor = 8.0 if name in ("head.1.weight", "head.1.bias") else 1.0
        assert rates[1][parameter] == factor * rates[0][parameter], name


@pytest.mark.parametrize(
    ("optimizer", "lr_batch", "rate"),
    [
        ("adamw", 0, 1e-3),
        ("adamw", 256, 5e-4),
        ("timm/lamb", 16, 2e-3),
        ("sgd", 256, 2.5e-4),
        ("timm/sgdw", 16, 4e-3),
        ("pytorch_optimizer/sgd", 64, 1e-3),
    ],
)
def test_the_rate_follows_the_batch_size(optimizer: str, lr_batch: int, rate: float) -> None:
    params = TrialParams(lr=1e-3, batch_size=64, optimizer=optimizer, lr_batch=lr_batch)
    groups = build_optimizer(tiny_model(), params).param_groups
    assert [group["lr"] for group in groups] == pytest.approx([rate] * len(groups))


def test_layer_decay_is_timms() -> None:
    model = timm.create_model("test_vit", num_classes=3)
    listed = model.no_weight_decay()
    theirs = {
        p: (1e-3 * g["lr_scale"], g["weight_decay"])
        for g in param_groups_layer_decay(model, 0.05, listed, layer_decay=0.6)
        for p in g["params"]
    }
    matcher = timm.models.group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    params = TrialParams(lr=1e-3, weight_decay=0.05, layer_decay=0.6)
    groups = parameter_groups(model, params, matcher)
    ours = {p: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert groups[0]["lr"] == 1e-3
    for name, parameter in model.named_parameters():
        assert ours[parameter] == pytest.approx(theirs[parameter]), name


def test_without_layer_decay_one_rate() -> None:
    groups = parameter_groups(tiny_model(), TrialParams(lr=0.2, layer_decay=1.0), LAYERS)
    assert [group["lr"] for group in groups] == [0.2, 0.2]


def one_weight(name: str, **params: float) -> tuple[nn.Linear, torch.optim.Optimizer]:
    layer = nn.Linear(2, 2, bias=False)  # a single weight would be a scale, without decay
    nn.init.constant_(layer.weight, 2.0)
    values = {"optimizer": name, "lr": 0.1, "weight_decay": 0.5, **params}
    return layer, build_optimizer(layer, TrialParams.from_dict(values))


def test_one_update_of_adamw_by_hand() -> None:
    layer, optimizer = one_weight("adamw")
    layer(torch.tensor([[3.0, 3.0]])).sum().backward()
    optimizer.step()
    # Decay: 2 - 0.1 * 0.5 * 2; then Adam's first step is lr in the direction of the gradient.
    for weight in layer.weight.flatten().tolist():
        assert weight == pytest.approx(2.0 * (1 - 0.05) - 0.1, abs=1e-6)


def test_two_updates_of_sgd_by_hand() -> None:
    layer, optimizer = one_weight("sgd", momentum=0.8)
    weight, velocity = 2.0, 0.0
    for _ in range(2):
        optimizer.zero_grad()
        layer(torch.tensor([[3.0, 3.0]])).sum().backward()
        optimizer.step()
        gradient = 3.0 + 0.5 * weight
        velocity = 0.8 * velocity + gradient
        weight -= 0.1 * (gradient + 0.8 * velocity)
    assert layer.weight.flatten().tolist() == pytest.approx([weight] * 4, abs=1e-6)
    assert not one_weight("sgd", momentum=0.0)[1].param_groups[0]["nesterov"]


@pytest.mark.parametrize("name", ["adamw", "timm/adamw", "pytorch_optimizer/adamw", "timm/lion"])
def test_momentum_is_the_first_beta(name: str) -> None:
    assert one_weight(name, momentum=0.83)[1].param_groups[0]["betas"][0] == 0.83


@pytest.mark.parametrize("name", ["timm/sgdw", "pytorch_optimizer/sgd", "timm/lars"])
def test_momentum_is_momentum(name: str) -> None:
    assert one_weight(name, momentum=0.83)[1].param_groups[0]["momentum"] == 0.83
