"""The contract of every training loss, with and without class weights, and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pytorch_optimizer import LDAMLoss
from scipy.special import expit, rel_entr, softmax
from sklearn.metrics import log_loss
from torch import Tensor
from torch.nn import functional

from foldrace.search_spaces.hyperparameters import TrialParams
from foldrace.trainables.data.mixing import soft_targets
from foldrace.trainables.losses import LOSSES, Loss, build_loss, class_weights

COUNTS = np.array([90, 5, 30, 12])

each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
weightings = pytest.mark.parametrize("weighting", ["none", "balanced", "effective"])


def criterion(name: str, **params: float | str):
    return build_loss(TrialParams.from_dict({"loss": name, **params}), COUNTS)


def random_batch(n: int = 12, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, classes, generator=generator, requires_grad=True)
    return logits, torch.randint(classes, (n,), generator=generator)


def targets_for(loss: Loss, labels: Tensor, smoothing: float = 0.1) -> Tensor:
    return soft_targets(labels, 4, 0.0 if loss.hard else smoothing)


@each_loss
@weightings
def test_scalar_finite_and_differentiable(loss: Loss, weighting: str) -> None:
    logits, labels = random_batch()
    value = criterion(loss.name, class_weights=weighting)(logits, targets_for(loss, labels))
    assert value.shape == () and value.dtype == torch.float32 and value >= 0
    value.backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all() and logits.grad.any()


@each_loss
@weightings
def test_mean_over_the_batch_so_that_micro_batches_add_up(loss: Loss, weighting: str) -> None:
    logits, labels = random_batch()
    targets = targets_for(loss, labels)
    function = criterion(loss.name, class_weights=weighting)
    parts = [function(logits[i : i + 4], targets[i : i + 4]) for i in (0, 4, 8)]
    torch.testing.assert_close(function(logits, targets), torch.stack(parts).mean())


@each_loss
@weightings
def test_an_image_counts_by_the_weight_of_its_class(loss: Loss, weighting: str) -> None:
    logits, labels = random_batch()
    targets = targets_for(loss, labels, smoothing=0.0)
    weights = class_weights(weighting, COUNTS, TrialParams.class_weight_beta)
    each = [criterion(loss.name)(logits[i : i + 1], targets[i : i + 1]).item() for i in range(12)]
    weighted = criterion(loss.name, class_weights=weighting)(logits, targets)
    assert weighted.item() == pytest.approx(np.mean(each * weights[labels]), rel=1e-5)


@each_loss
@weightings
def test_extreme_logits_keep_value_and_gradient_finite(loss: Loss, weighting: str) -> None:
    function = criterion(loss.name, class_weights=weighting, focal_gamma=0.5)
    values = []
    for rows in ([[1e4, 0.0, 0.0, 0.0]], [[0.0, 1e4, 0.0, 0.0]], [[90.0, 0.0, 0.0, 0.0]]):
        logits = torch.tensor(rows, requires_grad=True)
        value = function(logits, soft_targets(torch.tensor([0]), 4, 0.0))
        value.backward()
        assert logits.grad is not None and torch.isfinite(logits.grad).all()
        values.append(value.item())
    assert values[0] < values[1] < float("inf")


@each_loss
def test_half_precision_logits_are_scored_in_float32(loss: Loss) -> None:
    logits, labels = random_batch()
    half = logits.detach().to(torch.bfloat16)
    targets = targets_for(loss, labels)
    expected = criterion(loss.name)(half.float(), targets)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(criterion(loss.name)(half, targets), expected)


@each_loss
def test_is_documented_under_its_name(loss: Loss) -> None:
    assert LOSSES[loss.name] is loss and loss.doc and loss.source


def test_cross_entropy_is_scikit_learns() -> None:
    logits, labels = random_batch()
    value = criterion("cross_entropy")(logits, soft_targets(labels, 4, 0.0))
    prob = torch.softmax(logits.detach().double(), 1).numpy()
    assert value.item() == pytest.approx(log_loss(labels.numpy(), prob), abs=1e-6)


def test_cross_entropy_with_smoothing_is_torchs() -> None:
    logits, labels = random_batch()
    ours = criterion("cross_entropy")(logits, soft_targets(labels, 4, 0.1))
    theirs = functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(ours, theirs)


def test_class_weights_are_torchs_up_to_the_divisor() -> None:
    logits, labels = random_batch()
    weights = torch.from_numpy(class_weights("balanced", COUNTS, 0.0)).float()
    ours = criterion("cross_entropy", class_weights="balanced")(logits, soft_targets(labels, 4, 0))
    theirs = functional.cross_entropy(logits, labels, weight=weights, reduction="sum") / 12
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.5), (0.5, 1.0), (0.0, 1.0)])
def test_focal_by_hand(gamma: float, alpha: float) -> None:
    logits, labels = random_batch()
    targets = soft_targets(labels, 4, 0.1)
    ours = criterion("focal", focal_gamma=gamma, focal_alpha=alpha)(logits, targets)
    p, t = softmax(logits.detach().double().numpy(), 1), targets.double().numpy()
    expected = (alpha * (1 - p) ** gamma * -t * np.log(p)).sum(1).mean()
    assert ours.item() == pytest.approx(expected, rel=1e-5)


def test_bce_by_hand() -> None:
    logits, labels = random_batch()
    targets = soft_targets(labels, 4, 0.1)
    s, t = expit(logits.detach().double().numpy()), targets.double().numpy()
    expected = -(t * np.log(s) + (1 - t) * np.log(1 - s)).sum(1).mean()
    assert criterion("bce")(logits, targets).item() == pytest.approx(expected, rel=1e-5)
    assert LOSSES["bce"].activation == "sigmoid"


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_kl_is_scipys_relative_entropy(smoothing: float) -> None:
    logits, labels = random_batch()
    targets = soft_targets(labels, 4, smoothing)
    p = softmax(logits.detach().double().numpy(), 1)
    expected = rel_entr(targets.double().numpy(), p).sum(1).mean()
    assert criterion("kl")(logits, targets).item() == pytest.approx(expected, rel=1e-5)


def test_ldam_is_pytorch_optimizers_on_logits_before_the_scale() -> None:
    logits, labels = random_batch()
    theirs = LDAMLoss(COUNTS.tolist(), max_m=0.5, s=30.0)(logits / 30.0, labels)
    ours = criterion("ldam")(logits, soft_targets(labels, 4, 0.0))
    torch.testing.assert_close(ours, theirs)


def test_ldam_with_a_class_that_has_no_row() -> None:
    function = build_loss(TrialParams(loss="ldam"), np.array([9, 0, 4, 2]))
    logits, labels = random_batch()
    assert torch.isfinite(function(logits, soft_targets(labels, 4, 0.0)))
