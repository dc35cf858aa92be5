"""The contract of every activation, and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import expit, log_softmax

from foldrace.trainables.losses import ACTIVATIONS, Activation, log_probs

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
