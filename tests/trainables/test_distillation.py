"""A student's loss, and what its batches have of the teacher, against scipy and closed forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax
from torch import Tensor
from torch.nn import functional

from foldrace.config.hyperparameters import TrialParams
from foldrace.trainables.data.loader import Batch
from foldrace.trainables.data.soft_labels import SoftLabels
from foldrace.trainables.losses import Distillation
from foldrace.trainables.step import Examples, make_examples, rdrop_loss, train_step
from tests.trainables.test_step import BATCH, CLASSES, assert_same, descend, gradients, nets
from tests.trainables.test_step import state_for as train_state

CPU = torch.device("cpu")


def logits_of(rows: int = 6, seed: int = 0, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, CLASSES, generator=generator, dtype=torch.float64)


def soft_labels(log_prob: Tensor, temperature: float, labelled: int, files: int = 0) -> SoftLabels:
    """Of rows 0, 1, ..., the last `files` of which have no label."""
    return SoftLabels(
        rows=np.arange(len(log_prob)),
        log_prob=log_prob.to(torch.float16),
        labelled=labelled,
        files=tuple(Path(f"{i}.png") for i in range(files)),
        temperature=temperature,
        one_hot=False,
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_divergence_is_scipy_s_relative_entropy_times_the_square(
    temperature: float, activation: str
) -> None:
    logits, teacher = logits_of(), logits_of(seed=1).softmax(1)
    log_prob = logits.numpy()
    if activation == "sigmoid":  # one sigmoid a class, normalised
        log_prob = log_softmax(-np.log1p(np.exp(-log_prob)), axis=1)
    student = softmax(log_prob / temperature, axis=1)
    expected = temperature**2 * rel_entr(teacher.numpy(), student).sum(axis=1).mean()
    found = Distillation(0.5, temperature, activation).divergence(logits, teacher.float())
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_gradient_at_a_high_temperature_is_that_of_matching_logits() -> None:
    """Section 2.1 of the paper: (z - v) / C for logits that are 0 on average."""
    z, v = (x - x.mean(1, keepdim=True) for x in (logits_of(), logits_of(seed=1)))
    z, temperature = z.float().requires_grad_(), 1000.0
    taught = torch.softmax(v / temperature, 1).float()
    loss = Distillation(1.0, temperature, "softmax").divergence(z, taught)
    [grad] = torch.autograd.grad(loss, [z])
    torch.testing.assert_close(grad, ((z - v) / CLASSES / len(z)).float(), atol=2e-4, rtol=0.02)


def examples(seed: int = 0) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(BATCH, 3, 2, 2, generator=generator)
    targets, taught = torch.softmax(torch.randn(2, BATCH, CLASSES, generator=generator), 2)
    return Examples(images, torch.empty(BATCH, 0), targets, taught)


@pytest.mark.parametrize("micro_batch", [BATCH, 3])
def test_a_step_of_a_student_is_the_step_by_hand(micro_batch: int) -> None:
    ours, other = nets()
    ours.layers[2] = other.layers[2] = torch.nn.Identity()  # each micro-batch alone has a norm
    data, alpha, temperature = examples(), 0.3, 3.0
    distillation = Distillation(alpha, temperature, "softmax")
    state = train_state(ours, distillation=distillation, micro_batch=micro_batch)
    loss, _ = train_step(state, data, BATCH)
    logits = other(data.images)
    hard = functional.cross_entropy(logits, data.targets)
    log_student = functional.log_softmax(logits / temperature, 1)
    soft = (data.taught * (data.taught.log() - log_student)).sum(1).mean()
    expected = (1 - alpha) * hard + alpha * temperature**2 * soft
    descend(other, gradients(other, expected))
    torch.testing.assert_close(loss, expected.detach())
    assert_same(ours, other)


def test_r_drop_teaches_both_passes() -> None:
    logits, targets, taught = (logits_of(n, s).float() for n, s in ((12, 0), (6, 1), (6, 2)))
    targets, taught = targets.softmax(1), taught.softmax(1)
    distillation = Distillation(0.6, 2.0, "softmax")
    criterion = distillation.beside(functional.cross_entropy, taught)
    found = rdrop_loss(criterion, logits, targets, 0.0)
    passes = [
        0.4 * functional.cross_entropy(half, targets) + 0.6 * distillation.divergence(half, taught)
        for half in logits.chunk(2)
    ]
    torch.testing.assert_close(found, sum(passes) / 2)


def batch_of(rows: list[int]) -> Batch:
    images = torch.randint(0, 256, (len(rows), 4, 4, 3), dtype=torch.uint8)
    return Batch(images, torch.tensor(rows), torch.empty(len(rows), 0))


@pytest.mark.parametrize(
    "mixing", [{"mixup_alpha": 0.4, "mixup_prob": 1.0}, {"cutmix_prob": 1.0, "mixup_prob": 0.0}]
)
def test_teacher_s_rows_are_mixed_as_the_labels_are(mixing: dict[str, Any]) -> None:
    """A teacher that says exactly what the labels say is mixed to exactly what they are."""
    params = TrialParams(**mixing)
    labels = torch.tensor([0, 1, 2, 1, 0, 2, 2, 1])
    sure = torch.log(functional.one_hot(labels, CLASSES).double().clamp_min(1e-30))
    soft = soft_labels(sure, temperature=1.0, labelled=len(labels))
    rng = np.random.default_rng(3)
    found = make_examples(batch_of([5, 0, 3, 7, 1]), labels, CLASSES, params, CPU, rng, True, soft)
    assert (found.targets.max(1).values < 1).any()  # something was mixed
    torch.testing.assert_close(found.taught, found.targets, atol=1e-6, rtol=0)


def test_unlabelled_images_have_the_teacher_s_word_alone() -> None:
    teacher = logits_of(4, scale=1.0).log_softmax(1)
    labels = torch.tensor([0, 1, 2, 0])  # of the last two, what the teacher says first
    soft = soft_labels(teacher, temperature=2.0, labelled=2, files=2)
    rng = np.random.default_rng(0)
    params = TrialParams(mixup_prob=0.0)
    found = make_examples(batch_of([3, 0]), labels, CLASSES, params, CPU, rng, True, soft)
    torch.testing.assert_close(found.targets[0], teacher[3].exp().float(), atol=2e-3, rtol=0)
    assert found.targets[1].tolist() == [1.0, 0.0, 0.0]
    expected = softmax(teacher.numpy()[[3, 0]] / 2.0, axis=1)
    np.testing.assert_allclose(found.taught.numpy(), expected, atol=2e-3)


def test_a_candidate_without_a_teacher_learns_from_labels_alone() -> None:
    labels = torch.tensor([0, 1])
    rng = np.random.default_rng(0)
    found = make_examples(batch_of([0, 1]), labels, CLASSES, TrialParams(), CPU, rng)
    assert found.taught.shape == (2, 0)
