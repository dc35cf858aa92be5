"""SAM by hand on a quadratic, and against pytorch-optimizer's on small networks."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from pytorch_optimizer import SAM
from torch import Tensor, nn
from torch.nn import functional

from foldrace.search_spaces.hyperparameters import TrialParams
from foldrace.trainables.optimizers import build_optimizer
from foldrace.trainables.step import frozen_norm_statistics, perturbed_weights


def test_one_update_of_a_quadratic_by_hand() -> None:
    # Loss (a^2 + 4 b^2) / 2, gradient (a, 4 b), at (3, 1): (3, 4), norm 5.
    a, b = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.tensor(1.0))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b], "lr": 0.2}], lr=0.1)
    ((a**2 + 4 * b**2) / 2).backward()
    with perturbed_weights(optimizer, rho=0.5):
        assert (a.item(), b.item()) == pytest.approx((3 + 0.5 * 3 / 5, 1 + 0.5 * 4 / 5))
        assert a.grad is None and b.grad is None
        ((a**2 + 4 * b**2) / 2).backward()
    optimizer.step()
    assert (a.item(), b.item()) == pytest.approx((3 - 0.1 * 3.3, 1 - 0.2 * 4 * 1.4))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3)
    )


def loss_of(model: nn.Module, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(6, 3, 6, 6, generator=generator)
    return functional.cross_entropy(model(images), torch.arange(6) % 3)


def ours(model: nn.Module, optimizer: torch.optim.Optimizer, rho: float, steps: int) -> None:
    for step in range(steps):
        loss_of(model, step).backward()
        with perturbed_weights(optimizer, rho), frozen_norm_statistics(model):
            loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("rho", [0.05, 0.5])
def test_is_pytorch_optimizers(base: type[torch.optim.Optimizer], rho: float) -> None:
    model, twin = net(), net()
    ours(model, base(model.parameters(), lr=0.05), rho, steps=4)  # type: ignore[call-arg]

    theirs = SAM(twin.parameters(), base, rho=rho, lr=0.05)
    for step in range(4):
        loss_of(twin, step).backward()
        theirs.first_step(zero_grad=True)
        with frozen_norm_statistics(twin):
            loss_of(twin, step).backward()
        theirs.second_step(zero_grad=True)
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("name", ["adamw", "sgd", "timm/lamb", "pytorch_optimizer/adan"])
def test_around_any_optimiser_by_a_second_implementation(name: str) -> None:
    """Gradients at the perturbed weights come from a copy of the model."""
    params = TrialParams(optimizer=name, lr=0.02)
    model, twin = net(), net()
    ours(model, build_optimizer(model, params), 0.1, steps=3)
    optimizer = build_optimizer(twin, params)
    for step in range(3):
        loss_of(twin, step).backward()
        norm = math.sqrt(sum(float((p.grad**2).sum()) for p in twin.parameters()))
        worst = copy.deepcopy(twin)
        for moved, p in zip(worst.parameters(), twin.parameters(), strict=True):
            moved.data = p.data + 0.1 * p.grad / norm
            moved.grad = None
        loss_of(worst, step).backward()
        for moved, p in zip(worst.parameters(), twin.parameters(), strict=True):
            p.grad = moved.grad
        optimizer.step()
        optimizer.zero_grad()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))


def test_restored_bit_for_bit_after_an_error() -> None:
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="in between"), perturbed_weights(optimizer, 0.3):
        assert not torch.equal(before[0], next(model.parameters()))
        raise RuntimeError("in between")
    assert all(map(torch.equal, before, model.parameters()))


def test_frozen_weights_and_zero_gradients_stay() -> None:
    model = net()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (0.0 * loss_of(model, 0)).backward()
    with perturbed_weights(optimizer, 0.3):
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("make", [net, lambda: timm.create_model("test_resnet", num_classes=3)])
def test_statistics_are_kept_and_the_output_is_the_same(make) -> None:
    model = make().train()
    images = (
        torch.rand(4, 3, 6, 6) if isinstance(model, nn.Sequential) else torch.rand(4, 3, 64, 64)
    )
    before = copy.deepcopy(dict(model.named_buffers()))
    with frozen_norm_statistics(model):
        inside = model(images)
    torch.testing.assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)
    torch.testing.assert_close(model(images), inside)
    assert any(not torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_statistics_are_learned_again_after_an_error() -> None:
    model = net()
    model[1].eval()
    with pytest.raises(RuntimeError), frozen_norm_statistics(model):
        raise RuntimeError
    assert model[1].track_running_stats and not model[1].training
