"""Every optimiser that a config may name makes real steps and can be resumed; groups; closed
forms of the first update."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from pytorch_optimizer.base.exception import NoClosureError
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torch.nn import functional

from foldrace.config.hyperparameters import TrialParams
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


def test_layer_decay_is_timms() -> None:
    model = timm.create_model("test_vit", num_classes=3)
    theirs = {
        p: (1e-3 * g["lr_scale"], g["weight_decay"])
        for g in param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.6)
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
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 2.0)
    values = {"optimizer": name, "lr": 0.1, "weight_decay": 0.5, **params}
    return layer, build_optimizer(layer, TrialParams.from_dict(values))


def test_one_update_of_adamw_by_hand() -> None:
    layer, optimizer = one_weight("adamw")
    layer(torch.tensor([[3.0]])).sum().backward()
    optimizer.step()
    # Decay: 2 - 0.1 * 0.5 * 2; then Adam's first step is lr in the direction of the gradient.
    assert layer.weight.item() == pytest.approx(2.0 * (1 - 0.05) - 0.1, abs=1e-6)


def test_two_updates_of_sgd_by_hand() -> None:
    layer, optimizer = one_weight("sgd", momentum=0.8)
    weight, velocity = 2.0, 0.0
    for _ in range(2):
        optimizer.zero_grad()
        layer(torch.tensor([[3.0]])).sum().backward()
        optimizer.step()
        gradient = 3.0 + 0.5 * weight
        velocity = 0.8 * velocity + gradient
        weight -= 0.1 * (gradient + 0.8 * velocity)
    assert layer.weight.item() == pytest.approx(weight, abs=1e-6)
    assert not one_weight("sgd", momentum=0.0)[1].param_groups[0]["nesterov"]


@pytest.mark.parametrize("name", ["adamw", "timm/adamw", "pytorch_optimizer/adamw", "timm/lion"])
def test_momentum_is_the_first_beta(name: str) -> None:
    assert one_weight(name, momentum=0.83)[1].param_groups[0]["betas"][0] == 0.83


@pytest.mark.parametrize("name", ["timm/sgdw", "pytorch_optimizer/sgd", "timm/lars"])
def test_momentum_is_momentum(name: str) -> None:
    assert one_weight(name, momentum=0.83)[1].param_groups[0]["momentum"] == 0.83
