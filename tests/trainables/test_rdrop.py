"""R-Drop against two separate passes with torch's and scipy's divergences."""

from __future__ import annotations

import pytest
import torch
from scipy.special import rel_entr
from torch import Tensor, nn
from torch.nn import functional

from foldrace.trainables.data.mixing import soft_targets
from foldrace.trainables.step import rdrop_loss


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


def test_micro_batches_add_up() -> None:
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
