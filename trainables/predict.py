"""From weights and images to probabilities: used to score folds and to predict test images.

Takes a model or its weights file, and a loader; gives (n, C) logits or log-probabilities.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import nn
from torch.utils.data import DataLoader

from foldrace.config.schema import AugmentConfig
from foldrace.core.plugins import NO_PARTS, Parts
from foldrace.trainables.data.loader import (
    Batch,
    BatchDataset,
    LoaderSettings,
    OrderedBatchSampler,
    build_loader,
    to_float,
)
from foldrace.trainables.data.pixel_cache import ImageSource
from foldrace.trainables.losses import log_probs
from foldrace.trainables.memory import halved, release
from foldrace.trainables.models.classifier import (
    Classifier,
    ModelConfig,
    build_classifier,
    config_from_json,
    config_to_json,
)
from foldrace.trainables.models.weights import load_tensors

_METADATA = "foldrace"


def pack_weights(state: dict[str, torch.Tensor], model_config: ModelConfig) -> bytes:
    """A safetensors file that describes its own model."""
    dense = {name: tensor.contiguous() for name, tensor in state.items()}
    return save(dense, metadata={_METADATA: config_to_json(model_config)})


def unpack_classifier(
    data: bytes, model_config: ModelConfig, parts: Parts = NO_PARTS
) -> Classifier:
    """The classifier of a weights file in evaluation mode, on the CPU.

    ValueError where the file's own header is of another model: nothing is built by a header.
    """
    own, asked = asdict(read_model_config(data)), asdict(model_config)
    other = [
        f"{key} {own[key]!r:.80}, not {asked[key]!r:.80}" for key in asked if own[key] != asked[key]
    ]
    if other:
        raise ValueError(f"its header is of another model than trial.json: {', '.join(other)}")
    model = build_classifier(model_config, parts=parts)
    load_tensors(model, load(data))
    return model.eval()


def read_model_config(data: bytes) -> ModelConfig:
    """The config in the header of a weights file."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return config_from_json(header["__metadata__"][_METADATA])


def scoring_loader(
    source: ImageSource,
    rows: NDArray[np.int64],
    model_config: ModelConfig,
    batch_size: int,
    settings: LoaderSettings,
    parts: Parts = NO_PARTS,
) -> DataLoader[Batch]:
    """Rows in order, resized only, with the meta features of the config."""
    dataset = BatchDataset(
        source,
        model_config.image_size,
        AugmentConfig(policy="none"),
        model_config.meta,
        parts,
        model_config.resize,
    )
    sampler = OrderedBatchSampler(rows, batch_size)
    return build_loader(dataset, sampler, **asdict(settings))


def log_probabilities(
    model: nn.Module,
    loader: Iterable[Batch],
    device: torch.device,
    autocast: torch.autocast,
    activation: str,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(n, C) natural-log probabilities in float32, and the (n,) rows they belong to.

    `activation`, a row of `ACTIVATIONS`, makes them from what the model gives.
    """
    [logits], rows = all_logits([model], loader, device, autocast)
    return log_probs(logits, activation).cpu().numpy(), rows


@torch.inference_mode()
def all_logits(
    models: Sequence[nn.Module],
    loader: Iterable[Batch],
    device: torch.device,
    autocast: torch.autocast,
) -> tuple[list[torch.Tensor], NDArray[np.int64]]:
    """(n, C) float32 logits of each model, on the device, and the (n,) rows they belong to.

    One pass over the images. Where memory runs out the batches are halved.
    """
    for model in models:
        model.eval()
    parts: list[list[torch.Tensor]] = [[] for _ in models]
    rows: list[torch.Tensor] = []
    most = 1 << 30  # images at once
    for batch in loader:
        images = to_float(batch.images.to(device, non_blocking=True))
        meta = batch.meta.to(device, non_blocking=True)
        while True:
            split = zip(torch.split(images, most), torch.split(meta, most), strict=True)
            shares = list(split)
            try:
                with autocast:
                    logits = [[model(*share).float() for share in shares] for model in models]
                break
            except RuntimeError as error:
                most = halved(min(most, len(images)), images, error)
            release(device)
        for part, found in zip(parts, logits, strict=True):
            part.extend(found)
        rows.append(batch.rows)
    return [torch.cat(part) for part in parts], torch.cat(rows).numpy()


def autocast_for(device: torch.device, precision: str) -> torch.autocast:
    """A context of mixed precision as `resolve_precision` named it, to be entered many times."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.bfloat16)
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


def resolve_precision(device: torch.device, asked: str, sam_rho: float) -> str:
    """The precision to use: `auto` is bf16 where the GPU has it, else fp16; fp32 on a CPU.

    With SAM, whose perturbation is wrong on fp16's scaled gradients, never fp16: also to predict,
    as its model was scored.
    """
    found = _automatic(device) if asked == "auto" else asked
    return "fp32" if found == "fp16" and sam_rho > 0 else found


def _automatic(device: torch.device) -> str:
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
