"""Backbones by registry name: `timm/<name>`, `torchvision/<name>`, and stacks of them.

Takes a name, gives a problem with the nearest names, or the backbone without its classifier.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torchvision
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from timm.models import get_deprecated_models
from torch import nn
from torchvision.models.vision_transformer import interpolate_embeddings

from foldrace.core.errors import EnvironmentProblem, Problem
from foldrace.core.plugins import NO_PARTS, Parts, Table
from foldrace.core.synonyms import closest
from foldrace.trainables.data.meta_features import IMAGENET_MEAN, IMAGENET_STD
from foldrace.trainables.models.encoder import Encoder, Normalise
from foldrace.trainables.models.stack import check_form, is_stack, members, stack_encoders
from foldrace.trainables.models.weights import load_weights, weights_file

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_HUB_SECONDS = 10.0  # for the hub's first answer


def timm_names() -> Sequence[str]:
    """Names of timm's backbones."""
    return timm.list_models()


def timm_encoder(name: str, pretrained: bool, drop_path: float, image_size: int) -> Encoder:
    """A backbone of timm without its classifier."""
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
    return Encoder(module, features, Normalise(used["mean"], used["std"]))


def _require_hub(repo: str) -> None:
    """Raise where the weights are not on this machine and the hub is out of reach.

    One request alone, since the hub's client would try for 47 s.
    """
    cached = (try_to_load_from_cache(repo, file) for file in _HUB_FILES)
    if any(isinstance(path, str) for path in cached):
        return
    with contextlib.suppress(HfHubHTTPError):  # an answer: timm knows the file's other names
        get_hf_file_metadata(hf_hub_url(repo, _HUB_FILES[0]), timeout=_HUB_SECONDS)


NO_LINEAR_HEAD = frozenset({"squeezenet1_0", "squeezenet1_1", "googlenet", "inception_v3"})


def torchvision_names() -> Sequence[str]:
    """Names of torchvision's backbones."""
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def torchvision_encoder(name: str, pretrained: bool, drop_path: float, image_size: int) -> Encoder:
    """A backbone of torchvision without its last linear layer."""
    if name.startswith("vit_"):
        module = _vit(name, pretrained, image_size)
    else:
        module = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None)
    last_name, last = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear)][-1]
    module.set_submodule(last_name, nn.Identity())
    _switch_off_dropout(module.get_submodule(last_name.rpartition(".")[0]))
    _set_stochastic_depth(module, drop_path)
    return Encoder(module, last.in_features, Normalise(IMAGENET_MEAN, IMAGENET_STD))


def _vit(name: str, pretrained: bool, image_size: int) -> nn.Module:
    """A vision transformer, its position embeddings interpolated to the image size."""
    module: nn.Module = torchvision.models.get_model(name, image_size=image_size)
    if pretrained:
        weights = torchvision.models.get_model_weights(name).DEFAULT
        state = weights.get_state_dict(progress=False, check_hash=True)
        module.load_state_dict(interpolate_embeddings(image_size, module.patch_size, state))
    return module


def _switch_off_dropout(classifier: nn.Module) -> None:
    """Switch off the dropout right in front of the removed layer: the head has its own."""
    children = list(classifier.children())
    for before, after in itertools.pairwise(children):
        if isinstance(before, nn.Dropout) and isinstance(after, nn.Identity):
            before.p = 0.0


def _set_stochastic_depth(module: nn.Module, drop_path: float) -> None:
    """Let stochastic depth rise linearly from 0 in the first block to `drop_path` in the last.

    Huang, Sun, Liu, Sedra and Weinberger, Deep Networks with Stochastic Depth, ECCV 2016.
    """
    blocks = [m for m in module.modules() if isinstance(m, torchvision.ops.StochasticDepth)]
    for depth, block in enumerate(blocks):
        block.p = drop_path * depth / max(1, len(blocks) - 1)


Pretrained = bool | str


@dataclass(frozen=True)
class Family:
    """One row of the table: where backbone names come from and how one is built."""

    prefix: str
    """The part of a backbone's name before the slash."""
    names: Callable[[], Sequence[str]]
    """All names, without the prefix."""
    build: Callable[[str, bool, float, int], Encoder]
    """(name, pretrained, drop_path, image_size in pixels) -> the backbone without classifier."""


FAMILIES = Table(
    Family,
    "backbone family",
    (
        Family("timm", timm_names, timm_encoder),
        Family("torchvision", torchvision_names, torchvision_encoder),
    ),
    key="prefix",
)


def build_encoder(
    backbone: str,
    image_size: int,
    pretrained: Pretrained,
    drop_path: float,
    parts: Parts = NO_PARTS,
) -> Encoder:
    """The backbone, or all members of a stack, without a classifier.

    `image_size` is that of the images, in pixels; a stack's members may have their own. Raises
    EnvironmentProblem where pretrained weights cannot be had, or where there is no such backbone:
    timm takes names, such as those of a hub or of a folder, that make it fetch or read files.
    """
    problem = check_backbone(backbone, parts)
    if problem is not None:
        raise EnvironmentProblem([problem])
    each = members(backbone)
    if is_stack(backbone) and isinstance(pretrained, str) and not Path(pretrained).is_dir():
        raise EnvironmentProblem.single(
            f"training.pretrained: {pretrained}",
            f"is no folder; {backbone} needs one with a <backbone>.safetensors for each member",
        )
    encoders = [
        _build_one(member.backbone, member.image_size or image_size, pretrained, drop_path, parts)
        for member in each
    ]
    return (
        stack_encoders(encoders, [member.image_size for member in each])
        if is_stack(backbone)
        else encoders[0]
    )


def check_backbone(backbone: str, parts: Parts = NO_PARTS) -> Problem | None:
    """A problem, with the nearest names, where there is no such backbone."""
    if not is_stack(backbone):
        message = _unknown(backbone, parts)
    elif (message := check_form(backbone)) is None:
        found = ((m.backbone, _unknown(m.backbone, parts)) for m in members(backbone))
        message = "; ".join(f"{name}: {text}" for name, text in found if text) or None
    return Problem(f"search.backbones: {backbone}", message) if message else None


def _unknown(backbone: str, parts: Parts) -> str | None:
    """The reason why a plain name is no backbone's, or None."""
    families = parts[FAMILIES]
    prefix, _, name = backbone.partition("/")
    if prefix == "torchvision" and name in NO_LINEAR_HEAD:
        return "has no linear classifier to replace; use timm's version of it"
    if prefix in families and _is_name(families[prefix], name):
        return None
    near = _meant(backbone, families)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; no close match"
    if prefix in families:
        return f"unknown backbone{hint}"
    return f"should look like {' or '.join(f'{row}/<name>' for row in families)}{hint}"


def _is_name(family: Family, name: str) -> bool:
    """True for a name of the family; timm's may have a tag, which says which weights."""
    if family.prefix != "timm" or "." not in name:
        return name in _names(family)
    return name.split(".")[0] in _names(family) and name in _pretrained_names()


def _meant(backbone: str, families: Mapping[str, Family]) -> list[str]:
    """The backbones that a name was probably meant to be, with their prefixes.

    The same name with a hub's address, in capitals or without the prefix; the one that timm has
    renamed it to; other weights of it; else similar ones.
    """
    given = backbone.rpartition("/")[2].rpartition(":")[2]
    own = [families[prefix]] if (prefix := backbone.partition("/")[0]) in families else []
    for name in dict.fromkeys((given, re.sub("[- ]", "_", given.lower()))):
        same = [f"{row.prefix}/{name}" for row in own or families.values() if _is_name(row, name)]
        same = same or [f"{row.prefix}/{name}" for row in families.values() if _is_name(row, name)]
        renamed = get_deprecated_models().get(name) if "timm" in families else None
        tagged = [f"timm/{n}" for n in timm.list_pretrained(f"{name.split('.')[0]}.*")]
        near = closest(f"timm/{name}", tagged, n=4) if "." in name else []
        if found := same or ([f"timm/{renamed}"] if renamed else near):
            return found
    every = [f"{row.prefix}/{n}" for row in own or families.values() for n in _names(row)]
    return closest(f"{own[0].prefix}/{name}" if own else name, every, n=4 if own else 3)


@cache
def _pretrained_names() -> frozenset[str]:
    return frozenset(timm.list_pretrained())


@cache
def _names(family: Family) -> frozenset[str]:
    return frozenset(family.names())


def _build_one(
    backbone: str, image_size: int, pretrained: Pretrained, drop_path: float, parts: Parts
) -> Encoder:
    prefix, _, name = backbone.partition("/")
    try:
        encoder = parts[FAMILIES][prefix].build(name, pretrained is True, drop_path, image_size)
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
        load_weights(encoder.module, weights_file(pretrained, backbone))
    return encoder
