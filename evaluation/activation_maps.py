"""Class-activation maps: which parts of an image speak for a class, of any backbone.

Takes a classifier and one image, gives a map (h, w) in [0, 1] for each class. Grad-CAM: the
channels of the last layer that still has places, each weighted with the mean gradient of the
class's logit, summed, negative parts cut off. Of a ViT the places are its tokens without the class
token, of the last layer where they still have a say in the logit. Sources: Selvaraju et al.,
Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization, ICCV 2017; where a
mean over places and a linear layer follow it is the map of Zhou et al., Learning Deep Features for
Discriminative Localization, CVPR 2016, but for its scale.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

_LEAST_PLACES = 16
"""Fewer are too coarse to show anything, as where small images shrink to 2 x 2."""
_MOST_PREFIX = 8
"""Class and register tokens that a ViT may have before those of its patches."""
_INSIDE_ATTENTION = re.compile(r"(^|[._])(attn|attention|self_attn|attn_drop)([._]|$)")
"""There, dimensions are heads and pairs of tokens, not places."""


def activation_maps(
    model: nn.Module, body: nn.Module, images: Tensor, meta: Tensor, classes: Sequence[int]
) -> NDArray[np.float32] | None:
    """(k, h, w) maps of one image (1, 3, H, W) for k classes; None where no layer has places.

    `body` is the part of the model whose layers are looked at; the greatest value of each map is 1,
    and a map is 0 where nothing speaks for its class.
    """
    with torch.enable_grad(), _recorded(body) as layers:
        logits = model(images.requires_grad_(), meta)
        if not layers:
            return None
        found = []
        for one in classes:
            grads = torch.autograd.grad(
                logits[0, one], layers, retain_graph=True, allow_unused=True
            )
            found.append(grads)
        layer = _last_that_counts(layers, found)
        if layer is None:
            return None
        places = _places(layers[layer])
        assert places is not None
        return np.stack([_map(places, _places(grads[layer])) for grads in found])


@contextmanager
def _recorded(body: nn.Module) -> Iterator[list[Tensor]]:
    """Give a list that the outputs of all layers with places are added to, in their order."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, given: object, output: object) -> None:
        if isinstance(output, Tensor) and output.requires_grad and _places(output) is not None:
            outputs.append(output)

    hooks = [
        module.register_forward_hook(keep)
        for name, module in body.named_modules()
        if name and not _INSIDE_ATTENTION.search(name)
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _last_that_counts(
    layers: Sequence[Tensor], grads: Sequence[Sequence[Tensor | None]]
) -> int | None:
    """The last layer with enough places of which a class's logit depends; else with any places.

    The tokens of a ViT's last block but the class token have no say any more.
    """
    coarse = None
    for i in reversed(range(len(layers))):
        places = [_places(of_class[i]) for of_class in grads]
        if not any(p is not None and bool(p.abs().max() > 0) for p in places):
            continue
        first = next(p for p in places if p is not None)
        if first.shape[1] * first.shape[2] >= _LEAST_PLACES:
            return i
        coarse = i if coarse is None else coarse
    return coarse


def _places(output: Tensor | None) -> Tensor | None:
    """(C, h, w) of the one image; None where the output has no square of places.

    (1, C, h, w), (1, h, w, C) as some transformers have it, or tokens (1, T, C).
    """
    if output is None or output.shape[0] != 1:
        return None
    if output.ndim == 4:
        _, a, b, c = output.shape
        if b == c and b > 1:
            return output[0]
        return output[0].permute(2, 0, 1) if a == b and a > 1 else None
    if output.ndim != 3:
        return None
    side = math.isqrt(output.shape[1])
    prefix = output.shape[1] - side * side
    if side < 2 or prefix > _MOST_PREFIX:
        return None
    return output[0, prefix:].T.reshape(-1, side, side)


def _map(places: Tensor, grads: Tensor | None) -> NDArray[np.float32]:
    """(h, w) in [0, 1] of activations and gradients (C, h, w)."""
    if grads is None:
        return np.zeros(tuple(places.shape[1:]), dtype=np.float32)
    weights = grads.float().mean(dim=(1, 2))
    raw = torch.einsum("c,chw->hw", weights, places.detach().float()).clamp(min=0)
    most = raw.max()
    return (raw / most if most > 0 else raw).cpu().numpy().astype(np.float32)
