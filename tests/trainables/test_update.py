"""One optimiser step of every technique against the same step written out by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from foldrace.search_spaces.hyperparameters import TrialParams
from foldrace.trainables.optimizers import build_optimizer
from foldrace.trainables.schedules import build_schedule
from foldrace.trainables.state import TrainState, build_ema
from foldrace.trainables.step import Examples, train_step

LR, CLASSES, BATCH = 0.1, 3, 8
PLAIN = TrialParams(
    optimizer="sgd", momentum=0.0, lr=LR, weight_decay=0.0, schedule="constant", warmup=0.0
)


class Net(nn.Module):
    """Dropout and a batch norm, like what is trained."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(dropout),
            nn.Linear(6, CLASSES),
        )  # fmt: skip

    def forward(self, images: Tensor, meta: Tensor | None = None) -> Tensor:
        return self.layers(images)  # type: ignore[no-any-return]


def state_for(net: nn.Module, params: TrialParams = PLAIN, **changes: Any) -> TrainState:
    optimizer = build_optimizer(net, params)
    parts: dict[str, Any] = {
        "accelerator": Accelerator(cpu=True),
        "model": net,
        "bare": net,
        "ema": None,
        "criterion": functional.cross_entropy,
        "optimizer": optimizer,
        "schedule": build_schedule(optimizer, params, 10, 1),
        "sam_rho": 0.0,
        "rdrop_alpha": 0.0,
        "activation": "softmax",
        "layer_ids": None,
        "clip_grad": None,
        "micro_batch": BATCH,
    }
    return TrainState(**parts | changes)


def examples(seed: int = 0) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(BATCH, 3, 2, 2, generator=generator)
    targets = torch.softmax(2 * torch.randn(BATCH, CLASSES, generator=generator), 1)
    return Examples(images, torch.empty(BATCH, 0), targets)


def nets(dropout: float = 0.0) -> tuple[Net, Net]:
    """The same twice: one for `train_step`, one for the hand."""
    torch.manual_seed(1)
    net = Net(dropout).train()
    return net, copy.deepcopy(net)


def assert_same(ours: nn.Module, other: nn.Module) -> None:
    for (name, mine), theirs in zip(
        ours.state_dict().items(), other.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(mine, theirs, msg=lambda text, name=name: f"{name}: {text}")


def gradients(net: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(net.parameters())))


def descend(net: nn.Module, grads: list[Tensor], rate: float = LR) -> None:
    with torch.no_grad():
        for parameter, grad in zip(net.parameters(), grads, strict=True):
            parameter -= rate * grad


def test_plain() -> None:
    ours, other = nets()
    data = examples()
    loss, logits = train_step(state_for(ours), data, BATCH)
    expected = functional.cross_entropy(out := other(data.images), data.targets)
    descend(other, gradients(other, expected))
    torch.testing.assert_close((loss, logits), (expected.detach(), out.detach()))
    assert_same(ours, other)


@pytest.mark.parametrize("rho", [0.05, 0.5])
def test_sharpness_aware(rho: float) -> None:
    """Batch statistics learn from the first pass alone."""
    ours, other = nets()
    data = examples()
    loss, _ = train_step(state_for(ours, sam_rho=rho), data, BATCH)
    first = functional.cross_entropy(other(data.images), data.targets)
    grads = gradients(other, first)
    norm = torch.sqrt(sum((g**2).sum() for g in grads))  # type: ignore[arg-type]
    probe = copy.deepcopy(other)
    descend(probe, grads, -rho / float(norm))
    descend(other, gradients(probe, functional.cross_entropy(probe(data.images), data.targets)))
    torch.testing.assert_close(loss, first.detach())
    assert_same(ours, other)


def test_rdrop() -> None:
    """The doubled batch by hand, with the same dropout mask."""
    ours, other = nets(dropout=0.4)
    data, alpha = examples(), 0.7
    torch.manual_seed(5)
    loss, logits = train_step(state_for(ours, rdrop_alpha=alpha), data, BATCH)
    torch.manual_seed(5)
    p, q = other(torch.cat([data.images, data.images])).log_softmax(1).chunk(2)
    fit = -((data.targets * p).sum(1) + (data.targets * q).sum(1)).mean() / 2
    kl = functional.kl_div(p, q, log_target=True, reduction="batchmean")
    kl = kl + functional.kl_div(q, p, log_target=True, reduction="batchmean")
    expected = fit + alpha / 2 * kl
    descend(other, gradients(other, expected))
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(logits.log_softmax(1), p.detach())
    assert_same(ours, other)


def test_clipping_comes_before_the_step() -> None:
    ours, other = nets()
    data = examples()
    train_step(state_for(ours, clip_grad=0.01), data, BATCH)
    grads = gradients(other, functional.cross_entropy(other(data.images), data.targets))
    norm = torch.sqrt(sum((g**2).sum() for g in grads))  # type: ignore[arg-type]
    descend(other, [g * 0.01 / norm for g in grads])
    assert_same(ours, other)


@pytest.mark.parametrize("technique", ["plain", "sam", "rdrop"])
def test_micro_batches_add_up(technique: str) -> None:
    """Without batch statistics and dropout, which see the parts, they change nothing."""
    torch.manual_seed(2)
    whole = nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES))
    parts = copy.deepcopy(whole)
    for net, size in ((whole, BATCH), (parts, 3)):
        with_meta = _IgnoringMeta(net)
        state = state_for(with_meta, micro_batch=size)
        state.rdrop_alpha = 1.0 if technique == "rdrop" else 0.0
        state.sam_rho = 0.1 if technique == "sam" else 0.0
        train_step(state, examples(), BATCH)
    assert_same(whole, parts)


class _IgnoringMeta(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor, meta: Tensor) -> Tensor:
        return self.net(images)  # type: ignore[no-any-return]


@given(st.integers(1, 80), st.integers(1, 80), st.sampled_from([1, 2]))
def test_micro_batches_are_even(images: int, size: int, least: int) -> None:
    """As few as their size allows, in order; batch norms never get a single image of several."""
    rows = torch.arange(images)
    parts = list(Examples(rows, rows, rows).micro_batches(size, least))
    assert torch.cat([part.targets for part in parts]).tolist() == list(range(images))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= min(least, images)
    assert max(sizes) <= max(size, 2 * least - 1)  # that many cannot be parted
    assert len(parts) == math.ceil(images / size) or min(sizes) < 2 * least


def test_the_average_and_the_schedule_hear_of_every_step() -> None:
    ours, _ = nets()
    params = TrialParams(optimizer="sgd", momentum=0.0, lr=LR, schedule="cosine", warmup=0.5)
    state = state_for(ours, params, ema=build_ema(ours, 0.9))
    rates = []
    for seed in range(4):
        rates.append(state.optimizer.param_groups[0]["lr"])
        train_step(state, examples(seed), BATCH)
    assert rates == pytest.approx([LR * (0.01 + 0.99 * step / 5) for step in range(4)])
    assert state.updates == 4 and state.ema is not None
    weights = zip(state.ema.module.parameters(), ours.parameters(), strict=True)
    assert any(not torch.equal(average, raw) for average, raw in weights)
