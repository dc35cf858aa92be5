"""The blend by torch and timm: `python predict.py IMAGE ...`, or `Blend(folder)(paths)`.

Builds each fold model by bundle.json and reads its weights from safetensors alone. Takes paths,
gives a `Prediction` of each, in their order.
"""

from __future__ import annotations

import re
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from foldrace.export.shipped.blend_io import (
    DamagedExport,
    Path_,
    Prediction,
    main,
    predict,
    read_about,
)
from foldrace.export.shipped.blend_pooling import Pooling

_POOLED_NORMS = frozenset({"classifier.0", "head.norm", "fc_norm"})
_NAME = re.compile(r"(timm|torchvision)/[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?")


class Blend:
    """An exported blend, ready to predict on `device`: cpu, cuda, mps; None: a GPU if there is."""

    def __init__(self, folder: Path_ = Path(__file__).parent, device: str | None = None) -> None:
        root = Path(folder)
        self.about = read_about(root, "bundle.json")
        self.classes: list[str] = self.about["classes"]
        self.device = torch.device(device or _best_device())
        self._models = [
            (member["input"], [_model(root, member, file) for file in member["files"]])
            for member in self.about["members"]
        ]
        for model in (model for _, models in self._models for model in models):
            model.to(self.device)
        combiner = self.about["combiner"]
        self._pooling = Pooling(
            self.about["pooling"],
            self.about["members"],
            _load(root / combiner) if combiner else {},
            self.about["repeats"],
            self.about["blend_temperature"],
        )

    def __call__(self, paths: Sequence[Path_]) -> list[Prediction]:
        """As many predictions as paths, in their order; ERROR where an image cannot be read."""
        return list(predict(paths, self.about, self.run))

    def run(
        self, squares: list[NDArray[np.uint8]], metas: list[NDArray[np.float32]]
    ) -> NDArray[np.float64]:
        """(n, C) probabilities."""
        with torch.inference_mode():
            return np.asarray(self._pooling(self.log_probs(squares, metas)).numpy())

    @torch.inference_mode()
    def log_probs(
        self, squares: list[NDArray[np.uint8]], metas: list[NDArray[np.float32]]
    ) -> Tensor:
        """(M, F, n, C) uncalibrated log-probabilities of each member's fold models, in float64."""
        images = [
            torch.from_numpy(each).to(self.device).permute(0, 3, 1, 2).float() / 255
            for each in squares
        ]
        meta = [torch.from_numpy(each).to(self.device) for each in metas]
        found = [
            torch.stack([model(images[form], meta[form]) for model in models])
            for form, models in self._models
        ]
        return torch.stack(found).cpu().double()


class FoldModel(nn.Module):
    """(B, 3, H, W) images in [0, 1] and (B, F) meta features -> (B, C) log-probabilities."""

    def __init__(self, member: Mapping[str, Any], size: int, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        parts = member["backbones"]
        bodies = [_body(part["name"], part["size"] or size) for part in parts]
        self.is_stack: bool = member["is_stack"]
        if member["head"] == "layernorm" and not self.is_stack:
            _drop_final_norm(bodies[0])
        stack = nn.ModuleDict({"members": nn.ModuleList(bodies)})
        self.body = stack if self.is_stack else bodies[0]
        self.head = _head(member["head"], state)
        self._bodies = bodies
        self._sizes = [part["size"] for part in parts]
        self._scales = [(_planes(part["mean"]), _planes(part["std"])) for part in parts]
        self._is_sigmoid = member["activation"] == "sigmoid"

    def forward(self, images: Tensor, meta: Tensor) -> Tensor:
        """(B, C)."""
        each = zip(self._bodies, self._sizes, self._scales, strict=True)
        features = [
            body((_resized(images, size) - mean.to(images)) / std.to(images))
            for body, size, (mean, std) in each
        ]
        logits = self.head(torch.cat([*features, meta], dim=1).float())
        if self._is_sigmoid:
            return torch.log_softmax(functional.logsigmoid(logits), dim=1)
        return torch.log_softmax(logits, dim=1)


def _model(root: Path, member: Mapping[str, Any], file: str) -> FoldModel:
    try:
        state = _load(root / file)
        model = FoldModel(member, member["size"], state)
        tensors = OrderedDict(state)  # some modules ask for the versions of their layout
        tensors._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
        model.load_state_dict(tensors)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, DamagedExport):
            raise
        raise DamagedExport(f"{root / file}: does not fit bundle.json: {error}") from error
    return model.eval()


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:  # also for a pickle, which is never read
        raise DamagedExport(f"{path}: cannot be read as safetensors: {error}") from error


def _body(backbone: str, size: int) -> nn.Module:
    """A backbone without its classifier; names alone, since timm would fetch or read others."""
    family, _, name = backbone.partition("/")
    if not _NAME.fullmatch(backbone):
        raise ValueError(f"{backbone!r:.80} is no backbone's name")
    if family == "torchvision":
        return _torchvision_body(name, size)
    if not timm.is_model(name.partition(".")[0]):
        raise ValueError(f"timm {timm.__version__} has no {name}")
    config = timm.get_pretrained_cfg(name)
    fixed = config is not None and config.fixed_input_size
    options: dict[str, Any] = {"img_size": size} if fixed else {}
    body: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **options)
    return body


def _torchvision_body(name: str, size: int) -> nn.Module:
    from torchvision.models import get_model

    options = {"image_size": size} if name.startswith("vit_") else {}
    body: nn.Module = get_model(name, weights=None, **options)
    last = [name for name, module in body.named_modules() if isinstance(module, nn.Linear)][-1]
    body.set_submodule(last, nn.Identity())
    return body


def _drop_final_norm(body: nn.Module) -> None:
    weighted = [name for name, m in body.named_modules() if list(m.parameters(recurse=False))]
    last = weighted[-1]
    if last in _POOLED_NORMS and isinstance(body.get_submodule(last), nn.LayerNorm):
        body.set_submodule(last, nn.Identity())


def _head(name: str, state: Mapping[str, Tensor]) -> nn.Module:
    """A head of the shapes that its weights have; dropout does nothing here."""
    widths = [t.shape for key, t in state.items() if key.startswith("head.") and t.ndim == 2]
    linear = [nn.Linear(shape[1], shape[0]) for shape in widths]
    if name == "linear":
        return nn.Sequential(nn.Identity(), linear[0])
    if name == "layernorm":
        return nn.Sequential(nn.LayerNorm(widths[0][1], eps=1e-6), nn.Identity(), linear[0])
    if name == "mlp":
        first, last = (state[key].shape for key in ("head.0.weight", "head.4.weight"))
        norm = nn.LayerNorm(first[0], eps=1e-6)
        ends = nn.Linear(first[1], first[0]), nn.Linear(last[1], last[0])
        return nn.Sequential(ends[0], norm, nn.GELU(), nn.Identity(), ends[1])
    raise ValueError(f"head {name!r}; allowed: linear, layernorm, mlp")


def _resized(images: Tensor, size: int | None) -> Tensor:
    if size is None or images.shape[-2:] == (size, size):
        return images
    return functional.interpolate(images, (size, size), mode="bilinear", antialias=True)


def _planes(channels: Sequence[float]) -> Tensor:
    return torch.tensor(channels, dtype=torch.float32).view(1, 3, 1, 1)


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main(Blend))
