"""One optimiser step on one batch, whatever the technique and however little memory there is.

Takes a `Learner` and a batch on its device; changes the learner, gives the loss and the logits.

R-Drop: two passes of the same images, that drop other units, must agree.

Takes the logits of one doubled batch, gives the loss. Liang, Wu, Li, Wang, Meng, Qin, Chen, Zhang
and Liu, R-Drop: Regularized Dropout for Neural Networks, NeurIPS 2021.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from foldrace.trainables.losses import ACTIVATIONS
from foldrace.trainables.memory import halved, release
from foldrace.trainables.state import Learner, kept_statistics


def rdrop_loss(
    criterion: Callable[[Tensor, Tensor], Tensor],
    logits: Tensor,
    targets: Tensor,
    alpha: float,
    activation: str = "softmax",
) -> Tensor:
    """Mean of the two passes' losses + alpha / 2 (KL(p||q) + KL(q||p)), mean over the batch.

    `logits` (2B, C): those of the B images, then those of the same images again; `targets` (B, C);
    `criterion` is a mean over its batch. `activation` is the loss's own: p and q are softmaxes,
    or C independent sigmoids whose divergences are summed.
    """
    first, second = logits.float().chunk(2)
    fit = criterion(logits, targets.repeat(2, 1))
    probabilities = ACTIVATIONS[activation].trained
    # For both activations the symmetric divergence is sum_c (p_c - q_c) (logit p_c - logit q_c).
    p, q = probabilities(first), probabilities(second)
    divergence = ((p - q) * (first - second)).sum(1).mean()
    return fit + alpha / 2 * divergence


_log = logging.getLogger("foldrace")


@dataclass(frozen=True)
class Examples:
    """This device's share of a batch, ready for the model."""

    images: Tensor  # (B, 3, H, W) float32 in [0, 1]
    meta: Tensor  # (B, F) float32; F is 0 without meta features
    targets: Tensor  # (B, C) float32, rows sum to 1

    def __len__(self) -> int:
        return len(self.images)

    def micro_batches(self, size: int, least: int = 1) -> Iterator[Examples]:
        """At most `size` images each, as even as possible; but no fewer than `least`, even where
        that makes one larger: batch norms have no statistics of a single image."""
        count = max(min(-(-len(self) // size), len(self) // least), 1)
        tensors = (self.images, self.meta, self.targets)
        parts = zip(*(tensor.tensor_split(count) for tensor in tensors), strict=True)
        yield from (Examples(*part) for part in parts)


def update(learner: Learner, examples: Examples, batch_size: int) -> tuple[Tensor, Tensor]:
    """The mean loss over this device's images, and their (B, C) logits. `batch_size` counts the
    images of all devices. When the memory of a trial's only device runs out the step is made again
    in smaller micro-batches."""
    learner.start.mark()
    while True:
        try:
            loss, logits = _step_gradients(learner, examples, batch_size)
            break
        except RuntimeError as error:
            # The other devices wait for this one's gradients: only all can start again together.
            if learner.accelerator.num_processes > 1:
                raise
            least = learner.start.least_images
            learner.micro_batch = halved(learner.micro_batch, examples.images, error, least)
        _start_again(learner)  # here, since the error holds on to the failed step's tensors
    if learner.clip_grad is not None:
        learner.accelerator.clip_grad_norm_(learner.parameters, learner.clip_grad)
    learner.optimizer.step()
    learner.optimizer.zero_grad()
    learner.updates += 1
    learner.schedule.step_update(learner.updates)
    if learner.ema is not None:
        learner.ema.update(learner.bare, learner.updates)
    return loss, logits


def _step_gradients(learner: Learner, examples: Examples, batch_size: int) -> tuple[Tensor, Tensor]:
    """The gradients that the optimiser steps by; with SAM those of the perturbed weights."""
    found = _gradients(learner, examples, batch_size)
    if learner.sharpness is not None:
        learner.sharpness.perturb()
        try:
            with kept_statistics(learner.model):
                _gradients(learner, examples, batch_size)
        finally:
            learner.sharpness.restore()
    return found


def _gradients(learner: Learner, examples: Examples, batch_size: int) -> tuple[Tensor, Tensor]:
    """Add the gradients of the mean loss over the whole batch: those of the micro-batches add up,
    and those of the devices are averaged."""
    parts = list(examples.micro_batches(learner.micro_batch, learner.start.least_images))
    world = learner.accelerator.num_processes
    loss = torch.zeros((), device=examples.images.device)
    outputs: list[Tensor] = []
    for i, part in enumerate(parts):
        with _synchronised(learner, last=i == len(parts) - 1):
            part_loss, logits = _forward(learner, part)
            learner.accelerator.backward(part_loss * (len(part) * world / batch_size))
        loss += part_loss.detach() * (len(part) / len(examples))
        outputs.append(logits.detach())
    return loss, torch.cat(outputs)


def _forward(learner: Learner, part: Examples) -> tuple[Tensor, Tensor]:
    """The mean loss, and the (B, C) logits; R-Drop sees every image twice."""
    if learner.rdrop_alpha == 0:
        logits = learner.model(part.images, part.meta)
        return learner.criterion(logits, part.targets), logits
    twice = (torch.cat([tensor, tensor]) for tensor in (part.images, part.meta))
    logits = learner.model(*twice)
    loss = rdrop_loss(
        learner.criterion, logits, part.targets, learner.rdrop_alpha, learner.activation
    )
    return loss, logits[: len(part)]


def _synchronised(learner: Learner, last: bool) -> contextlib.AbstractContextManager[None]:
    """Devices exchange gradients once a batch."""
    return contextlib.nullcontext() if last else learner.accelerator.no_sync(learner.model)


def _start_again(learner: Learner) -> None:
    """As if the failed step had not been: same effective batch, less memory. Batch norms see each
    micro-batch alone."""
    learner.optimizer.zero_grad()
    learner.start.back()
    release(learner.device)
    norms = ", smaller batches for batch norms" if learner.start.least_images > 1 else ""
    _log.warning(
        "out of memory: the same effective batch%s, from now on in micro-batches of %d",
        norms,
        learner.micro_batch,
    )
