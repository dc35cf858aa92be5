"""When device memory runs out: which errors say so, and how a step is made again without a trace.

Takes errors and models; gives a smaller number of images, or a failure that says what to do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foldrace.core.errors import RunFailure
from foldrace.trainables.models.layers import NORMS_WITH_STATISTICS

# Where no torch.OutOfMemoryError is raised: CUDA's driver, cuBLAS, cuDNN, Apple's Metal, the CPU.
_MESSAGES = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",  # no room for its workspace
    "CUDNN_STATUS_ALLOC_FAILED",
    "nable to find an engine to execute this computation",  # cuDNN: each wants too much room
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a smaller batch may help."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return any(message in str(error) for message in _MESSAGES)


def halved(size: int, images: Tensor, error: RuntimeError, least: int = 1) -> int:
    """Half as many images at once. Raises the error where it is another one, and RunFailure where
    not even `least` of the `images` (B, 3, H, W) fit. Call it in the `except` clause, and go on
    after it: the error holds on to the tensors of the failed step."""
    if not is_out_of_memory(error):
        raise error
    if size <= least:
        raise RunFailure(
            f"out of memory with {size} of a batch of {len(images)} images on the device, each of "
            f"{images.shape[-1]} x {images.shape[-2]} pixels; choose a smaller image_size or "
            "backbone, training.gradient_checkpointing: true, training.precision: bf16, or fewer "
            "trials a device (resources.gpus_per_trial)"
        ) from error
    return max(-(-size // 2), least)


def release(device: torch.device) -> None:
    """Give back what the allocator keeps for reuse, in pieces that do not fit."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


class StepStart:
    """What a step changes before its gradients are complete: the statistics of batch norms, and
    the generators that dropout draws from."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        norms = [module for module in model.modules() if isinstance(module, NORMS_WITH_STATISTICS)]
        buffers = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
        self._statistics = [_Copies([b for b in buffers if b.dtype == dtype])
                            for dtype in {b.dtype for b in buffers}]  # fmt: skip
        self.least_images = 2 if norms else 1  # of a single one batch norms have no statistics
        self._on_gpu = device.type == "cuda"
        self._generators: list[Tensor] = []

    def mark(self) -> None:
        """At the start of each step."""
        for copies in self._statistics:
            copies.take()
        self._generators = [torch.get_rng_state()]
        if self._on_gpu:
            self._generators.append(torch.cuda.get_rng_state())

    def back(self) -> None:
        """As it was at the mark."""
        for copies in self._statistics:
            copies.put_back()
        torch.set_rng_state(self._generators[0])
        if self._on_gpu:
            torch.cuda.set_rng_state(self._generators[1])


class _Copies:
    """Of tensors of one type, so that they are copied together."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors, self._copies = tensors, [tensor.clone() for tensor in tensors]

    def take(self) -> None:
        torch._foreach_copy_(self._copies, self._tensors)

    def put_back(self) -> None:
        torch._foreach_copy_(self._tensors, self._copies)
