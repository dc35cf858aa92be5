"""Which layers train in which epoch, as tables; frozen ones stay bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from foldrace.search_spaces.hyperparameters import TrialParams
from foldrace.trainables.models.layers import train_from, trainable_from
from foldrace.trainables.optimizers import build_optimizer
from foldrace.trainables.state import build_ema


@pytest.mark.parametrize(
    ("freeze", "unfreeze", "head", "lowest"),
    [
        (0, 0, 6, [0, 0, 0]),
        (2, 0, 6, [6, 6, 0, 0]),
        (1, 2, 6, [6, 4, 2, 0, 0]),
        (0, 2, 6, [4, 2, 0, 0]),
        (1, 5, 6, [6, 5, 4, 3, 2, 1, 0]),
        (1, 3, 2, [2, 1, 1, 0, 0]),  # fewer layers than epochs
        (1, 1, 5, [5, 2, 0]),
        (3, 1, 1, [1, 1, 1, 0, 0]),
    ],
)
def test_lowest_trained_layer_of_each_epoch(
    freeze: int, unfreeze: int, head: int, lowest: list[int]
) -> None:
    params = TrialParams(freeze_epochs=freeze, unfreeze_epochs=unfreeze)
    assert [trainable_from(epoch, params, head) for epoch in range(len(lowest))] == lowest


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 6, 3),
        nn.BatchNorm2d(6),
        nn.BatchNorm2d(6, affine=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


DEPTH = {"0": 0, "1": 0, "3": 1, "4": 1, "8": 2}


def layer_ids(model: nn.Module) -> dict[str, int]:
    return {name: DEPTH[name.split(".")[0]] for name, _ in model.named_parameters()}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    """First parts of the names of all state that is not bit for bit the same."""
    now = model.state_dict()
    return {name.split(".")[0] for name in now if not torch.equal(now[name], before[name])}


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("optimizer_name", ["adamw", "sgd", "timm/lion", "pytorch_optimizer/adan"])
def test_frozen_state_is_unchanged_bit_for_bit(optimizer_name: str) -> None:
    model = small_model()
    ids = layer_ids(model)
    params = TrialParams(optimizer=optimizer_name, lr=0.05, weight_decay=0.1)
    optimizer = build_optimizer(model, params)
    ema = build_ema(model, 0.9)
    assert ema is not None
    updates = 0
    # Everything, the head alone, the upper half, everything: momentum of older epochs lies around.
    for lowest, moves in ((0, "01345 8"), (2, "8"), (1, "34 8"), (0, "01345 8")):
        train_from(model, ids, lowest)
        ema.module.load_state_dict(model.state_dict())
        before, averaged = copy_of(model), copy_of(ema.module)
        for _ in range(3):
            updates += 1
            loss = functional.cross_entropy(model(torch.rand(8, 3, 9, 9)), torch.arange(8) % 4)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update(model, updates)
        assert changed(before, model) == set(moves) - {" "}
        assert changed(averaged, ema.module) == set(moves) - {" "}


def test_only_norms_leave_the_training_mode() -> None:
    model = small_model()
    train_from(model, layer_ids(model), 2)
    assert [module.training for module in model] == [True, False, True, True, False, False] + [
        True
    ] * 3
    train_from(model, layer_ids(model), 0)
    assert all(module.training for module in model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_frozen_gradients_are_gone() -> None:
    model = small_model()
    model(torch.rand(2, 3, 9, 9)).sum().backward()
    train_from(model, layer_ids(model), 1)
    assert [p.grad is None for p in model.parameters()] == [True] * 4 + [False] * 6
