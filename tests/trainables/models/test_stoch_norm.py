"""Stochastic norms against the sentences of their paper, with torch's own batch norms."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from foldrace.trainables.models.stoch_norm import make_stochastic
from foldrace.trainables.step import frozen_norm_statistics


def norm_of(kind: str) -> nn.Module:
    """A norm of 40 channels that has seen other images than those to come."""
    torch.manual_seed(0)
    norm = (
        nn.BatchNorm2d(40) if kind == "torch" else timm.layers.BatchNormAct2d(40, act_layer=nn.SiLU)
    )
    for _ in range(3):
        norm(2 * torch.randn(8, 40, 3, 3) + 1)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def images() -> Tensor:
    return torch.randn(6, 40, 5, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["torch", "timm"])
def test_each_channel_is_normalised_by_the_batch_or_as_in_scoring(kind: str) -> None:
    plain, stochastic = norm_of(kind), norm_of(kind)
    assert make_stochastic(stochastic, 0.3) == 1
    scored = copy.deepcopy(plain).eval()(images())
    trained = plain(images())
    found = stochastic(images())
    assert not torch.allclose(scored, trained, atol=0.1)
    moving = (found - scored).abs().amax((0, 2, 3)) < 1e-5
    by_batch = (found - trained).abs().amax((0, 2, 3)) < 1e-5
    assert (moving ^ by_batch).all() and 4 <= int(moving.sum()) <= 20  # 12 ± 3 sd
    for name, buffer in plain.named_buffers():  # the statistics learn as ever
        assert torch.equal(buffer, dict(stochastic.named_buffers())[name])


@pytest.mark.parametrize(("share", "training"), [(0.0, True), (1.0, False)])
def test_the_ends_of_the_range(share: float, training: bool) -> None:
    stochastic, plain = norm_of("torch"), norm_of("torch").train(training)
    make_stochastic(stochastic, share)
    torch.testing.assert_close(stochastic(images()), plain(images()))


def test_gradients_are_finite_and_nothing_is_stochastic_in_scoring() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    plain = copy.deepcopy(model).eval()
    assert make_stochastic(model, 0.5) > 3
    assert model.state_dict().keys() == plain.state_dict().keys()
    pixels = torch.rand(4, 3, 32, 32)
    assert torch.equal(model.eval()(pixels), plain(pixels))
    model.train()(pixels).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    before = copy.deepcopy(model.state_dict())
    with frozen_norm_statistics(model):
        model(pixels)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_other_norms_are_left_alone() -> None:
    model = timm.create_model("test_convnext", num_classes=3)
    assert make_stochastic(model, 0.5) == 0
