"""The blend as weights: safetensors of every fold model, bundle.json, and code that runs them.

Takes an `ExportedBlend`, fills a folder that needs torch, timm, Pillow and numpy alone
(torchvision for its backbones).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import Tensor, nn

from foldrace.core.progress import tell
from foldrace.export.blend import ExportedBlend, ExportedMember, LogProbs
from foldrace.export.folder import (
    about_blend,
    copy_code,
    write_json,
    write_requirements,
    write_sums,
)
from foldrace.export.parity import (
    PARITY_ROWS,
    Metas,
    Parity,
    RunExport,
    Squares,
    check_parity,
    draw_sample,
)
from foldrace.export.shipped.bundle_predict import Blend
from foldrace.trainables.models.backbones import build_encoder
from foldrace.trainables.models.stack import is_stack, members

PACKAGES = ("foldrace", "torch", "timm", "torchvision", "safetensors", "pillow", "numpy")
_NEEDED = ("torch", "timm", "safetensors", "pillow", "numpy")
_COMBINER = "combiner.safetensors"


def write_bundle(blend: ExportedBlend, folder: Path, workers: int) -> Parity:
    """Fill a folder; RunFolderError where weights are gone or of another model.

    RunFailure where the bundle's own code gives other probabilities than the run's models.
    """
    sample = draw_sample(blend, PARITY_ROWS, workers)
    (folder / "models").mkdir()
    listed = [_write_member(blend, i, folder) for i in range(len(blend.members))]
    arrays = blend.combiner.arrays()
    if arrays:
        save_file(dict(arrays), folder / _COMBINER)
    files = [file for member in listed for file in _files(member)]
    own = {
        "format": "foldrace bundle",
        "pooling": blend.combiner.pooling,
        "combiner": _COMBINER if arrays else "",
        "repeats": blend.store.folds().repeats,
        "blend_temperature": blend.temperature,
        "members": listed,
        "files": files + ([_COMBINER] if arrays else []),
    }
    about = about_blend(blend, PACKAGES)
    write_json(folder, "bundle.json", {"format": own.pop("format"), **about, **own})
    copy_code(folder, "bundle_predict", ("blend_io", "blend_images", "blend_pooling"))
    with_vision = any("torchvision/" in m.model_config.backbone for m in blend.members)
    write_requirements(folder, (*_NEEDED, *(["torchvision"] if with_vision else [])))
    write_sums(folder)
    return check_parity(blend, sample, runner(folder))


def runner(folder: Path) -> RunExport:
    """A function that runs a bundle by its own predict.py's code, on the CPU."""
    opened = Blend(folder, "cpu")

    def run(squares: Squares, metas: Metas) -> tuple[NDArray[np.floating], LogProbs]:
        return opened.run(squares, metas), opened.log_probs(squares, metas).float().numpy()

    return run


def _write_member(blend: ExportedBlend, place: int, folder: Path) -> dict[str, object]:
    member = blend.members[place]
    files = []
    for fold in range(blend.folds):
        tell("Copying fold models", place * blend.folds + fold, len(blend.members) * blend.folds)
        member.open(fold)  # it is what its record says
        files.append(f"models/{place}-{member.name}-fold{fold}.safetensors")
        (folder / files[-1]).write_bytes(member.weights(fold))
    config = member.model_config
    return {
        "candidate": member.record.candidate,
        "variant": member.record.variant,
        "weight": float(blend.combiner.weights[place]),
        "temperature": member.record.temperature,
        "input": blend.forms.index(member.form),
        "size": config.image_size,
        "is_stack": is_stack(config.backbone),
        "backbones": list(_backbones(member)),
        "head": config.head,
        "activation": config.activation,
        "files": files,
    }


def _files(member: dict[str, object]) -> list[str]:
    files = member["files"]
    assert isinstance(files, list)
    return files


def _backbones(member: ExportedMember) -> Iterator[dict[str, object]]:
    """Name, own image size, mean and deviation of each body."""
    for part in members(member.model_config.backbone):
        size = part.image_size or member.model_config.image_size
        encoder = build_encoder(part.backbone, size, False, 0.0, member.models.parts)
        mean, std = _channels(encoder.normalise, "mean"), _channels(encoder.normalise, "std")
        yield {"name": part.backbone, "size": part.image_size, "mean": mean, "std": std}


def _channels(normalise: nn.Module, name: str) -> list[float]:
    values = getattr(normalise, name)
    assert isinstance(values, Tensor)
    return [float(value) for value in values.flatten()]
