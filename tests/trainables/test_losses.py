"""Losses, class weights and activations: contracts, closed forms and other implementations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pytorch_optimizer import LDAMLoss
from scipy.special import expit, log_softmax, rel_entr, softmax
from sklearn.metrics import log_loss
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor
from torch.nn import functional

from foldrace.config.hyperparameters import TrialParams
from foldrace.trainables.data.mixing import soft_targets
from foldrace.trainables.losses import (
    ACTIVATIONS,
    CLASS_WEIGHTS,
    LOSSES,
    Activation,
    ClassWeights,
    Loss,
    build_loss,
    class_weights,
    log_probs,
)

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


ROW_COUNTS = np.array([50, 1, 7, 1000])

each_weighting = pytest.mark.parametrize("row", CLASS_WEIGHTS.values(), ids=CLASS_WEIGHTS)


@each_weighting
def test_one_on_average_over_the_training_rows(row: ClassWeights) -> None:
    weights = class_weights(row.name, ROW_COUNTS, 0.99)
    assert np.average(weights, weights=ROW_COUNTS) == pytest.approx(1.0)
    assert (weights > 0).all()


@each_weighting
def test_rarer_classes_never_count_less(row: ClassWeights) -> None:
    by_count = class_weights(row.name, ROW_COUNTS, 0.99)[np.argsort(ROW_COUNTS)]
    assert (np.diff(by_count) <= 0).all()


@each_weighting
def test_a_class_without_rows_changes_no_other(row: ClassWeights) -> None:
    with_gap = class_weights(row.name, np.array([50, 0, 1, 7, 1000]), 0.99)
    assert with_gap[1] == 1.0
    np.testing.assert_allclose(np.delete(with_gap, 1), class_weights(row.name, ROW_COUNTS, 0.99))


@each_weighting
def test_class_weights_are_documented_under_their_name(row: ClassWeights) -> None:
    assert CLASS_WEIGHTS[row.name] is row and row.doc


def test_none_is_one() -> None:
    np.testing.assert_array_equal(class_weights("none", ROW_COUNTS, 0.999), np.ones(4))


def test_balanced_is_scikit_learns() -> None:
    labels = np.repeat(np.arange(4), ROW_COUNTS)
    expected = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    np.testing.assert_allclose(class_weights("balanced", ROW_COUNTS, 0.999), expected)


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.9999])
def test_effective_is_the_papers_formula(beta: float) -> None:
    raw = np.array([(1 - beta) / (1 - beta ** int(n)) for n in ROW_COUNTS])
    found = class_weights("effective", ROW_COUNTS, beta)
    np.testing.assert_allclose(found / found[0], raw / raw[0], rtol=1e-9)


def test_effective_goes_from_none_to_balanced() -> None:
    np.testing.assert_allclose(class_weights("effective", ROW_COUNTS, 0.0), np.ones(4))
    near_one = class_weights("effective", ROW_COUNTS, 0.999999)
    np.testing.assert_allclose(near_one, class_weights("balanced", ROW_COUNTS, 0.0), rtol=1e-3)


each_activation = pytest.mark.parametrize("row", ACTIVATIONS.values(), ids=ACTIVATIONS)
LOGITS = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)) * 4


@each_activation
def test_rows_are_probabilities_in_the_order_of_the_logits(row: Activation) -> None:
    assert ACTIVATIONS[row.name] is row and row.doc
    found = log_probs(LOGITS, row.name)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.exp().sum(1), torch.ones(20))
    assert torch.equal(found.argsort(1), LOGITS.argsort(1))


@each_activation
def test_huge_logits_and_half_precision_stay_finite(row: Activation) -> None:
    huge = torch.tensor([[300.0, -300.0, 0.0], [-300.0, -299.0, -300.0]])
    assert torch.isfinite(log_probs(huge, row.name)).all()
    half = log_probs(LOGITS.to(torch.bfloat16), row.name)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, log_probs(LOGITS, row.name), atol=0.1, rtol=0)


def test_closed_forms() -> None:
    logits = LOGITS.double().numpy()
    softmax = log_softmax(logits, axis=1)
    np.testing.assert_allclose(log_probs(LOGITS, "softmax").numpy(), softmax, atol=1e-5)
    sigmoid = np.log(expit(logits) / expit(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(log_probs(LOGITS, "sigmoid").numpy(), sigmoid, atol=1e-5)


def test_softmax_leaves_log_probabilities_as_they_are() -> None:
    found = log_probs(LOGITS, "sigmoid")
    torch.testing.assert_close(log_probs(found, "softmax"), found)
