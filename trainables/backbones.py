"""Backbones by registry name (`timm/<name>`, `torchvision/<name>`) and the classifier around one.

Takes a name, gives a module from images in [0, 1] to logits; each backbone normalises its own
input, so that nothing outside needs to know its mean and deviation.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.vision_transformer import interpolate_embeddings

from experiment.config import closest
from experiment.errors import EnvironmentProblem, Problem
from trainables.heads import build_head

Pretrained = bool | str
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_NO_LINEAR_HEAD = frozenset({"squeezenet1_0", "squeezenet1_1", "googlenet", "inception_v3"})
_LEAST_LOADED = 0.9  # of the backbone's tensors that a weights file must hold
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_HUB_SECONDS = 10.0  # for the hub's first answer


@dataclass(frozen=True)
class Body:
    """A backbone without its classifier: (B, 3, H, W) normalised -> (B, features)."""

    module: nn.Module
    features: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Family:
    """One row of the table: where backbone names come from and how one is built.
    `build(name, pretrained, drop_path, image_size)`."""

    prefix: str
    names: Callable[[], Sequence[str]]
    build: Callable[[str, bool, float, int], Body]


class Classifier(nn.Module):
    """(B, 3, H, W) images in [0, 1] -> (B, classes) logits."""

    mean: Tensor  # (1, 3, 1, 1)
    std: Tensor  # (1, 3, 1, 1)

    def __init__(self, body: Body, classes: int, dropout: float) -> None:
        super().__init__()
        self.body = body.module
        self.head = build_head(body.features, classes, dropout)
        self.register_buffer("mean", _channels(body.mean), persistent=False)
        self.register_buffer("std", _channels(body.std), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        normalised = (images - _planes(self.mean, images)) / _planes(self.std, images)
        return self.head(self.body(normalised))  # type: ignore[no-any-return]


def build_classifier(
    backbone: str,
    classes: int,
    image_size: int,
    pretrained: Pretrained = False,
    dropout: float = 0.0,
    drop_path: float = 0.0,
) -> Classifier:
    """Raises EnvironmentProblem where pretrained weights cannot be had."""
    family, name = _split(backbone)
    try:
        body = family.build(name, pretrained is True, drop_path, image_size)
    except Exception as error:  # whatever the hub's client raises: it has no common base
        if pretrained is not True:
            raise
        raise EnvironmentProblem.single(
            f"training.pretrained: {backbone}",
            f"the pretrained weights cannot be fetched ({type(error).__name__}: {error}); set "
            "training.pretrained to true (on a machine that reaches the hub), false (from "
            "scratch), or the path of a weights file or of a folder of <backbone>.safetensors",
        ) from error
    if isinstance(pretrained, str):
        _load_weights(body.module, weights_file(pretrained, backbone))
    return Classifier(body, classes, dropout)


def check_backbone(backbone: str) -> Problem | None:
    """A problem, with the nearest names, where there is no such backbone."""
    where = f"search.backbones: {backbone}"
    prefix, slash, name = backbone.partition("/")
    if not slash or prefix not in FAMILIES:
        every = [f"{family}/{n}" for family in FAMILIES for n in _names(family)]
        near = [f"{family}/{backbone}" for family in FAMILIES if backbone in _names(family)]
        near = near or closest(backbone, every)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        return Problem(where, f"should look like timm/<name> or torchvision/<name>{hint}")
    if prefix == "torchvision" and name in _NO_LINEAR_HEAD:
        return Problem(where, "has no linear classifier to replace; use timm's version of it")
    plain = name.split(".")[0] if prefix == "timm" else name
    if plain in _names(prefix) and (plain == name or name in timm.list_pretrained()):
        return None
    names = timm.list_pretrained(f"{plain}.*") if plain in _names(prefix) else _names(prefix)
    near = closest(name, names, n=4)
    listed = ", ".join(f"{prefix}/{n}" for n in near)
    hint = f"close matches: {listed}" if near else "no close match"
    return Problem(where, f"unknown backbone; {hint}")


def check_image_size(backbone: str, image_size: int) -> Problem | None:
    """A problem where the backbone cannot take images of this size; tried without memory."""
    try:
        with torch.device("meta"), torch.no_grad():
            model = build_classifier(backbone, 2, image_size).eval()
            model(torch.zeros(1, 3, image_size, image_size))
    except NotImplementedError:
        return None  # needs real memory to be built: the trial will tell
    except (RuntimeError, AssertionError, ValueError) as error:
        if "meta tensor" in str(error):
            return None
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Problem(f"search.backbones: {backbone}", f"refuses {image_size} px: {first_line}")
    return None


def parameter_count(backbone: str, classes: int, image_size: int) -> int:
    """Parameters of the classifier, without allocating them where the backbone allows it."""
    with contextlib.suppress(RuntimeError, NotImplementedError), torch.device("meta"):
        return _parameters(build_classifier(backbone, classes, image_size))
    return _parameters(build_classifier(backbone, classes, image_size))


def weights_file(pretrained: str, backbone: str) -> Path:
    """The weights of a backbone under a `training.pretrained` path: the file itself, or
    `<name>.safetensors` in the folder, `<name>` without `timm/`."""
    path = Path(pretrained)
    return path / f"{backbone.partition('/')[2]}.safetensors" if path.is_dir() else path


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _split(backbone: str) -> tuple[Family, str]:
    prefix, _, name = backbone.partition("/")
    return FAMILIES[prefix], name


def _names(prefix: str) -> frozenset[str]:
    return _names_of(FAMILIES[prefix])


@cache
def _names_of(family: Family) -> frozenset[str]:
    return frozenset(family.names())


def _timm_names() -> Sequence[str]:
    return timm.list_models()


def _timm_body(name: str, pretrained: bool, drop_path: float, image_size: int) -> Body:
    # Also where it is 0: some backbones have another default.
    options: dict[str, Any] = {"drop_path_rate": drop_path}
    config = timm.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size:
        options["img_size"] = image_size
    if pretrained and config is not None and config.hf_hub_id:
        _require_hub(config.hf_hub_id)
    try:
        module = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except TypeError:  # a backbone without stochastic depth
        del options["drop_path_rate"]
        module = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    attributes: Any = module  # timm's models share no typed base class
    features = getattr(module, "head_hidden_size", None) or attributes.num_features
    used = attributes.pretrained_cfg
    return Body(module, features, tuple(used["mean"]), tuple(used["std"]))


def _require_hub(repo: str) -> None:
    """Raises where the weights are not on this machine and the hub is out of reach: one request,
    since the hub's client would try for 47 s."""
    cached = (try_to_load_from_cache(repo, file) for file in _HUB_FILES)
    if any(isinstance(path, str) for path in cached):
        return
    with contextlib.suppress(HfHubHTTPError):  # an answer: timm knows the file's other names
        get_hf_file_metadata(hf_hub_url(repo, _HUB_FILES[0]), timeout=_HUB_SECONDS)


def _torchvision_names() -> Sequence[str]:
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def _torchvision_body(name: str, pretrained: bool, drop_path: float, image_size: int) -> Body:
    if name.startswith("vit_"):
        module = _torchvision_vit(name, pretrained, image_size)
    else:
        module = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None)
    last_name, last = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear)][-1]
    module.set_submodule(last_name, nn.Identity())
    _switch_off_dropout(module.get_submodule(last_name.rpartition(".")[0]))
    _set_stochastic_depth(module, drop_path)
    return Body(module, last.in_features, _IMAGENET_MEAN, _IMAGENET_STD)


def _torchvision_vit(name: str, pretrained: bool, image_size: int) -> nn.Module:
    """Its position embeddings fit one image size: others are interpolated."""
    module: nn.Module = torchvision.models.get_model(name, image_size=image_size)
    if pretrained:
        weights = torchvision.models.get_model_weights(name).DEFAULT
        state = weights.get_state_dict(progress=False, check_hash=True)
        module.load_state_dict(interpolate_embeddings(image_size, module.patch_size, state))
    return module


def _switch_off_dropout(classifier: nn.Module) -> None:
    """The dropout right in front of the removed layer: the head has its own."""
    children = list(classifier.children())
    for before, after in itertools.pairwise(children):
        if isinstance(before, nn.Dropout) and isinstance(after, nn.Identity):
            before.p = 0.0


def _set_stochastic_depth(module: nn.Module, drop_path: float) -> None:
    """Linearly rising from 0 in the first block to `drop_path` in the last."""
    blocks = [m for m in module.modules() if isinstance(m, torchvision.ops.StochasticDepth)]
    for depth, block in enumerate(blocks):
        block.p = drop_path * depth / max(1, len(blocks) - 1)


def _load_weights(module: nn.Module, file: Path) -> None:
    """Tensors of the same name; the file's own classifier is left out."""
    where = f"training.pretrained: {file}"
    try:
        given = load_file(file)
    except Exception as error:  # safetensors raises its own type for a damaged file
        raise EnvironmentProblem.single(where, f"cannot be read as safetensors: {error}") from error
    own = module.state_dict()
    fitting = {k: v for k, v in given.items() if k in own}
    other = [k for k, v in fitting.items() if own[k].shape != v.shape]
    if other:
        file_shape, own_shape = tuple(fitting[other[0]].shape), tuple(own[other[0]].shape)
        raise EnvironmentProblem.single(
            where,
            f"{len(other)} tensors have another shape than the backbone's: {other[0]} is "
            f"{file_shape} in the file, {own_shape} in the backbone; it is of another backbone, or "
            "was trained at another image size (training.image_size)",
        )
    if len(fitting) < _LEAST_LOADED * len(own):
        missing = sorted(own.keys() - fitting.keys())[:3]
        raise EnvironmentProblem.single(
            where, f"fits {len(fitting)} of the backbone's {len(own)} tensors; missing: {missing}"
        )
    module.load_state_dict(fitting, strict=False)


def _planes(channels: Tensor, images: Tensor) -> Tensor:
    """(1, 3, 1, 1) -> (1, 3, H, W), channels-last as the images come: broadcasting along an
    innermost dimension of 3 would take ten times as long."""
    planes = channels.expand(1, -1, *images.shape[2:])
    return planes.contiguous(memory_format=torch.channels_last)


def _channels(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1)


FAMILIES: dict[str, Family] = {
    family.prefix: family
    for family in (
        Family("timm", _timm_names, _timm_body),
        Family("torchvision", _torchvision_names, _torchvision_body),
    )
}
