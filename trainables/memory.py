"""When device memory runs out: which errors say so, and how many images to try next.

Takes an error and a number of images, gives half as many, or a failure that says what to do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foldrace.core.errors import RunFailure

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
    """True where a smaller batch may help."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return any(message in str(error) for message in _MESSAGES)


def halved(size: int, images: Tensor, error: RuntimeError, least: int = 1) -> int:
    """Half as many images at once.

    Raises the error where it is another one, and RunFailure where not even `least` of the `images`
    (B, 3, H, W) fit. Call it in the `except` clause, and go on after it: the error holds on to the
    tensors of the failed step.
    """
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
