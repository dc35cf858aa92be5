"""The contract of every training loss, and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from trainables.losses import LOSSES, Loss, check_loss
from trainables.mixing import soft_targets

each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def random_batch(n: int = 12, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, classes, generator=generator, requires_grad=True)
    return logits, torch.randint(classes, (n,), generator=generator)


@each_loss
def test_scalar_finite_and_differentiable(loss: Loss) -> None:
    logits, labels = random_batch()
    value = loss.function(logits, soft_targets(labels, 4, 0.1))
    assert value.shape == ()
    value.backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()


@each_loss
def test_mean_over_the_batch_so_that_micro_batches_add_up(loss: Loss) -> None:
    logits, labels = random_batch()
    targets = soft_targets(labels, 4, 0.0)
    whole = loss.function(logits, targets)
    parts = [loss.function(logits[i : i + 4], targets[i : i + 4]) for i in (0, 4, 8)]
    torch.testing.assert_close(whole, torch.stack(parts).mean())


@each_loss
def test_prefers_the_right_class_and_huge_logits_stay_finite(loss: Loss) -> None:
    targets = soft_targets(torch.tensor([0]), 3, 0.0)
    right = loss.function(torch.tensor([[1e4, 0.0, 0.0]]), targets)
    wrong = loss.function(torch.tensor([[0.0, 1e4, 0.0]]), targets)
    assert float(right) < float(wrong) < float("inf")


@each_loss
def test_is_documented_under_its_name(loss: Loss) -> None:
    assert LOSSES[loss.name] is loss and loss.doc
    assert check_loss(loss.name) is None


def test_cross_entropy_is_scikit_learns() -> None:
    logits, labels = random_batch()
    value = LOSSES["cross_entropy"].function(logits, soft_targets(labels, 4, 0.0))
    prob = torch.softmax(logits.detach().double(), 1).numpy()
    assert float(value.detach()) == pytest.approx(log_loss(labels.numpy(), prob), abs=1e-6)


def test_cross_entropy_with_smoothing_is_torchs() -> None:
    logits, labels = random_batch()
    ours = LOSSES["cross_entropy"].function(logits, soft_targets(labels, 4, 0.1))
    torch.testing.assert_close(
        ours, torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    )
    assert float(ours.detach()) < np.inf


def test_unknown_loss() -> None:
    problem = check_loss("cross_entrpy")
    assert problem is not None and problem.where == "training.loss"
    assert "did you mean 'cross_entropy'? allowed: cross_entropy" in problem.message
