"""One optimiser step on one batch, whatever the technique and however little memory there is.

Takes a `Learner` and a batch on its device; changes the learner, gives the loss and the logits.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trainables.learner import Learner
from trainables.memory import halved, release
from trainables.rdrop import rdrop_loss
from trainables.sharpness import kept_statistics

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
