"""One optimiser step, from a loaded batch to changed weights, whatever the technique.

Takes a `TrainState` and a batch, changes the state, gives the loss and the logits. In the order of
a step: soft targets, erasing, mixing; forward and backward in micro-batches, with R-Drop and SAM
where they are on; again in smaller ones where memory ran out; clipping, optimiser, pull to the
pretrained weights, schedule, EMA.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from foldrace.config.hyperparameters import TrialParams
from foldrace.trainables.data.loader import Batch, to_float
from foldrace.trainables.data.mixing import erase_, mix, soft_targets
from foldrace.trainables.losses import ACTIVATIONS
from foldrace.trainables.memory import halved, release
from foldrace.trainables.models.layers import NORMS_WITH_STATISTICS

if TYPE_CHECKING:
    from foldrace.trainables.data.soft_labels import SoftLabels
    from foldrace.trainables.state import TrainState

_log = logging.getLogger("foldrace")


@dataclass(frozen=True)
class Examples:
    """One device's share of a batch, ready for the model."""

    images: Tensor  # (B, 3, H, W) float32 in [0, 1]
    meta: Tensor  # (B, F) float32; F is 0 without meta features
    targets: Tensor  # (B, C) float32, rows sum to 1
    taught: Tensor
    """(B, C) float32 probabilities of a student's teacher at its temperature; else (B, 0)."""

    def __len__(self) -> int:
        return len(self.images)

    def micro_batches(self, size: int, least: int = 1) -> Iterator[Examples]:
        """Split into parts of at most `size` images, as even as possible.

        No part has fewer than `least`, even where that makes one larger than `size`: batch norms
        have no statistics of a single image.
        """
        count = max(min(-(-len(self) // size), len(self) // least), 1)
        tensors = (self.images, self.meta, self.targets, self.taught)
        parts = zip(*(tensor.tensor_split(count) for tensor in tensors), strict=True)
        yield from (Examples(*part) for part in parts)


def make_examples(
    batch: Batch,
    labels: Tensor,
    classes: int,
    params: TrialParams,
    device: torch.device,
    rng: np.random.Generator,
    mixed: bool = True,
    soft: SoftLabels | None = None,
) -> Examples:
    """A loaded batch on the device, with soft targets, erased in part and, if `mixed`, mixed.

    `labels` (n,) are those of all rows, on the device; `soft` is what a student's teacher says.
    """
    images = to_float(batch.images.to(device, non_blocking=True))
    meta = batch.meta.to(device, non_blocking=True)
    rows = batch.rows.to(device, non_blocking=True)
    targets = soft_targets(labels[rows], classes, params.label_smoothing)
    taught = targets.new_zeros(len(targets), 0)
    if soft is not None:
        targets, taught = soft.taught(batch.rows, targets, device)
    erase_(images, params.random_erasing, rng)
    if mixed:
        images, (meta, targets, taught) = mix(images, (meta, targets, taught), params, rng)
    return Examples(images, meta, targets, taught)


def train_step(state: TrainState, examples: Examples, batch_size: int) -> tuple[Tensor, Tensor]:
    """Change the weights once; the mean loss over this device's images, and their (B, C) logits.

    `batch_size` counts the images of all devices. When the memory of a trial's only device runs
    out, the step is made again in smaller micro-batches.
    """
    state.before_step.take()
    while True:
        try:
            loss, logits = _step_gradients(state, examples, batch_size)
            break
        except RuntimeError as error:
            # The other devices wait for this one's gradients: only all can start again together.
            if state.accelerator.num_processes > 1:
                raise
            least = state.before_step.least_images
            state.micro_batch = halved(state.micro_batch, examples.images, error, least)
        _start_again(state)  # here, since the error holds on to the failed step's tensors
    if state.clip_grad is not None:
        state.accelerator.clip_grad_norm_(state.parameters, state.clip_grad)
    state.optimizer.step()
    if state.start is not None:
        state.start.pull()
    state.optimizer.zero_grad()
    state.updates += 1
    state.schedule.step_update(state.updates)
    if state.ema is not None:
        state.ema.update(state.bare, state.updates)
    return loss, logits


def _step_gradients(
    state: TrainState, examples: Examples, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Set the gradients that the optimiser steps by; with SAM those of the perturbed weights."""
    loss, logits = _gradients(state, examples, batch_size)
    if state.sam_rho > 0:
        with (
            perturbed_weights(state.optimizer, state.sam_rho),
            frozen_norm_statistics(state.model),
        ):
            _gradients(state, examples, batch_size)
    return loss, logits


def _gradients(state: TrainState, examples: Examples, batch_size: int) -> tuple[Tensor, Tensor]:
    """Add the gradients of the mean loss over the whole batch.

    Those of the micro-batches add up, and those of the devices are averaged.
    """
    parts = list(examples.micro_batches(state.micro_batch, state.before_step.least_images))
    world = state.accelerator.num_processes
    loss = torch.zeros((), device=examples.images.device)
    outputs: list[Tensor] = []
    for i, part in enumerate(parts):
        with _gradients_exchanged(state, last=i == len(parts) - 1):
            part_loss, logits = _forward(state, part)
            state.accelerator.backward(part_loss * (len(part) * world / batch_size))
        loss += part_loss.detach() * (len(part) / len(examples))
        outputs.append(logits.detach())
    return loss, torch.cat(outputs)


def _forward(state: TrainState, part: Examples) -> tuple[Tensor, Tensor]:
    """The mean loss, and the (B, C) logits; R-Drop sees every image twice."""
    criterion = state.criterion
    if state.distillation is not None:
        criterion = state.distillation.beside(criterion, part.taught)
    if state.rdrop_alpha == 0:
        logits = state.model(part.images, part.meta)
        return criterion(logits, part.targets), logits
    twice = (torch.cat([tensor, tensor]) for tensor in (part.images, part.meta))
    logits = state.model(*twice)
    loss = rdrop_loss(criterion, logits, part.targets, state.rdrop_alpha, state.activation)
    return loss, logits[: len(part)]


def _gradients_exchanged(state: TrainState, last: bool) -> AbstractContextManager[None]:
    """Let the devices exchange gradients once per batch, in its last backward pass."""
    return nullcontext() if last else state.accelerator.no_sync(state.model)


def rdrop_loss(
    criterion: Callable[[Tensor, Tensor], Tensor],
    logits: Tensor,
    targets: Tensor,
    alpha: float,
    activation: str = "softmax",
) -> Tensor:
    """Mean of the two passes' losses + alpha / 2 (KL(p||q) + KL(q||p)), mean over the batch.

    `logits` (2B, C): those of the B images, then those of the same images again, with other units
    dropped; `targets` (B, C); `criterion` is a mean over its batch. `activation` is the loss's own:
    p and q are softmaxes, or C independent sigmoids whose divergences are summed.

    Liang, Wu, Li, Wang, Meng, Qin, Chen, Zhang and Liu, R-Drop: Regularized Dropout for Neural
    Networks, NeurIPS 2021.
    """
    first, second = logits.float().chunk(2)
    fit = criterion(logits, targets.repeat(2, 1))
    probabilities = ACTIVATIONS[activation].trained
    # For both activations the symmetric divergence is sum_c (p_c - q_c) (logit p_c - logit q_c).
    p, q = probabilities(first), probabilities(second)
    divergence = ((p - q) * (first - second)).sum(1).mean()
    return fit + alpha / 2 * divergence


@contextmanager
def perturbed_weights(optimizer: torch.optim.Optimizer, rho: float) -> Iterator[None]:
    """Inside, weights are w + rho g / |g|, the norm over all gradients, which are cleared.

    Outside they are w again, bit for bit, also after an error. Around any optimiser: gradients at
    w; gradients again inside; then the optimiser's own step. With bf16 or fp32 only: fp16 scales
    gradients.

    Foret, Kleiner, Mobahi and Neyshabur, Sharpness-Aware Minimization for Efficiently Improving
    Generalization, ICLR 2021. pytorch-optimizer's SAM builds its base optimiser itself, keeps the
    old weights in that one's state and cannot go back without a step; so the tests compare with it.
    """
    weights = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    before = [p.detach().clone() for p in weights]
    gradients = [p.grad for p in weights if p.grad is not None]
    scale = rho / (get_total_norm(gradients) + 1e-12)
    with torch.no_grad():
        torch._foreach_add_(weights, torch._foreach_mul(gradients, scale))
    optimizer.zero_grad()
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(weights, before)


@contextmanager
def frozen_norm_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, batch norms normalise by the batch but do not learn from it.

    So an image is counted once per update, and at the weights that it is scored with.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, NORMS_WITH_STATISTICS)
        and module.training
        and module.track_running_stats
    ]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _start_again(state: TrainState) -> None:
    """Undo the failed step, for one with the same effective batch and less memory.

    Batch norms then see each micro-batch alone.
    """
    state.optimizer.zero_grad()
    state.before_step.restore()
    release(state.device)
    norms = ", smaller batches for batch norms" if state.before_step.least_images > 1 else ""
    _log.warning(
        "out of memory: the same effective batch%s, from now on in micro-batches of %d",
        norms,
        state.micro_batch,
    )


class StepSnapshot:
    """A copy of everything that a step changes before its gradients are complete.

    These are the statistics of batch norms, and the generators that dropout draws from.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        norms = [module for module in model.modules() if isinstance(module, NORMS_WITH_STATISTICS)]
        buffers = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
        self._statistics = [_Copies([b for b in buffers if b.dtype == dtype])
                            for dtype in {b.dtype for b in buffers}]  # fmt: skip
        self.least_images = 2 if norms else 1  # of a single one batch norms have no statistics
        self._on_gpu = device.type == "cuda"
        self._generators: list[Tensor] = []

    def take(self) -> None:
        """Take the snapshot, at the start of each step."""
        for copies in self._statistics:
            copies.take()
        self._generators = [torch.get_rng_state()]
        if self._on_gpu:
            self._generators.append(torch.cuda.get_rng_state())

    def restore(self) -> None:
        """Put everything back as it was when the snapshot was taken."""
        for copies in self._statistics:
            copies.restore()
        torch.set_rng_state(self._generators[0])
        if self._on_gpu:
            torch.cuda.set_rng_state(self._generators[1])


class _Copies:
    """Copies of tensors of one type, made all at once.

    torch's `_foreach` functions are private, but its own optimisers and timm use them too: a loop
    over the tensors of a network takes many times as long.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors, self._copies = tensors, [tensor.clone() for tensor in tensors]

    def take(self) -> None:
        torch._foreach_copy_(self._copies, self._tensors)

    def restore(self) -> None:
        torch._foreach_copy_(self._tensors, self._copies)
