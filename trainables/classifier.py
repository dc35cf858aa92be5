"""The whole classifier: backbone, meta features where there are some, head.

Takes a `ModelCard`, gives a module from images in [0, 1] to logits; tells beforehand what a
backbone refuses and how large it is, without its memory.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from experiment.errors import Problem
from experiment.plugin_files import described, place_of
from trainables.backbones import Pretrained, build_body
from trainables.body import Body, drop_final_norm
from trainables.card import ModelCard
from trainables.gradient_checkpointing import checkpoint_gradients
from trainables.heads import HEADS
from trainables.meta_features import meta_width
from trainables.stack import is_stack, members


class Classifier(nn.Module):
    """(B, 3, H, W) images in [0, 1] and, where built with them, (B, F) meta features ->
    (B, classes) logits."""

    def __init__(
        self, body: Body, head: nn.Module, meta_width: int, channels_last: bool = True
    ) -> None:
        """`channels_last`: images pass as loaders give them; else they are reordered at once, since
        layers would otherwise reorder their contiguous weights at every call."""
        super().__init__()
        self.normalise = body.normalise
        self.body = body.module
        self.head = head
        self._meta_width, self._channels_last = meta_width, channels_last

    def forward(self, images: Tensor, meta: Tensor | None = None) -> Tensor:
        if not self._channels_last:
            images = images.contiguous()
        features = self.body(self.normalise(images))
        if self._meta_width:
            features = torch.cat([features, self._required(meta)], dim=1)
        return self.head(features)  # type: ignore[no-any-return]

    def _required(self, meta: Tensor | None) -> Tensor:
        if meta is None or meta.shape[1] != self._meta_width:
            got = "none" if meta is None else f"{meta.shape[1]}"
            raise ValueError(f"needs {self._meta_width} meta features an image, got {got}")
        return meta


def build_classifier(
    card: ModelCard,
    *,
    pretrained: Pretrained = False,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    gradient_checkpointing: bool = False,
    channels_last: bool = True,
) -> Classifier:
    """`channels_last`: see `Classifier`. Raises EnvironmentProblem where pretrained weights cannot
    be had, and UserError where the backbone has no gradient checkpointing."""
    body = build_body(card.backbone, card.image_size, pretrained, drop_path)
    if gradient_checkpointing:
        checkpoint_gradients(body.module, card.backbone)
    head = HEADS[card.head]
    if head.norms_features and not is_stack(card.backbone):  # of a stack: members on one scale
        drop_final_norm(body.module)
    width = meta_width(card.meta)
    end = head.build(body.features + width, card.classes, dropout)
    return Classifier(body, end, width, channels_last)


def check_image_size(backbone: str, image_size: int) -> Problem | None:
    """A problem where the backbone, or a stack's member, cannot take images of this size; tried
    without memory."""
    for member in members(backbone):
        size = member.image_size or image_size
        message = refusal(member.backbone, size, size)
        if message is not None:
            by = f"{member.backbone} " if is_stack(backbone) else ""
            where = f"search.backbones: {backbone}"
            return Problem(where, f"{by}refuses {size} px: {message}")
    return None


def refusal(backbone: str, image_size: int, seen: int) -> str | None:
    """What a backbone built for `image_size` says of images of `seen` pixels, where it refuses
    them; tried without memory."""
    try:
        with torch.device("meta"), torch.no_grad():
            model = build_classifier(ModelCard(backbone, 2, image_size)).eval()
            model(torch.zeros(1, 3, seen, seen))
    except NotImplementedError:
        return None  # needs real memory to be built: the trial will tell
    except Exception as error:  # a plugin's backbone may raise anything
        if "meta tensor" in str(error):
            return None
        place = place_of(error)
        if place is not None:
            return f"plugin {place}: {described(error)}"
        if not isinstance(error, (RuntimeError, AssertionError, ValueError)):
            raise
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None


def parameter_count(card: ModelCard) -> int:
    """Parameters of the classifier, without allocating them where the backbone allows it."""
    with contextlib.suppress(RuntimeError, NotImplementedError), torch.device("meta"):
        return _parameters(build_classifier(card))
    return _parameters(build_classifier(card))


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
