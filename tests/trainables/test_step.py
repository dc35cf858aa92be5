"""One optimiser step of every technique against the same step by hand or by another library."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import timm
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from pytorch_optimizer import SAM
from scipy.special import rel_entr
from torch import Tensor, nn
from torch.nn import functional

from foldrace.config.hyperparameters import TrialParams
from foldrace.trainables.data.mixing import soft_targets
from foldrace.trainables.optimizers import build_optimizer
from foldrace.trainables.schedules import build_schedule
from foldrace.trainables.state import TrainState, build_ema
from foldrace.trainables.step import (
    Examples,
    frozen_norm_statistics,
    perturbed_weights,
    rdrop_loss,
    train_step,
)

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
    return Examples(images, torch.empty(BATCH, 0), targets, torch.empty(BATCH, 0))


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
    parts = list(Examples(rows, rows, rows, rows).micro_batches(size, least))
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


def two_batches(classes: int = 5, scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    first, second = scale * torch.randn(2, 6, classes, generator=generator)
    labels = torch.randint(classes, (6,), generator=generator)
    return first, second, soft_targets(labels, classes, 0.1)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 4.0])
def test_is_two_passes_with_torchs_divergence(alpha: float) -> None:
    first, second, targets = two_batches()
    log_p, log_q = first.log_softmax(1), second.log_softmax(1)
    fit = 0.5 * (
        functional.cross_entropy(first, targets) + functional.cross_entropy(second, targets)
    )
    divergence = functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    divergence += functional.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    found = rdrop_loss(functional.cross_entropy, torch.cat([first, second]), targets, alpha)
    torch.testing.assert_close(found, fit + alpha * 0.5 * divergence)


def divergence_only(first: Tensor, second: Tensor, activation: str) -> float:
    nothing = lambda logits, targets: logits.sum() * 0  # noqa: E731
    stacked = torch.cat([first, second])
    return rdrop_loss(nothing, stacked, torch.zeros_like(first), 1.0, activation).item()  # type: ignore[arg-type]


def test_softmax_divergence_is_scipys() -> None:
    first, second, _ = two_batches()
    p, q = first.double().softmax(1).numpy(), second.double().softmax(1).numpy()
    expected = 0.5 * (rel_entr(p, q) + rel_entr(q, p)).sum(1).mean()
    assert divergence_only(first, second, "softmax") == pytest.approx(expected, rel=1e-5)


def test_sigmoid_divergence_is_scipys_over_both_outcomes() -> None:
    first, second, _ = two_batches()
    p, q = first.double().sigmoid().numpy(), second.double().sigmoid().numpy()
    both_ways = rel_entr(p, q) + rel_entr(1 - p, 1 - q) + rel_entr(q, p) + rel_entr(1 - q, 1 - p)
    expected = 0.5 * both_ways.sum(1).mean()
    assert divergence_only(first, second, "sigmoid") == pytest.approx(expected, rel=1e-5)


def test_equal_passes_do_not_diverge_and_huge_logits_stay_finite() -> None:
    first, second, targets = two_batches(scale=1e4)
    same = rdrop_loss(functional.cross_entropy, torch.cat([first, first]), targets, 5.0)
    torch.testing.assert_close(same, functional.cross_entropy(first, targets))
    logits = torch.cat([first, second]).requires_grad_()
    rdrop_loss(functional.cross_entropy, logits, targets, 5.0).backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()


def test_gradients_of_one_doubled_pass_are_those_of_two_passes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 5))
    _, _, targets = two_batches()
    images = torch.rand(6, 4)
    masks: list[Tensor] = []
    model[1].register_forward_hook(lambda module, inputs, out: masks.append((out != 0) * 2.0))
    doubled = model(images.repeat(2, 1))
    rdrop_loss(functional.cross_entropy, doubled, targets, 2.0).backward()
    found = [p.grad.clone() for p in model.parameters()]

    model.zero_grad()
    passes = [model[2](model[0](images) * mask) for mask in masks[0].chunk(2)]
    log_p, log_q = (logits.log_softmax(1) for logits in passes)
    loss = sum(functional.cross_entropy(logits, targets) for logits in passes) / 2
    loss = loss + functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    loss = loss + functional.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    loss.backward()
    for mine, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad)


def test_rdrop_of_micro_batches_adds_up() -> None:
    first, second, targets = two_batches()
    whole = rdrop_loss(functional.cross_entropy, torch.cat([first, second]), targets, 1.5)
    parts = [
        rdrop_loss(
            functional.cross_entropy,
            torch.cat([first[i : i + 3], second[i : i + 3]]),
            targets[i : i + 3],
            1.5,
        )
        for i in (0, 3)
    ]
    torch.testing.assert_close(whole, torch.stack(parts).mean())


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
    ).double()


def loss_of(model: nn.Module, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(6, 3, 6, 6, generator=generator, dtype=torch.float64)
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
    side = 6 if isinstance(model, nn.Sequential) else 64
    images = torch.rand(4, 3, side, side, dtype=next(model.parameters()).dtype)
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
