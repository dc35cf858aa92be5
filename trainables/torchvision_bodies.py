"""torchvision's backbones: their names, and one without its last linear layer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torchvision
from torch import nn
from torchvision.models.vision_transformer import interpolate_embeddings

from trainables.body import Body, Normalise
from trainables.imagenet import IMAGENET_MEAN, IMAGENET_STD

NO_LINEAR_HEAD = frozenset({"squeezenet1_0", "squeezenet1_1", "googlenet", "inception_v3"})


def torchvision_names() -> Sequence[str]:
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def torchvision_body(name: str, pretrained: bool, drop_path: float, image_size: int) -> Body:
    if name.startswith("vit_"):
        module = _vit(name, pretrained, image_size)
    else:
        module = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None)
    last_name, last = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear)][-1]
    module.set_submodule(last_name, nn.Identity())
    _switch_off_dropout(module.get_submodule(last_name.rpartition(".")[0]))
    _set_stochastic_depth(module, drop_path)
    return Body(module, last.in_features, Normalise(IMAGENET_MEAN, IMAGENET_STD))


def _vit(name: str, pretrained: bool, image_size: int) -> nn.Module:
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
